"""Plan `infra/terraform` with Terraform and its AWS provider, without an account, and record the plan.

`REBECA_TERRAFORM_PLUGINS=FOLDER python -m tests.platforms.terraform` writes the record after a change of
the files. The folder is a mirror of providers, as `terraform providers mirror FOLDER` writes it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]

SOURCES = sorted((REPO / "infra" / "terraform").glob("*.tf"))
RUN = Path(__file__).with_name("plan.tftest.hcl")
RECORD = Path(__file__).with_name("plan.json")
# Of resources that the run replaces, Terraform makes up all other attributes.
GIVEN = {
    "aws_s3_bucket.catalog": {"bucket", "force_destroy"},
    "aws_kms_key.catalog": {"enable_key_rotation", "deletion_window_in_days", "multi_region"},
    "aws_iam_role.worker": {"name"},
    "aws_security_group.cluster": {"name", "vpc_id", "ingress", "egress"},
}


def missing() -> str:
    """Return the parts that a plan needs and this machine lacks, or an empty text."""
    parts = {
        "the program `terraform`": shutil.which("terraform"),
        "REBECA_TERRAFORM_PLUGINS, a folder with the provider hashicorp/aws": os.environ.get(
            "REBECA_TERRAFORM_PLUGINS"
        ),
    }
    return " and ".join(part for part, present in parts.items() if not present)


def terraform(folder: Path, *words: str) -> str:
    """Run Terraform in a folder, without a call home. Raises AssertionError with its output if it fails."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "CHECKPOINT_DISABLE": "1",
        "TF_IN_AUTOMATION": "1",
    }
    ran = subprocess.run(
        ["terraform", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def plan(folder: Path) -> dict[str, Any]:
    """Return the planned attributes of every resource and data source by its address."""
    for source in (*SOURCES, RUN):
        shutil.copy(source, folder)
    terraform(folder, "init", "-backend=false", f"-plugin-dir={os.environ['REBECA_TERRAFORM_PLUGINS']}")
    terraform(folder, "fmt", "-check", "-diff")
    terraform(folder, "validate")
    messages = map(json.loads, terraform(folder, "test", "-json", "-verbose").splitlines())
    (planned,) = [message["test_plan"] for message in messages if message["type"] == "test_plan"]
    return {
        change["address"]: {
            name: value
            for name, value in without_nulls(change["change"]["after"]).items()
            if name in GIVEN.get(change["address"], {name})
        }
        for change in planned["resource_changes"]
    }


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def digest() -> str:
    """Return a hash of all files that the plan is made from."""
    content = b"\0".join(path.read_bytes() for path in (*SOURCES, RUN))
    return hashlib.sha256(content).hexdigest()


def recorded() -> dict[str, Any]:
    """Return the recorded plan. Raises AssertionError if the files changed since."""
    record = json.loads(RECORD.read_text())
    assert record["sha256"] == digest(), (
        "infra/terraform changed; record the plan with `python -m tests.platforms.terraform`"
    )
    return dict(record["plan"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        record = {"sha256": digest(), "plan": plan(Path(temporary))}
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
