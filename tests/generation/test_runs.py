"""A run is resumed only if it was made from exactly the same things; otherwise the difference is named."""

import datetime
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.runs import BegunRun, write_begun
from rebeca_ray.config.jobs import GenerateConfig, Resume
from rebeca_ray.config.load import apply_override
from rebeca_ray.config.sections import SamplerSettings
from rebeca_ray.errors import InputError, StorageError, UserError
from rebeca_ray.generation.pipeline import remove_work_on_error
from rebeca_ray.generation.request import input_digests
from rebeca_ray.generation.runs import Description, begin, choose_run, describe_run, difference
from rebeca_ray.storage.failures import user_error
from rebeca_ray.storage.filesystem import delete, exists, join
from rebeca_ray.storage.objects import write_json
from tests.conftest import USERS, write_items, write_request

TODAY, YESTERDAY = datetime.date(2026, 3, 2), datetime.date(2026, 3, 1)
VERSIONS = {"prior": "p" * 8, "decoder": "d" * 8, "code": "1.0"}
BEFORE = "snapshots/run_date=2026-03-01/run_id=before"


@pytest.fixture
def job(tmp_path: Path) -> GenerateConfig:
    """A config whose request and items exist. Nothing else of it is read."""
    return GenerateConfig.model_validate(
        {
            "prior": str(tmp_path / "prior"),
            "decoder": {"model": "owner/decoder"},
            "request": write_request(tmp_path),
            "items": write_items(tmp_path),
            "catalog": str(tmp_path / "catalog"),
        }
    )


def changed(config: GenerateConfig, *overrides: str) -> GenerateConfig:
    values = config.model_dump(mode="json")
    for override in overrides:
        apply_override(values, override)
    return GenerateConfig.model_validate(values)


def described(
    config: GenerateConfig, versions: dict[str, str] = VERSIONS, before: str | None = BEFORE
) -> Description:
    return describe_run(config, versions, before, input_digests(config))


def choose(
    config: GenerateConfig,
    description: Description | None = None,
    *,
    date: datetime.date = TODAY,
    resume: Resume = "auto",
    retry_failed: bool = False,
) -> tuple[str, BegunRun | None]:
    description = description or described(config)
    return choose_run(config, date, description, resume=resume, retry_failed=retry_failed)


def starts_anew(chosen: tuple[str, BegunRun | None]) -> bool:
    return chosen[1] is None and re.fullmatch(r"\d{8}T\d{6}-[0-9a-f]{6}", chosen[0]) is not None


@pytest.mark.parametrize("resume", ["auto", "require"])
def test_a_run_made_from_the_same_things_is_resumed(job: GenerateConfig, resume: Resume) -> None:
    begun = begin(job.catalog, "first", TODAY, described(job))
    assert choose(job, resume=resume) == ("first", begun)
    assert choose(job, resume=resume, retry_failed=True) == ("first", begun)
    assert begun.run_date == "2026-03-02"


def test_resume_never_starts_a_new_run(job: GenerateConfig, caplog: pytest.LogCaptureFixture) -> None:
    begin(job.catalog, "first", TODAY, described(job))
    assert starts_anew(choose(job, resume="never"))
    assert caplog.messages == []


def test_the_latest_of_several_equal_runs_is_resumed(job: GenerateConfig) -> None:
    for run_id, description in (
        ("c-first", described(job)),
        ("a-second", described(job)),
        ("b-other", described(job, before=None)),
    ):
        begun = begin(job.catalog, run_id, TODAY, description)
        begun_at = f"2026-03-02T0{'cab'.index(run_id[0])}:00:00+00:00"
        write_begun(job.catalog, replace(begun, begun_at=begun_at))
    assert choose(job)[0] == "a-second"


