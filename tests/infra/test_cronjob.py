"""The three ways to start nights: their dates, their commands, and the script of the CronJob with a stub."""

import datetime
import os
import re
import subprocess
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from ray.dashboard.modules.job.cli import logs, status, submit

from tests.conftest import REPO
from tests.infra.kustomize import one
from tests.infra.manifests import at, check_entrypoint, copies, entrypoints


def test_entrypoints_are_jobs_in_the_image() -> None:
    assert copies() == {"/opt/rebeca/jobs": "jobs"}
    (words,) = entrypoints(one("base", "RayJob"))
    check_entrypoint(words)
    (words,) = entrypoints(one("base", "RayCronJob"))
    check_entrypoint(words)
    with pytest.raises(StopIteration):
        check_entrypoint(["python", "/opt/jobs/nightly.py", "--config", "/etc/rebeca/nightly.yaml"])
    assert (REPO / "jobs" / "nightly.py").is_file()


def test_every_attempt_runs_the_date_of_its_night() -> None:
    """A RayJob has its date in its command. RayCronJob and CronJob end all attempts on the same day."""
    assert re.search(r" run_date=\d{4}-\d\d-\d\d$", at(one("base", "RayJob"), "/spec/entrypoint"))
    nightly = one("base", "RayCronJob")["spec"]
    minute, hour = map(int, nightly["schedule"].split()[:2])
    attempts = 1 + nightly["jobTemplate"]["backoffLimit"]
    assert nightly["timeZone"] == "Etc/UTC"
    assert hour * 3600 + minute * 60 + attempts * nightly["jobTemplate"]["activeDeadlineSeconds"] < 24 * 3600
    plain = one("base", "CronJob")["spec"]
    assert (plain["concurrencyPolicy"], plain["schedule"], plain["timeZone"]) == (
        "Forbid",
        "0 1 * * *",
        "Etc/UTC",
    )
    assert ZoneInfo(plain["timeZone"]).key == "Etc/UTC"
    assert plain["jobTemplate"]["spec"]["activeDeadlineSeconds"] < 24 * 3600


def test_one_night_and_every_night_differ_in_their_command_alone() -> None:
    once, nightly = one("base", "RayJob")["spec"], one("base", "RayCronJob")["spec"]["jobTemplate"]
    command, _, date = once["entrypoint"].rpartition(" ")
    assert nightly == once | {"entrypoint": command}
    assert date.startswith("run_date=")


STUB = """#!/bin/bash
# Replaces `ray` and `sleep`, and records its arguments in $CALLS. $ENDS has one word per attempt: its end.
[ "$(basename "$0")" = sleep ] && exit 0
printf '%s\\0' "$@" >> "$CALLS"; printf '\\n' >> "$CALLS"
for last; do :; done
[ "$2" = status ] || exit 0
end=$(cut -d' ' -f"${last##*-}" <<< "$ENDS")
case $end in
  0) echo "INFO cli.py:76 -- Job '$last' succeeded" ;;
  lost) exit 1 ;;
  *) echo "INFO cli.py:89 -- Status message: Job entrypoint command failed with exit code $end, last" ;;
esac
"""


def run_submitter(
    folder: Path, ends: str, job_name: str = "rebeca-nightly-29496060"
) -> tuple[int, list[list[str]]]:
    """Run the script of the CronJob with a stub for `ray`. Return its exit code and the calls of the stub."""
    for name in ("ray", "sleep"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    environment = {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "CALLS": str(calls),
        "ENDS": ends,
        "JOB_NAME": job_name,
    }
    submitter = at(one("base", "CronJob"), "/spec/jobTemplate/spec/template/spec/containers/0")
    script = [*submitter["command"], *submitter["args"]]
    ran = subprocess.run(script, env=environment, capture_output=True, check=False, timeout=60)
    return ran.returncode, [line.split("\0")[:-1] for line in calls.read_text().splitlines()]


@pytest.mark.parametrize(
    ("ends", "code", "attempts"),
    [
        ("0", 0, 1),
        ("75 0", 0, 2),
        ("1 5 75", 75, 3),
        ("2", 2, 1),
        ("75 3", 3, 2),
        ("4", 4, 1),
        ("lost lost lost", 1, 3),
    ],
)
def test_the_submitter_retries_and_ends_with_the_exit_code_of_the_job(
    tmp_path: Path, ends: str, code: int, attempts: int
) -> None:
    exit_code, calls = run_submitter(tmp_path, ends)
    assert exit_code == code
    assert [call[1] for call in calls] == ["submit", "logs", "status"] * attempts
    for call in calls:
        parser = {"submit": submit, "logs": logs, "status": status}[call[1]]
        parser.make_context(call[1], call[2:])  # raises if Ray does not accept the options
    submitted = [submit.make_context("submit", call[2:]).params for call in calls if call[1] == "submit"]
    assert [options["submission_id"] for options in submitted] == [
        f"rebeca-nightly-29496060-{number}" for number in range(1, attempts + 1)
    ]
    for options in submitted:
        check_entrypoint(list(options["entrypoint"]))
        assert options["entrypoint"][-1] == "run_date=2026-01-30"
        assert options["no_wait"] is True


@pytest.mark.parametrize("name", ["rebeca-again", "rebeca-again-1", "rebeca-20260302"])
def test_a_job_that_a_person_makes_runs_the_night_of_today(tmp_path: Path, name: str) -> None:
    code, calls = run_submitter(tmp_path, "0", name)
    assert code == 0
    submitted = submit.make_context("submit", calls[0][2:]).params
    assert submitted["submission_id"] == f"{name}-1"
    assert submitted["entrypoint"][-1] == f"run_date={datetime.datetime.now(datetime.UTC).date()}"


def test_permanent_failures_end_the_kubernetes_job() -> None:
    rule = at(one("base", "CronJob"), "/spec/jobTemplate/spec/podFailurePolicy/rules/0")
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "submitter", "operator": "In", "values": [2, 3, 4]},
    }
