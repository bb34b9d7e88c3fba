"""The summary of an ended attempt: written however it ends, true to the manifest, and never in the way."""

import json
import logging
import re
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from rebeca_ray import termination
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.read import open_snapshot, read_catalog
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.load import parse_config
from rebeca_ray.config.sections import GateSettings, LimitSettings
from rebeca_ray.config.telemetry import ReportSettings
from rebeca_ray.errors import (
    ErrorBudgetExceededError,
    InputError,
    LeaseHeldError,
    QualityGateError,
    StorageError,
    UserError,
)
from rebeca_ray.generation import pipeline
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.telemetry import attempt as attempts
from rebeca_ray.telemetry.attempt import (
    ending,
    events_of,
    failure_of,
    failures_of,
    generate_attempt,
    lateness,
)
from rebeca_ray.telemetry.summary import Outcome, Summary
from tests.conftest import NO_GATE, REPO, assembled, prepare, snapshot_of


def summaries(root: str) -> list[Summary]:
    """Return the summaries in a catalog, the oldest first. Times in names are whole seconds."""
    files = Path(root, "reports").glob("*.json")
    summaries = [Summary.model_validate_json(file.read_text()) for file in files]
    return sorted(summaries, key=lambda summary: (summary.began_at, summary.seconds))


def summary_of(config: GenerateConfig, **changes: object) -> Summary:
    """Run one attempt in this process, however it ends, and return its summary."""
    before = {summary.attempt_id for summary in summaries(config.catalog)}
    with suppress(UserError, KeyboardInterrupt):
        generate_catalog(config.model_copy(update=changes), in_process=True)
    (new,) = [summary for summary in summaries(config.catalog) if summary.attempt_id not in before]
    return new


def test_attempts_that_publish_find_nothing_to_do_are_refused_held_or_stopped(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rebeca_ray")
    first = summary_of(config, gate=NO_GATE)
    manifest = read_catalog(config.catalog).manifest
    assert (first.outcome, first.exit_code, first.error, first.events) == ("published", 0, None, ["success"])
    assert (first.run_id, first.counts, first.actual) == (manifest.run_id, manifest.counts, manifest.actual)
    assert first.manifest == f"{config.catalog}/{manifest.path}/manifest.json"
    assert Path(first.manifest).is_file()
    assert (first.images, first.previous_run_id, first.parent_id) == (16, None, None)
    assert list(first.versions) == ["code", "decoder", "prior"]
    assert set(first.stages) == {"histories", "decide", "plan", "test", "render", "assemble"}
    assert "generate: published after " in caplog.text
    assert f"16 images at {first.images_per_second:.2f} per second; summary -> " in caplog.text

    again = summary_of(config, gate=NO_GATE)
    assert (again.outcome, again.exit_code, again.events) == ("nothing_to_do", 0, [])
    assert (again.stages, again.run_id, again.late_seconds) == ({}, manifest.run_id, None)

    refused = summary_of(config, gate=GateSettings(min_items=1000, max_p_value=None), num_images=2)
    assert (refused.outcome, refused.exit_code, refused.events) == ("refused", 4, ["refused"])
    assert refused.previous_run_id == manifest.run_id
    assert refused.gate is not None
    assert refused.error is not None
    assert refused.gate.refused[0] in refused.error.message
    assert "rebeca catalog publish" in refused.error.message  # the remedy
    assert refused.counts is not None
    assert refused.counts.requested == 12
    assert read_catalog(config.catalog).run_id == manifest.run_id

    with hold_lease(config.catalog, "another", 0.4):
        held = summary_of(config)
    assert (held.outcome, held.exit_code, held.events, held.run_id) == ("held", 5, [], None)
    assert held.error is not None
    assert held.error.type == "LeaseHeldError"

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "render_all", interrupted)
    stopped = summary_of(config, gate=NO_GATE, num_images=1)
    assert (stopped.outcome, stopped.exit_code, stopped.events) == ("stopped", 130, [])
    assert (stopped.images, stopped.counts) == (None, None)
    assert "plan" in stopped.stages


