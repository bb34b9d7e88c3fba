"""Which run is gone on with: one begun from the very same things, and a difference is named."""

import datetime
import re
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
from rebeca_ray.config.jobs import GenerateConfig, Resume
from rebeca_ray.config.load import apply_override
from rebeca_ray.config.sections import SamplerSettings
from rebeca_ray.errors import StorageError, UserError
from rebeca_ray.generation.pipeline import forgotten_if_refused
from rebeca_ray.generation.runs import begin, choose_run, describe_run, difference
from rebeca_ray.storage.failures import user_error
from rebeca_ray.storage.filesystem import delete, exists, join
from rebeca_ray.storage.objects import write_json
from tests.conftest import USERS, write_items, write_request

TODAY, YESTERDAY = datetime.date(2026, 3, 2), datetime.date(2026, 3, 1)
VERSIONS = {"prior": "p" * 8, "decoder": "d" * 8, "code": "1.0"}
BEFORE = "snapshots/run_date=2026-03-01/run_id=before"


@pytest.fixture
def asked(tmp_path: Path) -> GenerateConfig:
    """A config whose request and items exist; nothing else of it is looked at."""
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
) -> dict[str, Any]:
    return describe_run(config, versions, before)


def choose(
    config: GenerateConfig,
    told: dict[str, Any] | None = None,
    *,
    date: datetime.date = TODAY,
    resume: Resume = "auto",
    retry_failed: bool = False,
) -> tuple[str, dict[str, Any] | None]:
    return choose_run(config, date, told or described(config), resume=resume, retry_failed=retry_failed)


def starts_anew(chosen: tuple[str, dict[str, Any] | None]) -> bool:
    return chosen[1] is None and re.fullmatch(r"\d{8}T\d{6}-[0-9a-f]{6}", chosen[0]) is not None


@pytest.mark.parametrize("resume", ["auto", "require"])
def test_the_same_things_are_gone_on_with(asked: GenerateConfig, resume: Resume) -> None:
    begun = begin(asked.catalog, "first", TODAY, described(asked))
    assert choose(asked, resume=resume) == ("first", begun)
    assert choose(asked, resume=resume, retry_failed=True) == ("first", begun)
    assert begun["run_date"] == "2026-03-02"


def test_never_starts_anew(asked: GenerateConfig, capsys: pytest.CaptureFixture[str]) -> None:
    begin(asked.catalog, "first", TODAY, described(asked))
    assert starts_anew(choose(asked, resume="never"))
    assert capsys.readouterr().out == ""


def test_of_several_the_latest_that_is_the_same(asked: GenerateConfig) -> None:
    for run_id, told in (
        ("c-first", described(asked)),
        ("a-second", described(asked)),
        ("b-other", described(asked, before=None)),
    ):
        begun = begin(asked.catalog, run_id, TODAY, told)
        write_json(
            {**begun, "begun_at": f"2026-03-02T0{'cab'.index(run_id[0])}:00:00+00:00"},
            join(asked.catalog, f"work/run_id={run_id}/run.json"),
        )
    assert choose(asked)[0] == "a-second"


@pytest.mark.parametrize(
    ("override", "field", "before", "now"),
    [
        ("num_images=11", "config.num_images", 10, 11),
        ("prior=elsewhere", "config.prior", None, None),
        ("items=null", "config.items", None, None),
        ("sampler.num_inference_steps=7", "config.sampler.num_inference_steps", None, 7),
        ("sampler.batch_size=16", "config.sampler.batch_size", SamplerSettings().batch_size, 16),
        ("selection.diversity=0.5", "config.selection.diversity", 0.3, 0.5),
        ("refresh.on_new_prior=rescore", "config.refresh.on_new_prior", "keep", "rescore"),
        ("layout.num_buckets=2", "config.layout.num_buckets", 1, 2),
        ("layout.items_per_unit=50", "config.layout.items_per_unit", 2_000_000, 50),
        ("decoder.num_inference_steps=4", "config.decoder.num_inference_steps", 20, 4),
        ("decoder.safety.policy=drop", "config.decoder.safety.policy", "regenerate", "drop"),
    ],
)
def test_a_changed_setting_is_named_with_both_values(
    asked: GenerateConfig,
    capsys: pytest.CaptureFixture[str],
    override: str,
    field: str,
    before: Any,
    now: Any,
) -> None:
    begin(asked.catalog, "first", TODAY, described(asked))
    other = changed(asked, override)
    name = override.partition("=")[0]
    if name in ("prior", "items"):  # paths
        before, now = getattr(asked, name), getattr(other, name)
    assert difference(described(asked), described(other)) == f"{field} was {before!r}, is {now!r}"
    told = f"run first of 2026-03-02 cannot be resumed: {field} was {before!r}, is {now!r}"
    assert starts_anew(choose(other))
    assert capsys.readouterr().out == f"{told}; a new run starts\n"
    for how in ({"resume": "require"}, {"retry_failed": True}):
        with pytest.raises(
            UserError, match=re.escape(f"root {asked.catalog}: {told}; restore that, or start a new run")
        ) as caught:
            choose(other, **how)  # type: ignore[arg-type]
        assert caught.value.exit_code == 2
    assert starts_anew(choose(other, resume="never"))


