"""The jobs as people run them: a head node with its token, then `ray job submit`, with default configs."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from rebeca_ray.stickers import ITEMS
from tests.conftest import REPO
from tests.seaweedfs import free_port

BIN = Path(sys.executable).parent
# A submitter has no torch and no rebeca_ray: their imports fail, whatever this test's environment holds.
THIN_CLIENT = """
import site, sys
site.main()
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in (
            "rebeca_ray", "torch", "diffusers", "transformers", "pyarrow", "pandas", "s3fs", "open_clip"
        ):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from ray.scripts.scripts import main
main()
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Run `ray start --head` with a token in a separate home; yield the submitter's environment."""
    home = tmp_path_factory.mktemp("home")
    port, dashboard = free_port(), free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_worker_niceness": "0",
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    subprocess.run(
        [BIN / "ray", "get-auth-token", "--generate"], env=environment, check=True, capture_output=True
    )
    (home / ".ray" / "auth_token").chmod(0o600)
    process = subprocess.Popen(
        [
            BIN / "ray",
            "start",
            "--head",
            "--block",
            "--node-ip-address=127.0.0.1",
            f"--port={port}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={free_port()}",
            f"--ray-client-server-port={free_port()}",
            "--num-cpus=2",
            "--disable-usage-stats",
            '--resources={"decoder_slot": 1}',
            f"--temp-dir=/tmp/rebeca-{port}",
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    yield environment
    # On SIGTERM it would wait half a minute for its processes.
    for started in [*psutil.Process(process.pid).children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            started.kill()
    process.wait(60)
    shutil.rmtree(f"/tmp/rebeca-{port}", ignore_errors=True)


def submit(environment: dict[str, str], *entrypoint: str) -> subprocess.CompletedProcess[str]:
    """From a Python in which nothing but what `ray[default]` brings can be imported."""
    command = [sys.executable, "-S", "-c", THIN_CLIENT, "job", "submit", "--working-dir", ".", *entrypoint]
    return subprocess.run(
        command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=580, check=False
    )


def wait_for_dashboard(environment: dict[str, str]) -> None:
    """Wait until it lists jobs, as it does before it takes one."""
    token = Path(environment["HOME"], ".ray", "auth_token").read_text().strip()
    listing = urllib.request.Request(
        f"{environment['RAY_API_SERVER_ADDRESS']}/api/jobs/", headers={"Authorization": f"Bearer {token}"}
    )
    until = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(listing, timeout=10):
                return
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.2)


def simulate(head: dict[str, str]) -> Path:
    """Simulate twelve users; return the items that they rated, a seventh of all stickers."""
    command = [BIN / "rebeca", "stickers", "simulate", "--users", "12"]
    subprocess.run(command, env=head, check=True, capture_output=True)
    folder = Path(head["HOME"]) / "rebeca-stickers"
    rated = pq.read_table(folder / "interactions.parquet")["item_id"].unique()
    items = pq.read_table(ITEMS)
    pq.write_table(items.filter(pc.is_in(items["item_id"], rated)), folder / "rated.parquet")
    return folder / "rated.parquet"


@pytest.mark.timeout(600)  # two jobs on a new cluster, with embedding and training
def test_a_night_with_its_default_config_and_once_is_enough(head: dict[str, str]) -> None:
    """Submit embed, train, generate and collect for a date; the second time nothing is left to do."""
    wait_for_dashboard(head)
    data = Path(head["HOME"]) / "rebeca-stickers"
    early = submit(head, "jobs/generate_catalog.py")
    assert early.returncode == 1
    assert (
        f"prior {data}/prior: no config.json there; train one with `rebeca train`"
        in early.stdout + early.stderr
    )

    night = [
        "--",
        "jobs/nightly.py",
        "--config",
        "jobs/configs/nightly_stickers.yaml",
        "run_date=2026-03-02",
        f"embed.items={simulate(head)}",
        "train.optimization.max_epochs=1",
        "generate.num_images=1",
        "generate.decoder.num_inference_steps=2",
        # After one epoch on 12 users the prior ignores them, and the gate would refuse the night.
        "generate.gate.max_p_value=null",
    ]
    out = submit(head, *night)
    assert out.returncode == 0, out.stdout + out.stderr
    pointer = json.loads((data / "catalog" / "latest.json").read_text())
    manifest = json.loads((data / "catalog" / pointer["snapshot"] / "manifest.json").read_text())
    assert (manifest["run_date"], manifest["counts"]["new"], manifest["counts"]["users"]) == (
        "2026-03-02",
        12,
        12,
    )
    assert pointer["lease"] is None
    again = submit(head, *night)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "a snapshot of this date is published; nothing to do" in again.stdout
    assert json.loads((data / "catalog" / "latest.json").read_text()) == pointer


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


def test_a_submitter_without_the_token_is_refused(head: dict[str, str], tmp_path: Path) -> None:
    wait_for_dashboard(head)
    out = submit({**head, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}, "jobs/generate_catalog.py")
    assert out.returncode != 0
    assert "401" in out.stdout + out.stderr or "nauthorized" in out.stdout + out.stderr


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
