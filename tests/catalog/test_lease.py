"""One writer at a time, with real processes, on disk and on a real S3 server."""

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from rebeca_ray.catalog import lease as module
from rebeca_ray.catalog.lease import Lease, hold_lease
from rebeca_ray.catalog.pointer import Pointer, change_pointer, read_pointer
from rebeca_ray.errors import LeaseHeldError
from tests.catalog.conftest import Start, begin, heard, tell
from tests.conftest import without_id

SECONDS = 2.0
AT_WORK = "is at work on it; wait for it, or stop it and start again"


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the exit code and stderr of a process."""
    _, stderr = process.communicate(timeout=30)
    return process.returncode, stderr


def await_beat(root: str) -> None:
    """Return just after a beat. A process that stops then holds no lock of a catalog on disk."""
    lease = read_pointer(root)[0].lease
    while read_pointer(root)[0].lease == lease:
        time.sleep(0.02)
    time.sleep(0.1)


def stop(process: subprocess.Popen[str], root: str) -> None:
    await_beat(root)
    process.send_signal(signal.SIGSTOP)


def test_one_of_four_simultaneous_runs_holds_the_lease(root: str, start: Start) -> None:
    processes = {name: start(root, name, "wait", SECONDS) for name in ("a", "b", "c", "d")}
    begin(*processes.values())
    said = {name: heard(process) for name, process in processes.items()}
    assert sorted(said.values()) == ["", "", "", "holds 1"]
    winner = next(name for name, line in said.items() if line)
    losers = [process for name, process in processes.items() if name != winner]
    line = f"error: catalog {root}: run {winner} (fencing token 1) {AT_WORK}\n"
    assert [ended(process) for process in losers] == [(5, line)] * 3

    tell(processes[winner])
    assert ended(processes[winner]) == (0, "")
    published = Pointer(fencing_token=1, run_id=winner, run_date="2026-01-01", snapshot=f"of {winner}")
    catalog_id = read_pointer(root)[0].catalog_id
    assert catalog_id is not None
    assert without_id(root) == published
    for token in (2, 3):
        with hold_lease(root, "next", SECONDS) as lease:
            assert lease.fencing_token == token
    assert read_pointer(root)[0] == replace(published, fencing_token=3, catalog_id=catalog_id)


def test_a_holder_that_is_stopped_too_long_is_replaced_and_ends_on_waking(root: str, start: Start) -> None:
    background = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]  # as a shell starts a job with `&`
    stale = {doing: start(f"{root}/{doing}", "stale", doing, SECONDS) for doing in ("busy", "wait")}
    if not root.startswith("s3"):  # the kind of sleep does not depend on the store
        stale["asleep"] = start(f"{root}/asleep", "stale", "asleep", SECONDS)
        stale["background"] = start(f"{root}/background", "stale", "asleep", SECONDS, by=background)
    patient = start(f"{root}/patient", "patient", "wait", 8)
    begin(*stale.values(), patient)
    assert {heard(process) for process in [*stale.values(), patient]} == {"holds 1"}
    for doing, process in stale.items():
        stop(process, f"{root}/{doing}")
    patient.send_signal(signal.SIGSTOP)

    with ThreadPoolExecutor(4) as pool:
        heirs = dict(
            zip(stale, pool.map(lambda doing: Lease(f"{root}/{doing}", "heir", 60), stale), strict=True)
        )
    for process in [*stale.values(), patient]:
        tell(process)  # a waiting process publishes as soon as it wakes
        process.send_signal(signal.SIGCONT)
    for doing, process in stale.items():
        line = (
            f"error: catalog {root}/{doing}: run stale (fencing token 1) was silent for more than 2 s "
            "and lost its lease to run heir; it publishes nothing, start it again to resume\n"
        )
        assert ended(process) == (5, line)
        pointer = read_pointer(f"{root}/{doing}")[0]
        assert (pointer.fencing_token, pointer.snapshot) == (2, None)
        heirs[doing].publish(run_id="heir", run_date="2026-01-01", snapshot="of heir", forced=True)
        heirs[doing].release()
        published = Pointer(
            fencing_token=2, run_id="heir", run_date="2026-01-01", snapshot="of heir", forced=True
        )
        assert without_id(f"{root}/{doing}") == published

    assert ended(patient) == (0, "")  # it was silent for less than its time
    assert read_pointer(f"{root}/patient")[0].snapshot == "of patient"


def test_one_run_replaces_a_killed_holder_after_its_time_whatever_their_clocks(
    root: str, start: Start
) -> None:
    days = 0 if root.startswith("s3") else 1  # an S3 server refuses a client with a wrong clock
    holder = start(root, "holder", "asleep", SECONDS, days)
    heirs = {name: start(root, name, "wait", SECONDS, wrong) for name, wrong in (("a", -days), ("b", 0))}
    begin(holder)
    assert heard(holder) == "holds 1"
    for _ in range(2):  # the holder lives, so every other run is refused
        with pytest.raises(
            LeaseHeldError, match=rf"^catalog {root}: run holder \(fencing token 1\) {AT_WORK}$"
        ):
            Lease(root, "early", SECONDS)

    await_beat(root)
    holder.kill()
    holder.wait()
    killed = time.monotonic()
    begin(*heirs.values())
    said = {name: heard(process) for name, process in heirs.items()}
    assert time.monotonic() - killed >= SECONDS
    assert sorted(said.values()) == ["", "holds 2"]
    winner, loser = sorted(heirs, key=lambda name: said[name], reverse=True)
    assert ended(heirs[loser]) == (5, f"error: catalog {root}: run {winner} (fencing token 2) {AT_WORK}\n")
    tell(heirs[winner])
    assert ended(heirs[winner]) == (0, "")


def test_the_lease_reads_no_clock_that_somebody_can_set() -> None:
    source = Path(module.__file__).read_text()
    assert "time.monotonic()" in source
    assert "time.time" not in source
    assert "datetime" not in source


def test_another_attempt_at_the_same_run_is_another_holder(root: str) -> None:
    with hold_lease(root, "run", SECONDS) as lease:
        with pytest.raises(LeaseHeldError, match=rf"run run \(fencing token 1\) {AT_WORK}"):
            Lease(root, "run", SECONDS)
        lease.check()
        lease.run_id = "renamed"  # its name is known only later; the beat writes it
        await_beat(root)
        await_beat(root)  # one may have been under way
        assert (read_pointer(root)[0].lease or {})["run_id"] == "renamed"
        lease.check()


def test_the_lease_is_released_however_the_block_ends(root: str) -> None:
    before = signal.getsignal(signal.SIGINT)
    with hold_lease(root, "orderly", 60):
        assert signal.getsignal(signal.SIGINT) != before
    assert read_pointer(root)[0].lease is None
    with pytest.raises(RuntimeError, match=r"^of its own$"), hold_lease(root, "failing", 60):
        raise RuntimeError("of its own")
    assert read_pointer(root)[0].lease is None
    with pytest.raises(SystemExit), hold_lease(root, "leaving", 60):
        raise SystemExit(3)
    assert without_id(root) == Pointer(fencing_token=3)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_lease_of_another_holder_is_not_released(root: str) -> None:
    theirs = {"run_id": "b", "fencing_token": 9, "holder": "b", "beat": 0, "seconds": 60}
    with hold_lease(root, "a", 60):
        change_pointer(root, lambda pointer: replace(pointer, fencing_token=9, lease=theirs))
    assert without_id(root) == Pointer(fencing_token=9, lease=theirs)


def test_an_interrupt_by_the_user_is_no_lost_lease(tmp_path: Path, start: Start) -> None:
    root = str(tmp_path)
    process = start(root, "a", "asleep", SECONDS)
    begin(process)
    assert heard(process) == "holds 1"
    process.send_signal(signal.SIGINT)
    code, stderr = ended(process)
    assert code == -signal.SIGINT
    assert stderr.splitlines()[-1] == "KeyboardInterrupt"
    assert "lost" not in stderr
    assert without_id(root) == Pointer(fencing_token=1)


def test_an_interrupt_for_a_loss_has_no_effect_after_the_end(tmp_path: Path) -> None:
    """The beat may notice the loss, and send the interrupt, while the ended block waits for the beat."""
    with hold_lease(str(tmp_path), "a", 60) as lease:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("not interrupted")
        lease.lost = LeaseHeldError("lost")
        lease.released.set()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)  # another thread may take the signal, and this one hears of it later
    assert (read_pointer(str(tmp_path))[0].lease or {})["run_id"] == "a"  # a lost lease is not released


def test_a_loss_is_raised_although_the_block_ended_by_another_error(tmp_path: Path) -> None:
    def fail() -> None:
        with hold_lease(str(tmp_path), "a", 60) as lease:
            lease.lost = LeaseHeldError("lost")
            raise OSError("a consequence of the loss")

    with pytest.raises(LeaseHeldError, match=r"^lost$"):
        fail()