@pytest.mark.parametrize("name", list(VERSIONS))
def test_another_model_or_program_is_named(asked: GenerateConfig, name: str) -> None:
    now = described(asked, {**VERSIONS, name: "another"})
    assert difference(described(asked), now) == f"version of {name} was {VERSIONS[name]!r}, is 'another'"


@pytest.mark.parametrize("name", ["request", "items"])
def test_another_content_of_a_file_is_named(asked: GenerateConfig, name: str) -> None:
    before = described(asked)
    pq.write_table(pq.read_table(getattr(asked, name)).slice(1), getattr(asked, name))
    now = described(asked)
    assert (
        difference(before, now)
        == f"content of {name} was {before[f'content of {name}']!r}, is {now[f'content of {name}']!r}"
    )


def test_interactions_that_come_in_are_named(asked: GenerateConfig, tmp_path: Path) -> None:
    rated = {"user_id": USERS[:1], "item_id": ["real-0"], "rating": pa.array([1.0], pa.float32())}
    pq.write_table(pa.table(rated), tmp_path / "rated.parquet")
    before, path = described(asked), str(tmp_path / "rated.parquet")
    found = difference(before, described(changed(asked, f"interactions={{path: {path}}}")))
    assert found is not None
    assert re.fullmatch(r"config\.interactions\.\w+ was None, is .*", found)


def test_another_snapshot_before_is_named(asked: GenerateConfig, capsys: pytest.CaptureFixture[str]) -> None:
    begin(asked.catalog, "first", TODAY, described(asked, before=None))
    assert starts_anew(choose(asked))
    assert (
        f"cannot be resumed: snapshot before was None, is {BEFORE!r}; a new run starts"
        in capsys.readouterr().out
    )


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
def test_what_changes_nothing_that_is_made_does_not_matter(asked: GenerateConfig, override: str) -> None:
    begin(asked.catalog, "first", TODAY, described(asked))
    other = changed(asked, override)
    assert other != asked
    assert choose(other, resume="require")[0] == "first"


def test_a_catalog_that_moved_is_gone_on_with(asked: GenerateConfig, tmp_path: Path) -> None:
    begin(asked.catalog, "first", TODAY, described(asked))
    Path(asked.catalog).rename(tmp_path / "moved")
    assert choose(changed(asked, f"catalog={tmp_path / 'moved'}"))[0] == "first"


@pytest.mark.parametrize("run_id", [None, "first"])
def test_nothing_to_go_on_with(asked: GenerateConfig, run_id: str | None) -> None:
    config = asked.model_copy(update={"run_id": run_id})
    for how in ({"resume": "require"}, {"retry_failed": True}):
        with pytest.raises(
            UserError, match=f"no unfinished run {run_id or 'of 2026-03-02'} to go on with"
        ) as caught:
            choose(config, **how)  # type: ignore[arg-type]
        assert caught.value.exit_code == 2
    for resume in ("auto", "never"):
        chosen = choose(config, resume=resume)
        assert chosen == ("first", None) if run_id else starts_anew(chosen)


def test_a_run_of_another_date_is_left_alone(
    asked: GenerateConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(asked.catalog, "first", YESTERDAY, described(asked))
    assert starts_anew(choose(asked))
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="no unfinished run of 2026-03-02"):
        choose(asked, resume="require")


