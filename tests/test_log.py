"""The package's log: one line per record, with level, time and run id, for people or as JSON."""

import json
import logging
import pickle
import re
import subprocess
import sys

import pytest

from rebeca_ray import log

MODULE = logging.getLogger("rebeca_ray.generation.example")


def test_a_line_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure()
    MODULE.info("%s of %s", 3, 4)
    log.set_run_id("20260302T000000-abcdef")
    MODULE.warning("half of it")
    MODULE.debug("details")
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO: 3 of 4", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING run 20260302T000000-abcdef: half of it", second)


def test_a_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("debug", json_lines=True)
    log.set_run_id("20260302T000000-abcdef")
    MODULE.debug("“two”\nlines")
    try:
        _ = 1 / 0
    except ZeroDivisionError:
        MODULE.exception("broken")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
    assert first == {
        "level": "debug",
        "run_id": "20260302T000000-abcdef",
        "logger": MODULE.name,
        "message": "“two”\nlines",
    }
    assert second["level"] == "error"
    assert "ZeroDivisionError" in second["traceback"]


def test_a_second_configuration_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure()
    log.configure("error")
    MODULE.warning("not shown")
    MODULE.error("shown once")
    assert capsys.readouterr().err.count("\n") == 1


def test_a_worker_logs_as_the_process_that_sent_its_work(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("error", json_lines=True)
    log.set_run_id("the-run")
    sent = pickle.loads(pickle.dumps(log.current_settings()))
    log.configure()
    log.set_run_id(None)
    log.use(sent)
    MODULE.warning("not shown")
    MODULE.error("shown")
    line = json.loads(capsys.readouterr().err)
    assert (line["message"], line["run_id"]) == ("shown", "the-run")


@pytest.mark.parametrize(
    ("given", "of_config", "level"),
    [(None, None, "info"), (None, "error", "error"), ("debug", "error", "debug"), ("debug", None, "debug")],
)
def test_the_level_of_the_command_line_wins_over_the_configs(
    given: log.Level | None, of_config: log.Level | None, level: log.Level
) -> None:
    log.configure(given, json_lines=True)
    log.set_level_of_config(of_config)
    assert log.current_settings() == log.LogSettings(level, json_lines=True)
    assert logging.getLogger(log.PACKAGE).level == getattr(logging, level.upper())


def test_disabled_loggers_are_enabled_again(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure()
    MODULE.disabled = True  # as `logging.config.dictConfig` does by default
    MODULE.warning("lost")
    log.enable()
    MODULE.warning("shown")
    err = capsys.readouterr().err
    assert "lost" not in err
    assert "WARNING: shown" in err


def test_lines_show_once_where_a_library_has_set_up_the_root_logger(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log.configure()
    handler = logging.StreamHandler(sys.stderr)
    logging.root.addHandler(handler)
    try:
        MODULE.warning("once")
    finally:
        logging.root.removeHandler(handler)
    assert capsys.readouterr().err.count("once") == 1


def test_the_log_needs_the_standard_library_only() -> None:
    others = "('rich', 'typer', 'ray', 'numpy')"
    code = f"import sys, rebeca_ray.log; print([name for name in {others} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_nothing_but_the_command_line_prints() -> None:
    """Ruff finds every `print` of the package; those into a file or in cli/ are fine."""
    from tests.conftest import REPO

    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "T201", "--output-format"]
    report = subprocess.run([*command, "json", REPO / "rebeca_ray"], capture_output=True, text=True)
    lines = [(line["filename"], line["location"]["row"]) for line in json.loads(report.stdout)]
    outside = [(path, row) for path, row in lines if "/cli/" not in path]
    for path, row in outside:
        with open(path) as file:
            assert "file=" in file.read().splitlines()[row - 1], (path, row)
