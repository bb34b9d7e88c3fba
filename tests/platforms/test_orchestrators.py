"""The files of Airflow and Dagster: their commands, and all of them where the real libraries are installed.

`REBECA_ORCHESTRATORS` names Python environments, separated by `:`. One of them has `apache-airflow` and
`apache-airflow-providers-cncf-kubernetes`, one `dagster` and `dagster-ray`. They conflict with our packages.
"""

import ast
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.dashboard.modules.job.cli import submit
from typer.testing import CliRunner

from rebeca_ray.cli.commands import app
from tests.conftest import REPO
from tests.infra.manifests import check_entrypoint
from tests.infra.test_cronjob import STUB

AIRFLOW, DAGSTER = REPO / "infra" / "airflow_dag.py", REPO / "infra" / "dagster_definitions.py"
CRONJOB = yaml.safe_load((REPO / "infra" / "kubernetes" / "base" / "cronjob.yaml").read_text())
JOB = CRONJOB["spec"]["jobTemplate"]["spec"]
SUBMITTER = JOB["template"]["spec"]["containers"][0]
DISTRIBUTIONS = {
    "airflow": ("apache_airflow", "apache_airflow_providers_cncf_kubernetes"),
    "dagster": ("dagster", "dagster_ray"),
}


def environment_with(library: str) -> Path:
    """Return the Python of an environment with a library, or skip with the parts that are missing."""
    folders = [Path(folder) for folder in os.environ.get("REBECA_ORCHESTRATORS", "").split(":") if folder]
    for folder in folders:
        if all(list(folder.glob(f"lib/python*/site-packages/{name}-*")) for name in DISTRIBUTIONS[library]):
            return folder / "bin" / "python"
    needed = " and ".join(DISTRIBUTIONS[library]).replace("_", "-")
    pytest.skip(f"needs REBECA_ORCHESTRATORS, naming an environment with {needed}")


def facts(library: str, folder: Path) -> dict[str, Any]:
    python = environment_with(library)
    script = REPO / "tests" / "platforms" / "orchestrators.py"
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "AIRFLOW_HOME": str(folder)}
    ran = subprocess.run(
        [python, script, library, REPO / "infra"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stderr
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def constants(path: Path) -> dict[str, Any]:
    """Return the constants of a module that this environment cannot import."""
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant | ast.Set)
    }


@pytest.mark.parametrize(
    ("ends", "code"), [("0", 0), ("1", 1), ("2", 2), ("4", 4), ("5", 5), ("75", 75), ("lost", 1)]
)
def test_the_script_of_airflow_ends_with_the_exit_code_of_the_job(
    tmp_path: Path, ends: str, code: int
) -> None:
    for name in ("ray", "sleep"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "termination-log"
    environment = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "ENDS": ends,
        "NIGHT": "2026-03-02",
        "ATTEMPT": "1",
    }
    script = constants(AIRFLOW)["SUBMIT"].replace("/dev/termination-log", str(log))
    ran = subprocess.run(["bash", "-uc", script], env=environment, check=False, timeout=60)
    assert ran.returncode == code
    assert log.read_text() == f"exit code {code}\n"
    calls = [line.split("\0")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[1] for call in calls] == ["submit", "logs", "status"]
    submitted = submit.make_context("submit", calls[0][2:]).params
    assert submitted["submission_id"] == "rebeca-2026-03-02-1"
    check_entrypoint(list(submitted["entrypoint"]))
    job = submitted["entrypoint"][-1]
    config = REPO / "jobs" / "configs" / "nightly_stickers.yaml"
    result = CliRunner().invoke(app, ["nightly", "--config", str(config), job, "--dry-run"])
    assert '"run_date": "2026-03-02"' in result.output


def test_the_command_of_dagster_is_a_job_of_the_image() -> None:
    (command,) = [
        node
        for node in ast.walk(ast.parse(DAGSTER.read_text()))
        if isinstance(node, ast.JoinedStr) and ast.unparse(node).startswith("f'python ")
    ]
    check_entrypoint(eval(ast.unparse(command), {"night": "2026-03-02"}).split())


def test_both_agree_with_the_manifests_on_the_head_and_the_permanent_codes() -> None:
    address = next(entry["value"] for entry in SUBMITTER["env"] if entry["name"] == "RAY_API_SERVER_ADDRESS")
    rule = JOB["podFailurePolicy"]["rules"][0]
    for path in (AIRFLOW, DAGSTER):
        assert constants(path)["HEAD"] == address
        assert constants(path)["PERMANENT"] == set(rule["onExitCodes"]["values"])


def test_airflow_loads_the_dag_and_retries_the_right_ends(tmp_path: Path) -> None:
    dag = facts("airflow", tmp_path)
    print(dag["versions"])
    assert dag["dag"] == ["rebeca_nightly", False, 1]
    assert dag["first_run"] == "2026-03-02T01:00:00+00:00"
    assert (dag["operator"], dag["retries"], dag["lost_pod"]) == ("KubernetesPodOperator", 3, "default")
    assert dag["decisions"] == {
        "1": "default", "2": "fail", "3": "fail", "4": "fail", "5": "default", "75": "default",
    }  # fmt: skip
    assert dag["command"] == ["bash", "-uc", constants(AIRFLOW)["SUBMIT"]]
    assert dag["image"] == SUBMITTER["image"]
    assert dag["labels"]["app"] == "rebeca-submitter"
    assert dag["variables"]["NIGHT"] == "{{ (dag_run.logical_date or dag_run.run_after) | ds }}"
    pod = dag["pod"]
    assert pod["automount_service_account_token"] is False
    assert (pod["security_context"]["run_as_non_root"], pod["security_context"]["run_as_user"]) == (
        True,
        1000,
    )
    assert pod["volumes"][0]["secret"]["secret_name"] == "rebeca-ray-token"


def test_dagster_loads_the_definitions_and_retries_the_right_ends(tmp_path: Path) -> None:
    definitions = facts("dagster", tmp_path)
    print(definitions["versions"])
    assert definitions["schedule"] == ["0 1 * * *", "Etc/UTC"]
    assert definitions["partition"] == "2026-03-02"
    assert definitions["address"] == constants(DAGSTER)["HEAD"]
    assert definitions["submitted"]["entrypoint"].endswith(" run_date=2026-03-02")
    assert definitions["submitted"]["submission_id"].startswith("rebeca-2026-03-02-")
    assert definitions["outcomes"] == {
        "0": "success", "1": "retry", "2": "fail", "3": "fail", "4": "fail", "5": "retry", "75": "retry",
    }  # fmt: skip