def test_a_run_that_is_named_is_gone_on_with_after_midnight_but_not_for_another_date(
    asked: GenerateConfig,
) -> None:
    begun = begin(asked.catalog, "first", YESTERDAY, described(asked))
    assert choose(changed(asked, "run_id=first")) == ("first", begun)
    with pytest.raises(
        UserError,
        match=r"run first of 2026-03-01 cannot be resumed: run_date was '2026-03-01', is '2026-03-02'",
    ):
        choose(changed(asked, "run_id=first", "run_date=2026-03-02"))


def test_a_run_that_is_named_but_was_begun_from_something_else_is_refused(asked: GenerateConfig) -> None:
    begin(asked.catalog, "first", TODAY, described(asked))
    begin(asked.catalog, "second", TODAY, described(changed(asked, "num_images=11")))
    with pytest.raises(
        UserError,
        match=r"run first of 2026-03-02 cannot be resumed: config.num_images was 10, is 11; restore that",
    ):
        choose(changed(asked, "num_images=11", "run_id=first"))
    with pytest.raises(
        UserError, match="run_id first was begun before; choose another, or let it be resumed"
    ):
        choose(changed(asked, "run_id=first"), resume="never")


@pytest.mark.parametrize("date", [TODAY, YESTERDAY])
def test_a_run_id_that_was_published_is_refused(asked: GenerateConfig, date: datetime.date) -> None:
    write_json({}, join(asked.catalog, f"snapshots/run_date={date}/run_id=another/manifest.json"))
    write_json(
        {"run_id": "first"}, join(asked.catalog, f"snapshots/run_date={date}/run_id=first/manifest.json")
    )
    for resume in ("auto", "require", "never"):
        with pytest.raises(UserError, match="run_id first was used before; choose another, or give none"):
            choose(changed(asked, "run_id=first"), resume=resume)


def test_a_work_folder_without_its_first_file_is_no_run(asked: GenerateConfig) -> None:
    """A run is killed before it notes what it is made from: it has done nothing yet."""
    begin(asked.catalog, "first", TODAY, described(asked))
    delete(join(asked.catalog, "work/run_id=first/run.json"))
    write_json({}, join(asked.catalog, "work/run_id=first/plan.json"))
    assert starts_anew(choose(asked))


scalar = st.integers() | st.text(max_size=5)


@given(told=st.dictionaries(st.text(min_size=1, max_size=5), scalar, min_size=1), data=st.data())
def test_any_single_field_that_differs_is_found_and_named(told: dict[str, Any], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(told)))
    other = data.draw(scalar.filter(lambda value: value != told[name]))
    assert difference(told, dict(reversed(told.items()))) is None
    assert difference(told, {**told, name: other}) == f"{name} was {told[name]!r}, is {other!r}"
    missing = {key: value for key, value in told.items() if key != name}
    assert difference(told, missing) == f"{name} was {told[name]!r}, is None"
    assert difference(missing, told) == f"{name} was None, is {told[name]!r}"


def test_bad_input_leaves_nothing_of_a_new_run_and_a_lost_store_everything(tmp_path: Path) -> None:
    run = Run(root=str(tmp_path), run_date="2026-03-02", run_id="run", epoch=1)

    def end_with(
        error: Exception, *, resumed: bool = False, planned: bool = False
    ) -> tuple[BaseException, bool]:
        """What a run ends with, and whether it can be gone on with."""
        begin(run.root, run.run_id, datetime.date(2026, 3, 2), {})
        if planned:
            write_json({"parts": []}, f"{run.work}/plan.json")
        try:
            with hold_lease(run.root, "run", 60) as lease, forgotten_if_refused(run, lease, resumed=resumed):
                raise error
        except Exception as ended:
            found = ended
        there = exists(run.work)
        delete(run.work)
        return found, there

    found, there = end_with(StorageError("s3://bucket/a: cannot be written (time-out)"))
    assert (user_error(found).exit_code, there) == (75, True)  # type: ignore[union-attr]
    assert str(found).endswith("cannot be written (time-out). Start run run again: it resumes")
    assert end_with(UserError("a rating is null")) == (ANY, False)
    assert end_with(UserError("the prior was replaced"), planned=True) == (ANY, True)
    assert end_with(UserError("a rating is null"), resumed=True) == (ANY, True)
    assert end_with(RuntimeError("a bug")) == (ANY, True)
