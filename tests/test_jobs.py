"""The jobs as people run them: each by itself with its default config, and the upload of a submitter.

`tests/ops/` submits them to a cluster.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPO

BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "job",
    [
        "embed_items",
        "train_prior",
        "tune_prior",
        "distill_prior",
        "generate_catalog",
        "evaluate_catalog",
        "nightly",
    ],
)
def test_every_job_runs_by_itself_and_knows_its_default_config(job: str) -> None:
    out = subprocess.run(
        [REPO / "jobs" / f"{job}.py", "--dry-run"],
        env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    assert "rebeca-stickers" in out.stdout


def test_the_upload_is_small_and_holds_no_weights(tmp_path: Path) -> None:
    """Build the upload by Ray's rules for `.gitignore` and `.rayignore`."""
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(REPO), package, include_gitignore=True)
    names = zipfile.ZipFile(package).namelist()
    assert package.stat().st_size < 1_000_000
    assert {name.split("/")[0] for name in names} >= {"jobs"}
    assert not [
        name
        for name in names
        if name.endswith((".safetensors", ".parquet")) or name.startswith(("rebeca_ray/", ".venv/", ".git/"))
    ]