@pytest.mark.parametrize(
    ("override", "field", "before", "now"),
    [
        ("num_images=11", "config.num_images", 10, 11),
        ("prior=elsewhere", "config.prior", None, None),
        ("items=null", "config.items", None, None),
        ("sampler.num_inference_steps=7", "config.sampler.num_inference_steps", None, 7),
        ("sampler.batch_size=16", "config.sampler.batch_size", SamplerSettings().batch_size, 16),
        ("selection.diversity=0.5", "config.selection.diversity", 0.15, 0.5),
        ("refresh.on_new_prior=rescore", "config.refresh.on_new_prior", "keep", "rescore"),
        ("layout.num_buckets=2", "config.layout.num_buckets", 1, 2),
        ("layout.items_per_shard=50", "config.layout.items_per_shard", 2_000_000, 50),
        ("decoder.num_inference_steps=4", "config.decoder.num_inference_steps", 20, 4),
        ("decoder.safety.policy=drop", "config.decoder.safety.policy", "regenerate", "drop"),
    ],
)
def test_a_changed_setting_is_named_with_both_values(
    job: GenerateConfig,
    caplog: pytest.LogCaptureFixture,
    override: str,
    field: str,
    before: Any,
    now: Any,
) -> None:
    begin(job.catalog, "first", TODAY, described(job))
    other = changed(job, override)
    name = override.partition("=")[0]
    if name in ("prior", "items"):  # paths
        before, now = getattr(job, name), getattr(other, name)
    assert difference(described(job), described(other)) == f"{field} was {before!r}, is {now!r}"
    reason = f"run first of 2026-03-02 cannot be resumed: {field} was {before!r}, is {now!r}"
    assert starts_anew(choose(other))
    assert caplog.messages == [f"{reason}; a new run starts"]
    for how in ({"resume": "require"}, {"retry_failed": True}):
        message = re.escape(f"catalog {job.catalog}: {reason}; restore that, or start a new run")
        with pytest.raises(InputError, match=message):
            choose(other, **how)  # type: ignore[arg-type]
    assert starts_anew(choose(other, resume="never"))


@pytest.mark.parametrize("name", list(VERSIONS))
def test_another_model_or_version_of_the_code_is_named(job: GenerateConfig, name: str) -> None:
    now = described(job, {**VERSIONS, name: "another"})
    assert difference(described(job), now) == f"version of {name} was {VERSIONS[name]!r}, is 'another'"


@pytest.mark.parametrize("name", ["request", "items"])
def test_another_content_of_a_file_is_named(job: GenerateConfig, name: str) -> None:
    before = described(job)
    pq.write_table(pq.read_table(getattr(job, name)).slice(1), getattr(job, name))
    now = described(job)
    assert (
        difference(before, now)
        == f"content of {name} was {before[f'content of {name}']!r}, is {now[f'content of {name}']!r}"
    )


def test_added_interactions_are_named(job: GenerateConfig, tmp_path: Path) -> None:
    rated = {"user_id": USERS[:1], "item_id": ["real-0"], "rating": pa.array([1.0], pa.float32())}
    pq.write_table(pa.table(rated), tmp_path / "rated.parquet")
    before, path = described(job), str(tmp_path / "rated.parquet")
    field = difference(before, described(changed(job, f"interactions={{path: {path}}}")))
    assert field is not None
    assert re.fullmatch(r"config\.interactions\.\w+ was None, is .*", field)


def test_another_previous_snapshot_is_named(job: GenerateConfig, caplog: pytest.LogCaptureFixture) -> None:
    begin(job.catalog, "first", TODAY, described(job, before=None))
    assert starts_anew(choose(job))
    assert f"cannot be resumed: previous snapshot was None, is {BEFORE!r}; a new run starts" in caplog.text


@pytest.mark.parametrize(
    "override",
    [
        "decoder.num_actors=2",
        "decoder.cpus_per_actor=0.5",
        "decoder.triton.window=3",
        "sampler.num_actors=2",
        "sampler.cpus_per_actor=0.5",
        "layout.images_per_file=4",
        "gate.max_p_value=0.5",
        "limits.max_gpu_hours=2",
        "limits.stall_minutes=5",
        "error_budget=0.5",
        "prices.gpu_hour=2",
        "run_date=2026-03-02",
        "run_id=first",
    ],
)
def test_a_setting_that_does_not_change_the_result_is_ignored(job: GenerateConfig, override: str) -> None:
    begin(job.catalog, "first", TODAY, described(job))
    other = changed(job, override)
    assert other != job
    assert choose(other, resume="require")[0] == "first"


def test_a_run_is_resumed_after_its_catalog_moved(job: GenerateConfig, tmp_path: Path) -> None:
    begin(job.catalog, "first", TODAY, described(job))
    Path(job.catalog).rename(tmp_path / "moved")
    assert choose(changed(job, f"catalog={tmp_path / 'moved'}"))[0] == "first"


@pytest.mark.parametrize("run_id", [None, "first"])
def test_without_an_unfinished_run_none_is_resumed(job: GenerateConfig, run_id: str | None) -> None:
    config = job.model_copy(update={"run_id": run_id})
    for how in ({"resume": "require"}, {"retry_failed": True}):
        with pytest.raises(InputError, match=f"no unfinished run {run_id or 'of 2026-03-02'} to go on with"):
            choose(config, **how)  # type: ignore[arg-type]
    for resume in ("auto", "never"):
        chosen = choose(config, resume=resume)
        assert chosen == ("first", None) if run_id else starts_anew(chosen)