def test_a_summary_that_cannot_be_written_is_one_warning(
    config: GenerateConfig, caplog: pytest.LogCaptureFixture
) -> None:
    Path(config.catalog).mkdir()
    Path(config.catalog, "reports").write_text("in the way")
    manifest = snapshot_of(config)
    assert read_catalog(config.catalog).run_id == manifest.run_id
    lines = [record.getMessage() for record in caplog.records if "reports" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith(f"writing {config.catalog}/reports/")


def test_a_job_that_makes_no_catalog_writes_to_its_second_file_alone(
    config: GenerateConfig, tmp_path: Path
) -> None:
    file = tmp_path / "last.json"
    changes = {"request": "/no/such", "report": ReportSettings(summary_file=str(file))}
    with pytest.raises(InputError):
        generate_catalog(config.model_copy(update=changes), in_process=True)
    summary = Summary.model_validate_json(file.read_text())
    assert (summary.outcome, summary.exit_code, summary.events) == ("failed", 2, ["failure"])
    assert summary.error is not None
    assert summary.error.message.startswith("request /no/such: ")
    assert not Path(config.catalog).exists()


def test_failed_items_are_counted_by_stage_and_error(config: GenerateConfig) -> None:
    manifest = assembled(config, prepare(config, break_first=True), error_budget=0.5)
    assert manifest.counts.failed == 1
    ((reason, number),) = failures_of(config.catalog, manifest).items()
    assert number == 1
    assert reason.startswith("render: ")


def test_failed_items_that_cannot_be_read_cost_no_other_report(
    config: GenerateConfig, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = assembled(config, prepare(config, break_first=True), error_budget=0.5)
    for file in open_snapshot(config.catalog, manifest.path).uris("errors"):
        Path(file).unlink()
    attempt = attempts.generate_attempt(config, date(2026, 3, 2))
    attempt.manifest = manifest
    summary = attempts.summarize(attempt, None)
    assert (summary.outcome, summary.counts, summary.failures) == ("published", manifest.counts, {})
    assert "counting the failed items failed (" in caplog.text


@pytest.mark.parametrize(
    ("error", "outcome", "code", "events"),
    [
        (QualityGateError("a: b; c"), "refused", 4, ["refused"]),
        (LeaseHeldError("a: b; c"), "held", 5, []),
        (StorageError("a: b; c"), "failed", 75, ["failure"]),
        (ErrorBudgetExceededError("a: b; c"), "failed", 3, ["failure"]),
        (ZeroDivisionError("by zero"), "failed", 1, ["failure"]),
        (KeyboardInterrupt(), "stopped", 130, []),
    ],
)
def test_every_error_has_an_outcome_a_code_and_events(
    error: BaseException, outcome: str, code: int, events: list[str]
) -> None:
    assert ending(error, changed=True) == (outcome, code)
    assert events_of(Outcome(outcome), code, late=False) == events
    failure = failure_of(error)
    assert failure is not None
    assert failure.message.splitlines() == [failure.message]


def test_sigterm_is_a_failure_and_ctrl_c_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    termination.sigterm.set()
    try:
        assert ending(KeyboardInterrupt(), changed=True) == ("stopped", 143)
    finally:
        termination.sigterm.clear()
    assert events_of(Outcome.STOPPED, 143, late=False) == ["failure"]


def test_a_snapshot_after_publish_by_is_late(config: GenerateConfig) -> None:
    attempt = generate_attempt(config, date(2026, 3, 2))
    attempt.publish_by = datetime(2026, 3, 2, 5, tzinfo=UTC)
    assert lateness(attempt, datetime(2026, 3, 2, 4, 59, tzinfo=UTC)) == 0
    assert lateness(attempt, datetime(2026, 3, 2, 5, 1, tzinfo=UTC)) == 60

    yesterday = datetime.now(UTC) - timedelta(days=1)
    limits = LimitSettings(publish_by=f"{yesterday + timedelta(minutes=2):%H:%M}")
    changed = config.model_copy(update={"gate": NO_GATE, "limits": limits})
    generate_catalog(changed, in_process=True, since=yesterday)
    (late,) = summaries(config.catalog)
    assert late.publish_by is not None
    due = datetime.fromisoformat(late.publish_by)
    assert timedelta() < due - yesterday <= timedelta(minutes=2)
    assert late.late_seconds is not None
    assert abs((datetime.fromisoformat(late.ended_at) - due).total_seconds() - late.late_seconds) < 1
    assert late.events == ["success", "late"]


def test_the_examples_of_the_page_are_valid() -> None:
    page = (REPO / "infra" / "docs" / "operations.md").read_text()
    examples = re.findall(r"```yaml\n(report:\n.*?)```", page, re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        parse_config(ReportSettings, yaml.safe_load(example)["report"], where="page")


def test_the_published_schema_is_that_of_the_model() -> None:
    page = REPO / "infra" / "docs" / "summary.schema.json"
    assert json.loads(page.read_text()) == Summary.model_json_schema(mode="serialization")
