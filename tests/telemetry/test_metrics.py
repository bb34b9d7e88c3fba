"""Metrics have bounded labels and the manifest's values. Without Ray there are none, and none fails a run."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.errors import (
    ErrorBudgetExceededError,
    InputError,
    LeaseHeldError,
    QualityGateError,
    ResumableError,
    StorageError,
)
from rebeca_ray.telemetry import metrics, recording
from rebeca_ray.telemetry.calls import recorded
from rebeca_ray.telemetry.metrics import Command, Metric, Reason, Stage
from tests.conftest import REPO, snapshot_of

Values = dict[tuple[str, ...], float]


class Recorded:
    """The values of each metric by its words, as Ray gets them."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def instrument(self, metric: Metric) -> Any:
        values = self.values.setdefault(metric.name, Counter())

        def add(value: float, tags: dict[str, str]) -> None:
            assert tuple(tags) == metric.keys
            values[tuple(tags.values())] += value

        def put(value: float, tags: dict[str, str]) -> None:
            assert tuple(tags) == metric.keys
            values[tuple(tags.values())] = value

        return SimpleNamespace(inc=add, observe=add, set=put)

    def of(self, metric: Metric) -> Values:
        return dict(self.values.get(metric.name, {}))


@pytest.fixture
def ray_gets(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Record as if Ray ran in this process."""
    record = Recorded()
    monkeypatch.setattr(recording, "is_recording", lambda: True)
    monkeypatch.setattr(recording, "instrument", record.instrument)
    monkeypatch.setattr(recording, "latest", {})
    monkeypatch.setattr(recording, "start_refreshing", lambda: None)
    return record


def test_names_and_labels_are_bounded() -> None:
    names = [metric.name for metric in metrics.METRICS]
    assert len(set(names)) == len(names) == 27
    for metric in metrics.METRICS:
        assert metric.name.startswith("rebeca_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.meaning.endswith(".")
        assert bool(metric.bounds) == (metric.kind == "histogram")
        series = 1
        for label in metric.labels:
            series *= len(label)
        assert series <= 27, metric.name


def test_a_word_that_is_not_of_the_enum_is_not_recorded(ray_gets: Recorded) -> None:
    metrics.ROWS.record(1, "user-7")
    metrics.ROWS.record(1)
    metrics.ROWS.record(2, "plan")
    assert ray_gets.of(metrics.ROWS) == {("plan",): 2}


def test_without_ray_nothing_is_recorded_and_ray_is_not_imported() -> None:
    script = (
        "import sys, threading; from rebeca_ray.telemetry import metrics; "
        "metrics.ROWS.record(1, 'plan'); metrics.USERS.record(1); "
        "print('ray' in sys.modules, threading.active_count())"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False 1"


def test_a_night_records_the_counts_of_its_manifest(config: GenerateConfig, ray_gets: Recorded) -> None:
    first = snapshot_of(config)
    assert ray_gets.of(metrics.ROWS) == {("plan",): 16, ("render",): 16}
    manifest = snapshot_of(config.model_copy(update={"num_images": 2}))
    counts = manifest.counts
    assert ray_gets.of(metrics.ITEMS) == {
        (outcome,): getattr(counts, outcome)
        for outcome in ("new", "carried", "population", "failed", "filtered", "deferred")
    }
    assert ray_gets.of(metrics.REQUESTED) == {(): counts.requested}
    assert ray_gets.of(metrics.USERS) == {(): counts.users}
    assert ray_gets.of(metrics.STALE_USERS) == {(): counts.stale_users}
    created = datetime.fromisoformat(manifest.created_at).timestamp()
    assert ray_gets.of(metrics.PUBLISHED) == {(): created}
    assert ray_gets.of(metrics.ENDED) == {("generate", "success"): 2}
    assert ray_gets.of(metrics.ACTIVE)["generate",] == 0
    assert ray_gets.of(metrics.ACTORS) == {("plan",): 0, ("render",): 0}
    stages = Counter[str]()
    for measured in (first.measured.stages, manifest.measured.stages):
        stages.update({name: stage.seconds for name, stage in measured.items()})
    assert ray_gets.of(metrics.ROWS)[("render",)] == 16 + counts.new
    seconds = ray_gets.of(metrics.STAGE_SECONDS)
    assert {stage for (stage,) in seconds} == set(stages)
    assert seconds[("render",)] == pytest.approx(stages["render"], abs=0.01)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (InputError("x"), Reason.INPUT),
        (ErrorBudgetExceededError("x"), Reason.ERROR_BUDGET),
        (QualityGateError("x"), Reason.GATE),
        (LeaseHeldError("x"), Reason.LEASE),
        (StorageError("x"), Reason.STORAGE),
        (ResumableError("x"), Reason.RESUMABLE),
        (OSError(28, "No space left on device"), Reason.STORAGE),
        (KeyboardInterrupt(), Reason.STOPPED),
        (ZeroDivisionError(), Reason.UNEXPECTED),
    ],
)
def test_an_end_has_a_reason(error: BaseException, reason: Reason, ray_gets: Recorded) -> None:
    with pytest.raises(type(error)), metrics.running(Command.TRAIN):
        raise error
    assert ray_gets.of(metrics.ENDED) == {("train", reason): 1}


def test_no_failure_of_ray_fails_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("the agent is gone")

    monkeypatch.setattr(recording, "is_recording", lambda: True)
    monkeypatch.setattr(recording, "instrument", fail)
    metrics.ROWS.record(1, "plan")
    monkeypatch.setattr(recording, "is_recording", fail)
    metrics.ROWS.record(1, "plan")


class Halve:
    def __init__(self, divisor: int) -> None:
        self.divisor = divisor

    def __call__(self, batch: pa.Table) -> pa.Table:
        return batch.slice(0, batch.num_rows // self.divisor)


def test_the_calls_of_an_actor_are_recorded(
    ray_gets: Recorded, monkeypatch: pytest.MonkeyPatch, tick: Callable[[], float]
) -> None:
    monkeypatch.setattr("rebeca_ray.telemetry.calls.time.perf_counter", tick)
    work = recorded(Halve, Stage.RENDER)
    assert work.__name__ == "Halve"
    actor = work(2)
    for rows in (4, 8):
        assert actor(pa.table({"number": range(rows)})).num_rows == rows // 2
    assert ray_gets.of(metrics.CALL_ROWS) == {("render",): 2 + 4}
    assert ray_gets.of(metrics.CALL_SECONDS) == {("render",): 2}  # each call: one tick
    assert ray_gets.of(metrics.WAIT_SECONDS) == {("render",): 2}  # one tick before each


@pytest.fixture
def tick() -> Callable[[], float]:
    """Return a clock that moves one second at each look."""
    ticks = iter(range(100))
    return lambda: float(next(ticks))


def test_the_page_has_each_metric_and_each_word() -> None:
    page = (REPO / "infra" / "docs" / "monitoring.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `rebeca_")]
    assert rows == [
        f"| `{metric.name}` | {metric.kind} | {quoted(metric.keys)} | {metric.meaning} |"
        for metric in metrics.METRICS
    ]
    labels = {label.__name__.lower(): label for metric in metrics.METRICS for label in metric.labels}
    for name, label in labels.items():
        assert f"| `{name}` | {quoted(label)} |" in page


def quoted(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)
