"""Every count has its own evidence: a loss anywhere stops the run, and is never told as another outcome."""

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray.catalog.read import published, read_catalog
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import LayoutSettings, RefreshSettings
from rebeca_ray.decoder.interface import DecodedImage
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.errors import InputError, ResumableError
from rebeca_ray.generation import bucket as bucket_module
from rebeca_ray.generation import plan as plan_module
from rebeca_ray.generation import render as render_module
from rebeca_ray.generation.decisions import published_users
from rebeca_ray.generation.estimate import forecast
from rebeca_ray.generation.pipeline import MAX_FILE_NUMBER, check_clock, check_file_numbers
from rebeca_ray.generation.progress import Progress
from rebeca_ray.prior.selector import Selector
from rebeca_ray.storage.objects import read_json, write_json
from tests.conftest import USERS, D, context_of, decide, prior_users, run_of, snapshot_of, write_tiny_prior
from tests.generation.test_estimate import MEASURED

MONDAY, TUESDAY = datetime.date(2026, 3, 2), datetime.date(2026, 3, 3)


@pytest.fixture
def cut(config: GenerateConfig) -> GenerateConfig:
    return config.model_copy(
        update={"layout": LayoutSettings(num_buckets=2, images_per_file=4), "run_date": MONDAY}
    )


def test_a_plan_without_the_rows_of_some_users_stops_the_run(
    cut: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file of decisions is not read, as if a listing had missed it."""
    whole = plan_module.run_graph
    with monkeypatch.context() as patch:
        patch.setattr(plan_module, "run_graph", lambda files, *rest, **more: whole(files[1:], *rest, **more))
        with pytest.raises(
            ResumableError, match=r"the plan has \d+ new and 0 rescored items, expected 16 and 0"
        ):
            snapshot_of(cut)
    assert published(cut.catalog) is None
    assert snapshot_of(cut).counts.new == 16  # resumed


def test_records_that_a_listing_misses_lose_and_repeat_no_item(
    cut: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = render_module.list_files
    monkeypatch.setattr(render_module, "list_files", lambda *arguments: whole(*arguments)[1:])
    counts = snapshot_of(cut).counts
    assert (counts.requested, counts.new) == (16, 16)
    snapshot = read_catalog(cut.catalog)
    assert snapshot.table("images").num_rows == 16


def test_a_planned_item_that_vanishes_is_not_filtered(
    cut: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bucket_module.read_recorded

    def without_last(root: str, file: Any, columns: Any = None) -> pa.Table:
        table = whole(root, file, columns)
        return table.slice(0, table.num_rows - 1) if columns else table

    monkeypatch.setattr(bucket_module, "read_recorded", without_last)
    with pytest.raises(ResumableError, match="the plan has 2 items of a user, expected 3"):
        snapshot_of(cut)


def test_a_carried_item_that_vanishes_is_not_filtered(
    cut: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot_of(cut)
    whole = bucket_module.Bucket.kept_items
    monkeypatch.setattr(
        bucket_module.Bucket, "kept_items", lambda *arguments, **more: whole(*arguments, **more).slice(1)
    )
    message = r"\d+ items requested in bucket 0, \d+ accounted for \(.*\); nothing is published"
    with pytest.raises(ResumableError, match=message):
        snapshot_of(cut.model_copy(update={"run_date": TUESDAY}))


def test_filtered_items_stay_filtered_night_after_night(
    cut: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rendered once and not fit to be shown, of users and of the pool; then carried, then by reference."""
    users = [*USERS, "nobody", "stranger"]
    pq.write_table(pa.table({"user_id": users}), cut.request)
    whole = LocalDecoder.decode

    def decode(self: LocalDecoder, rows: Any) -> list[DecodedImage]:
        images = whole(self, rows)
        return [replace(images[0], image=None, thumbnail=None, width=None, height=None), *images[1:]]

    with monkeypatch.context() as patch:
        patch.setattr(LocalDecoder, "decode", decode)
        first = snapshot_of(cut).counts
    assert 0 < first.filtered < first.requested == 27
    for day in range(1, 4):
        manifest = snapshot_of(cut.model_copy(update={"run_date": MONDAY + datetime.timedelta(days=day)}))
        assert (manifest.counts.filtered, manifest.counts.population) == (first.filtered, first.population)
        assert manifest.counts.carried == first.new
    assert manifest.carried_buckets == 2


def test_a_night_that_only_rescores_counts_and_forecasts_its_rows(
    cut: GenerateConfig, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = write_tiny_prior(tmp_path, users=prior_users(USERS), selector=Selector(D, 4))
    config = cut.model_copy(update={"prior": uri, "refresh": RefreshSettings(on_new_prior="rescore")})
    snapshot_of(config)
    (manifest,) = Path(config.catalog).rglob("manifest.json")
    write_json({**(read_json(str(manifest)) or {}), "measured": MEASURED}, str(manifest))
    write_tiny_prior(tmp_path, users=prior_users(USERS), selector=Selector(D, 4))
    tuesday = config.model_copy(update={"run_date": TUESDAY})
    context = context_of(tuesday)
    decisions = decide(tuesday, run_of(tuesday))
    assert (decisions.planned_items, decisions.rescored_items) == (0, 16)
    cost = forecast(context, decisions)
    assert (cost.plan_seconds, cost.render_seconds) == (14.0, 0.0)
    totals = []
    follow = Progress.follow

    def noting(self: Progress, name: str, batches: Any, *, total: int, actors: int) -> Any:
        totals.append((name, total))
        return follow(self, name, batches, total=total, actors=actors)

    monkeypatch.setattr(Progress, "follow", noting)
    assert snapshot_of(tuesday).counts.carried == 16
    assert totals == [("plan", 16)]


def test_file_numbers_beyond_the_largest_are_refused_before_rendering(cut: GenerateConfig) -> None:
    snapshot_of(cut)
    context = context_of(cut)
    assert context.previous is not None
    decisions = decide(cut, run_of(cut))
    needed = decisions.planned_items + 2 * 64
    for next_file, refused in ((MAX_FILE_NUMBER - needed, False), (MAX_FILE_NUMBER - needed + 1, True)):
        manifest = context.previous.manifest.model_copy(update={"next_file": next_file})
        late = replace(context, previous=replace(context.previous, manifest=manifest))
        if not refused:
            check_file_numbers(late, decisions)
            continue
        with pytest.raises(InputError, match=r"numbers end at 2,147,483,647: generate into another root"):
            check_file_numbers(late, decisions)


def test_a_snapshot_of_a_clock_that_was_ahead_changes_nobody_and_gets_tonights_date(
    cut: GenerateConfig,
) -> None:
    config = cut.model_copy(update={"refresh": RefreshSettings(rotation=0.25)})
    for _ in range(2):
        snapshot_of(config.model_copy(update={"run_date": datetime.date(2029, 1, 1)}))
    counts = snapshot_of(config).counts
    assert (counts.new, counts.carried) == (0, 16)
    users = published_users(read_catalog(config.catalog).table("users"))
    assert {row.planned_on for row in users.values()} == {MONDAY}


def test_a_previous_snapshot_from_the_future_is_told(
    cut: GenerateConfig, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot_of(cut)
    context = context_of(cut)
    assert context.previous is not None
    check_clock(context)
    assert caplog.messages == []
    manifest = context.previous.manifest.model_copy(update={"created_at": "2999-01-01T00:00:00+00:00"})
    check_clock(replace(context, previous=replace(context.previous, manifest=manifest)))
    assert "the previous snapshot was made at 2999-01-01T00:00:00+00:00, and it is 20" in caplog.text
