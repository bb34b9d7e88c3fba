"""The nightly job: dates due, training due, `{run_date}` in paths, and nights that fail."""

import datetime
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rebeca_ray import nightly
from rebeca_ray.catalog.gc import Garbage
from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.manifest import Manifest
from rebeca_ray.catalog.pointer import change_pointer
from rebeca_ray.catalog.versions import replace_version
from rebeca_ray.config.jobs import GenerateConfig, NightlyConfig, dated
from rebeca_ray.config.load import load_config
from rebeca_ray.errors import InputError, LeaseHeldError, QualityGateError, ResumableError
from rebeca_ray.generation.pipeline import Generated
from rebeca_ray.nightly import dates_due, run_nightly, training_is_due
from rebeca_ray.prior.checkpoint import load_prior, publish_prior
from rebeca_ray.training import train as training
from tests.conftest import REPO, publish

DATES = st.dates(datetime.date(2026, 1, 1), datetime.date(2027, 1, 1))


@given(last=st.none() | DATES, tonight=DATES, catch_up=st.integers(0, 5))
def test_the_dates_due_are_the_latest_missed_ones_and_tonight(
    last: datetime.date | None, tonight: datetime.date, catch_up: int
) -> None:
    due = dates_due(last, tonight, catch_up)
    assert due == sorted(set(due))
    if last is None:
        assert due == [tonight]
    elif last >= tonight:
        assert due == []
    else:
        assert due[-1] == tonight
        assert len(due) == min((tonight - last).days, catch_up + 1)
        assert (due[-1] - due[0]).days == len(due) - 1