def test_a_run_of_another_date_is_left_alone(job: GenerateConfig, caplog: pytest.LogCaptureFixture) -> None:
    begin(job.catalog, "first", YESTERDAY, described(job))
    assert starts_anew(choose(job))
    assert caplog.messages == []
    with pytest.raises(UserError, match="no unfinished run of 2026-03-02"):
        choose(job, resume="require")


def test_a_named_run_is_resumed_after_midnight_but_not_for_another_date(
    job: GenerateConfig,
) -> None:
    begun = begin(job.catalog, "first", YESTERDAY, described(job))
    assert choose(changed(job, "run_id=first")) == ("first", begun)
    with pytest.raises(
        UserError,
        match=r"run first of 2026-03-01 cannot be resumed: run_date was '2026-03-01', is '2026-03-02'",
    ):
        choose(changed(job, "run_id=first", "run_date=2026-03-02"))


def test_a_named_run_made_from_something_else_is_refused(job: GenerateConfig) -> None:
    begin(job.catalog, "first", TODAY, described(job))
    begin(job.catalog, "second", TODAY, described(changed(job, "num_images=11")))
    with pytest.raises(
        UserError,
        match=r"run first of 2026-03-02 cannot be resumed: config.num_images was 10, is 11; restore that",
    ):
        choose(changed(job, "num_images=11", "run_id=first"))
    with pytest.raises(
        UserError, match="run_id first was begun before; choose another, or let it be resumed"
    ):
        choose(changed(job, "run_id=first"), resume="never")


@pytest.mark.parametrize("date", [TODAY, YESTERDAY])
def test_a_published_run_id_is_refused(job: GenerateConfig, date: datetime.date) -> None:
    write_json({}, join(job.catalog, f"snapshots/run_date={date}/run_id=another/manifest.json"))
    write_json(
        {"run_id": "first"}, join(job.catalog, f"snapshots/run_date={date}/run_id=first/manifest.json")
    )
    for resume in ("auto", "require", "never"):
        with pytest.raises(UserError, match="run_id first was used before; choose another, or give none"):
            choose(changed(job, "run_id=first"), resume=resume)


def test_a_work_folder_without_its_first_file_is_no_run(job: GenerateConfig) -> None:
    """A run that is killed before it records what it is made from has done nothing yet."""
    begin(job.catalog, "first", TODAY, described(job))
    delete(join(job.catalog, "work/run_id=first/run.json"))
    write_json({}, join(job.catalog, "work/run_id=first/plan.json"))
    assert starts_anew(choose(job))


scalar = st.integers() | st.text(max_size=5)


@given(description=st.dictionaries(st.text(min_size=1, max_size=5), scalar, min_size=1), data=st.data())
def test_any_single_field_that_differs_is_named(description: Description, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(description)))
    other = data.draw(scalar.filter(lambda value: value != description[name]))
    assert difference(description, dict(reversed(description.items()))) is None
    change = f"{name} was {description[name]!r}, is {other!r}"
    assert difference(description, {**description, name: other}) == change
    shorter = {key: value for key, value in description.items() if key != name}
    assert difference(description, shorter) == f"{name} was {description[name]!r}, is None"
    assert difference(shorter, description) == f"{name} was None, is {description[name]!r}"


def test_bad_input_removes_the_work_of_a_new_run_and_a_lost_store_keeps_it(tmp_path: Path) -> None:
    run = Run(root=str(tmp_path), run_date="2026-03-02", run_id="run", fencing_token=1)

    def end_with(
        error: Exception, *, resumed: bool = False, planned: bool = False
    ) -> tuple[BaseException | None, bool]:
        """Raise an error in a run; what reaches the caller, and whether the run can be resumed."""
        raised: BaseException | None = None
        begin(run.root, run.run_id, datetime.date(2026, 3, 2), {})
        if planned:
            write_json({"parts": []}, run.plan_marker)
        try:
            with hold_lease(run.root, "run", 60) as lease, remove_work_on_error(run, lease, resumed=resumed):
                raise error
        except Exception as caught:
            raised = caught
        resumable = exists(run.work)
        delete(run.work)
        return raised, resumable

    raised, resumable = end_with(StorageError("s3://bucket/a: cannot be written (time-out)"))
    assert (user_error(raised).exit_code, resumable) == (75, True)  # type: ignore[union-attr]
    assert str(raised).endswith("cannot be written (time-out). Start run run again: it resumes")
    assert end_with(InputError("a rating is null")) == (ANY, False)
    assert end_with(InputError("the prior was replaced"), planned=True) == (ANY, True)
    assert end_with(InputError("a rating is null"), resumed=True) == (ANY, True)
    assert end_with(RuntimeError("a bug")) == (ANY, True)
