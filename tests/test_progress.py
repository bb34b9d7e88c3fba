"""Progress: a bar below the log on a terminal, and elsewhere a line of the log at intervals."""

import logging
import re
import sys
from collections.abc import Iterable
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from rebeca_ray import log, progress
from rebeca_ray.config.jobs import SampleConfig
from rebeca_ray.halves import sample
from rebeca_ray.progress import Counted, counting

MODULE = logging.getLogger("rebeca_ray.example")
CONTROL = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]")


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: self.seconds))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make standard error a terminal of 120 columns, in the test itself: before it, pytest puts its back."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, value in {"TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    return terminal


def test_a_bar_stays_below_the_lines_of_the_log(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = on_terminal(monkeypatch)
    log.configure()
    with counting("render", 1000) as counted:
        clock.seconds = 2.0
        counted.add(400, failed=1)
        MODULE.warning("a line of the log")
        print("a worker's line", file=sys.stderr)
        print("a result")
    text = terminal.getvalue()
    screen = [CONTROL.sub("", line.split("\x1b[2K")[-1]).rstrip() for line in text.split("\n")]
    bar = "render 400 of 1,000, 1 failed, 200.0 per second, 0:00:02 elapsed, ETA 0:00:03 ━━━━━━━━"
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING: a line of the log", screen[0])
    assert screen[1] == "a worker's line"
    assert screen[2].startswith(bar)
    assert screen[3:] == [""]
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is back
    assert capsys.readouterr().out == "a result\n"  # it goes elsewhere


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_stopped_stage_leaves_its_last_bar(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    terminal = on_terminal(monkeypatch)
    log.configure()
    with pytest.raises(stop), counting("plan", 3):
        raise stop
    assert sys.stderr is terminal
    assert CONTROL.sub("", terminal.getvalue().split("\x1b[2K")[-1]).startswith(
        "plan 0 of 3, 0:00:00 elapsed ━"
    )


@pytest.mark.parametrize(("level", "json_lines"), [("info", True), ("warning", False)])
def test_json_and_quiet_logs_have_no_bar(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, level: log.Level, json_lines: bool
) -> None:
    terminal = on_terminal(monkeypatch)
    log.configure(level, json_lines=json_lines)
    with counting("plan", 3) as counted:
        counted.add(3)
    assert terminal.getvalue() == ""


def test_elsewhere_a_line_shows_at_intervals_and_at_the_end(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, progress.log.name)
    with counting("plan", 100) as counted:
        for _ in range(5):
            clock.seconds += 9.0
            counted.add(18)
    assert caplog.messages == [
        "plan: 54 of 100, 2.0 per second, 0:00:27 elapsed, ETA 0:00:23",
        "plan: 90 of 100, 2.0 per second, 0:00:45 elapsed, ETA 0:00:05",
    ]


def test_short_work_writes_no_line(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, progress.log.name)
    with counting("plan", 2) as counted:
        assert list(counted.tables([])) == []
        clock.seconds = 19.0
        counted.add(2)
    assert caplog.messages == []


def test_a_closed_stage_ends_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt beside a generator leaves it waiting, with its bar."""
    terminal = on_terminal(monkeypatch)
    log.configure()

    def interrupted(tables: Iterable[pa.Table], *_: object, **__: object) -> None:
        next(iter(tables))
        raise KeyboardInterrupt

    sampler: Any = SimpleNamespace(config=SimpleNamespace(num_images=1), histories=None, schema=None)
    users = pa.table({"user_id": ["ann", "ben"]})
    monkeypatch.setattr(sample, "require_new_parquet", lambda _: None)
    monkeypatch.setattr(sample, "open_sampler", lambda _: (sampler, users))
    monkeypatch.setattr(sample, "sample_batches", lambda *_: (users.slice(row, 1) for row in range(2)))
    monkeypatch.setattr(sample, "write_tables", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        sample.sample_embeddings(SampleConfig(prior="prior", out="out.parquet"))
    assert caught.tb is not None  # it keeps the frames, and with them the generator
    assert sys.stderr is terminal
    assert terminal.getvalue().endswith("\n\x1b[?25h")


def test_the_time_to_go_is_never_negative(clock: Clock) -> None:
    counted = Counted("plan", 10)
    clock.seconds = 60.0
    counted.reach(12)
    assert counted.figures() == "12 of 10, 0.2 per second, 0:01:00 elapsed, ETA 0:00:00"