def test_training_is_due_when_the_prior_is_missing_or_old_or_does_not_load(
    tmp_path: Path, tiny_prior: str, caplog: pytest.LogCaptureFixture
) -> None:
    date = datetime.date(2026, 3, 10)
    out = str(tmp_path / "trained")
    assert training_is_due(out, date, 7)
    assert training_is_due(tiny_prior, date, 7)  # a copy has no date
    with replace_version(out, "prior", "train") as version:
        publish_prior(load_prior(tiny_prior), version, datetime.date(2026, 3, 4))
    assert not training_is_due(out, date, 7)
    assert training_is_due(out, date, 6)
    weights = next(Path(out).rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert training_is_due(out, date, 7)
    assert "model.safetensors is not the file config.json describes" in caplog.text
    (weights.parent / "config.json").unlink()
    assert training_is_due(out, date, 7)


def test_the_date_is_filled_into_paths_and_sections_come_from_files(tmp_path: Path) -> None:
    settings = yaml.safe_load((REPO / "jobs" / "configs" / "generate_stickers.yaml").read_text())
    settings["request"] = "s3://bucket/requests/{run_date}.parquet"
    (tmp_path / "generate.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "night.yaml").write_text("generate: generate.yaml\ncatch_up: 0\n")
    config = load_config(NightlyConfig, tmp_path / "night.yaml", ["generate.num_images=2"])
    assert config.generate.num_images == 2
    filled = dated(config.generate, datetime.date(2026, 3, 1))
    assert filled.request == "s3://bucket/requests/2026-03-01.parquet"
    assert filled.model_copy(update={"request": config.generate.request}) == config.generate
    (tmp_path / "night.yaml").write_text("generate: nothing.yaml\n")
    with pytest.raises(InputError, match=rf"config {tmp_path}/nothing.yaml: cannot be read"):
        load_config(NightlyConfig, tmp_path / "night.yaml")


class Nights:
    """Replace the stages of a night: a published one moves the pointer, some dates fail."""

    def __init__(self, failing: dict[str, Exception]) -> None:
        self.failing, self.dates = failing, list[str]()

    def __call__(self, config: GenerateConfig, since: datetime.datetime) -> Generated:
        self.since = since
        date = config.date().isoformat()
        if error := self.failing.get(date):
            raise error
        self.dates.append(date)
        publish(config.catalog, Run(root=config.catalog, run_date=date, run_id=date, fencing_token=1))
        return Generated(manifest=Manifest.model_construct(run_date=date), seconds={})


@pytest.fixture
def config(config: GenerateConfig) -> NightlyConfig:
    return NightlyConfig(generate=config, run_date=datetime.date(2026, 3, 5), catch_up=2)


def stub(monkeypatch: pytest.MonkeyPatch, **failing: Exception) -> Nights:
    nights = Nights({f"2026-03-{day.removeprefix('day')}": error for day, error in failing.items()})
    monkeypatch.setattr(nightly, "generate_catalog", nights)
    nothing = Garbage(manifests=[], work=[], files=[], folders=[], records=[], kept=[], runs=[])
    monkeypatch.setattr(nightly, "collect", lambda root, **_: nothing)
    return nights


def test_missed_dates_are_backfilled_in_order_and_done_once(
    config: NightlyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    nights = stub(monkeypatch)
    publish(
        config.generate.catalog,
        Run(root=config.generate.catalog, run_date="2026-03-01", run_id="first", fencing_token=1),
    )
    published_nights, garbage = run_nightly(config)
    assert (
        nights.dates
        == [night.run_date.isoformat() for night in published_nights]
        == ["2026-03-03", "2026-03-04", "2026-03-05"]
    )
    assert garbage is not None
    assert run_nightly(config) == ([], None)


def test_a_missed_date_that_fails_costs_no_later_one_but_is_raised(
    config: NightlyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    nights = stub(monkeypatch, day03=QualityGateError("too few users"))
    publish(
        config.generate.catalog,
        Run(root=config.generate.catalog, run_date="2026-03-01", run_id="first", fencing_token=1),
    )
    with pytest.raises(QualityGateError, match="too few users"):
        run_nightly(config)
    assert nights.dates == ["2026-03-04", "2026-03-05"]


def test_a_night_that_fails_is_an_error_and_an_unexpected_error_stops_at_once(
    config: NightlyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(monkeypatch, day05=InputError("no request"))
    with pytest.raises(InputError, match="no request"):
        run_nightly(config)
    nights = stub(monkeypatch, day04=RuntimeError("a bug"))
    publish(
        config.generate.catalog,
        Run(root=config.generate.catalog, run_date="2026-03-03", run_id="first", fencing_token=1),
    )
    with pytest.raises(RuntimeError, match="a bug"):
        run_nightly(config)
    assert nights.dates == []


def test_a_training_that_fails_does_not_cost_the_catalog(
    config: NightlyConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nights = stub(monkeypatch)

    def diverges(*_: object, **__: object) -> None:
        raise InputError("training diverged")

    monkeypatch.setattr(training, "train_prior", diverges)
    train = load_config(NightlyConfig, REPO / "jobs" / "configs" / "nightly_stickers.yaml").train
    assert train is not None
    with_training = config.model_copy(
        update={"train": train.model_copy(update={"out": config.generate.prior})}
    )
    with pytest.raises(InputError, match="training diverged"):
        run_nightly(with_training)
    assert nights.dates == ["2026-03-05"]
    missing = with_training.model_copy(
        update={
            "run_date": datetime.date(2026, 3, 6),
            "train": train.model_copy(update={"out": str(tmp_path / "none")}),
        }
    )
    with pytest.raises(InputError, match="training diverged"):
        run_nightly(missing)
    assert nights.dates == ["2026-03-05"]  # without a prior nothing can be drawn


def test_the_work_of_old_trainings_goes_with_the_garbage(
    config: NightlyConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub(monkeypatch)
    monkeypatch.setattr(training, "train_prior", lambda *_, **__: None)
    train = load_config(NightlyConfig, REPO / "jobs" / "configs" / "nightly_stickers.yaml").train
    assert train is not None
    storage = tmp_path / "storage"
    now = datetime.datetime.now().timestamp()
    ages = {
        "histories-0123456789ab/histories.json": 9,
        "histories-0123456789ac/histories.json": 7,
        "prior-0123456789ab/checkpoint_1/state.pt": 9,
        "prior-0123456789ac/checkpoint_1/state.pt": 9,
        "prior-0123456789ac/checkpoint_2/state.pt": 7,
        "prior-0123456789ad/notes.txt": 9,  # not ours
    }
    for name, days in ages.items():
        (storage / name).parent.mkdir(parents=True, exist_ok=True)
        (storage / name).write_text("{}")
        os.utime(storage / name, (now, now - 86_400 * days))
    train = train.model_copy(update={"out": config.generate.prior, "storage": str(storage)})
    config = config.model_copy(update={"train": train})
    run_nightly(config)
    assert len(list(storage.iterdir())) == 5  # by default, they stay
    for day, kept in ((6, 8), (7, 6)):
        date = datetime.date(2026, 3, day)
        run_nightly(config.model_copy(update={"run_date": date, "keep_training_days": kept}))
        names = sorted(path.name for path in storage.iterdir())
        assert names == [
            *(["histories-0123456789ac", "prior-0123456789ac"] if kept == 8 else []),
            "prior-0123456789ad",
        ]


def test_a_training_of_another_process_ends_the_night(
    config: NightlyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    nights = stub(monkeypatch)

    def is_held(*_: object, **__: object) -> None:
        raise LeaseHeldError("prior: run train is at work on it")

    monkeypatch.setattr(training, "train_prior", is_held)
    train = load_config(NightlyConfig, REPO / "jobs" / "configs" / "nightly_stickers.yaml").train
    assert train is not None
    train = train.model_copy(update={"out": config.generate.prior})
    with pytest.raises(LeaseHeldError, match="is at work on it"):
        run_nightly(config.model_copy(update={"train": train}))
    assert nights.dates == []


def test_the_date_of_a_night_is_read_once(config: NightlyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock passes midnight with every reading."""
    nights = stub(monkeypatch)
    readings = iter(datetime.datetime(2026, 3, day, 23, 59, tzinfo=datetime.UTC) for day in range(5, 20))

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
            return next(readings)

    monkeypatch.setattr(datetime, "datetime", Clock)
    run_nightly(config.model_copy(update={"run_date": None}))
    assert nights.dates == ["2026-03-05"]
    assert nights.since.day == 5


def test_a_resumable_night_is_never_skipped(config: NightlyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    nights = stub(monkeypatch, day04=ResumableError("storage went away"))
    publish(
        config.generate.catalog,
        Run(root=config.generate.catalog, run_date="2026-03-03", run_id="first", fencing_token=1),
    )
    with pytest.raises(ResumableError, match="storage went away"):
        run_nightly(config)
    assert nights.dates == []  # a later date would keep this one from ever being resumed


def test_a_date_that_was_rolled_back_is_not_made_again(
    config: NightlyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    nights = stub(monkeypatch)
    root = config.generate.catalog
    for day in ("04", "05"):
        publish(root, Run(root=root, run_date=f"2026-03-{day}", run_id=f"of {day}", fencing_token=1))
    withdrawn = ({"run_id": "of 05", "run_date": "2026-03-05"},)
    change_pointer(
        root, lambda pointer: replace(pointer, run_id="of 04", run_date="2026-03-04", withdrawn=withdrawn)
    )
    assert run_nightly(config) == ([], None)
    later = config.model_copy(update={"run_date": datetime.date(2026, 3, 6)})
    assert len(run_nightly(later)[0]) == 1
    assert nights.dates == ["2026-03-06"]


def test_a_night_before_the_published_one_is_refused(
    config: NightlyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    nights = stub(monkeypatch)
    publish(
        config.generate.catalog,
        Run(root=config.generate.catalog, run_date="2026-03-06", run_id="later", fencing_token=1),
    )
    with pytest.raises(
        InputError,
        match="run_date 2026-03-05 is before 2026-03-06, which was published; a night only goes forward",
    ):
        run_nightly(config)
    assert nights.dates == []
