"""Failed items, and items that time ran out for: nobody loses any, the next attempt or night renders them."""

import datetime
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from rebeca_ray import schemas
from rebeca_ray.catalog.manifest import Manifest, Measured, StageFigures
from rebeca_ray.catalog.read import Snapshot, open_snapshot, published, read_catalog
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import LayoutSettings, LimitSettings
from rebeca_ray.errors import ErrorBudgetExceededError, ResumableError
from rebeca_ray.generation import estimate
from rebeca_ray.generation import render as render_module
from rebeca_ray.generation.context import RunContext
from rebeca_ray.generation.decisions import Decisions
from rebeca_ray.generation.estimate import deadline_of
from rebeca_ray.generation.progress import Progress
from rebeca_ray.generation.render import (
    Rendered,
    RenderImages,
    ShardMarker,
    read_records,
    render_all,
)
from tests.conftest import (
    USERS,
    Prepared,
    assembled,
    context_of,
    decide,
    planned_items,
    prepare,
    publish,
    render_rows,
    run_of,
    snapshot_of,
    write_plan,
)

MONDAY, TUESDAY, WEDNESDAY, THURSDAY = (datetime.date(2026, 3, day) for day in (2, 3, 4, 5))
OUTCOMES = ("new", "carried", "population", "failed", "filtered", "deferred")


class RenderActors:
    """Makes render actors that note the items they render. Each loses its rows after the first `limit`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int | None = None) -> None:
        self.limit = limit
        self.item_ids: list[str] = []
        monkeypatch.setattr(render_module, "RenderImages", self.make)

    def make(self, *arguments: Any) -> Callable[[pa.Table], pa.Table]:
        actor, remaining = RenderImages(*arguments), self.limit

        def render(batch: pa.Table) -> pa.Table:
            nonlocal remaining
            if remaining is not None:
                batch = batch.slice(0, remaining)
                remaining -= batch.num_rows
            self.item_ids += batch["item_id"].to_pylist()
            return actor(batch)

        return render


def on(date: datetime.date, config: GenerateConfig, **layout: int) -> GenerateConfig:
    update = {"run_date": date, "layout": LayoutSettings(**layout)} if layout else {"run_date": date}
    return config.model_copy(update=update)


def render(
    context: RunContext,
    decisions: Decisions,
    *,
    deadline: float | None = None,
    retry_failed: bool = False,
) -> Rendered:
    return render_all(context, decisions, Progress(), deadline=deadline, retry_failed=retry_failed)


def read_marker(context: RunContext, shard: int) -> ShardMarker:
    marker = ShardMarker.read(context.run, shard)
    assert marker is not None
    return marker


def nonzero_counts(manifest: Manifest) -> dict[str, int]:
    """The outcomes of the requested items, which add up to all of them, and the number of stale users."""
    counts = manifest.counts.model_dump()
    assert counts["requested"] == sum(counts[outcome] for outcome in OUTCOMES)
    return {name: counts[name] for name in (*OUTCOMES, "stale_users") if counts[name]}


def items_of(snapshot: Snapshot) -> dict[str, list[str]]:
    """The item ids of every user, by rank."""
    items: dict[str, list[str]] = {}
    for row in snapshot.items().sort_by([("user_id", "ascending"), ("rank", "ascending")]).to_pylist():
        items.setdefault(row["user_id"], []).append(row["item_id"])
    return items


def test_a_user_with_a_failed_item_is_planned_again_the_next_night(config: GenerateConfig) -> None:
    first = on(MONDAY, config)
    prepared = prepare(first, break_first=True)
    assert nonzero_counts(assembled(first, prepared, error_budget=0.1)) == {"new": 15, "failed": 1}
    publish(config.catalog, prepared.run)
    before = read_catalog(config.catalog)
    (error,) = before.table("errors").to_pylist()
    assert (error["stage"], error["error"], error["attempt"]) == ("render", "image_embeds is not finite", 0)
    (unlucky,) = (row for row in before.table("users").to_pylist() if row["num_failed"])
    assert (unlucky["user_id"], unlucky["num_failed"], unlucky["num_items"]) == (
        error["user_id"],
        1,
        unlucky["num_images"] - 1,
    )

    second = on(TUESDAY, config)
    decisions = decide(second, run_of(second))
    assert (decisions.planned_users, decisions.planned_items) == (1, unlucky["num_images"])
    manifest = snapshot_of(second)
    assert nonzero_counts(manifest) == {"new": unlucky["num_images"], "carried": 16 - unlucky["num_images"]}
    now = items_of(read_catalog(config.catalog))
    assert error["item_id"] in now[error["user_id"]]  # the very item, since nothing else of the user changed
    others = {user: items for user, items in items_of(before).items() if user != error["user_id"]}
    assert others.items() <= now.items()


def test_failed_items_are_rendered_again_as_another_attempt(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row fails for good, so it fails in both attempts. Shards without a failure are left as they are."""
    config = on(MONDAY, config, items_per_shard=6)
    prepared = prepare(config, break_first=True)
    context, decisions = prepared.context, prepared.decisions
    assert decisions.shards == 3
    for shard in range(3):
        Path(context.run.shard_marker(shard)).unlink()  # as if the attempt was killed before each marker
    actors = RenderActors(monkeypatch)
    render(context, decisions)
    assert actors.item_ids == []  # all items have records
    (failed,) = (shard for shard in range(3) if read_marker(context, shard).failed)
    others = {shard: read_marker(context, shard) for shard in range(3) if shard != failed}

    prepared = prepared._replace(rendered=render(context, decisions, retry_failed=True))
    marker = read_marker(context, failed)
    assert (marker.attempt, marker.failed, marker.timed_out) == (1, 1, False)
    assert others == {shard: read_marker(context, shard) for shard in others}
    manifest = assembled(config, prepared, error_budget=0.1)
    assert nonzero_counts(manifest) == {"new": 15, "failed": 1}
    (error,) = open_snapshot(config.catalog, context.run.snapshot).table("errors").to_pylist()
    assert actors.item_ids == [error["item_id"]]
    assert (error["stage"], error["error"], error["attempt"]) == ("render", "image_embeds is not finite", 1)
    with pytest.raises(
        ErrorBudgetExceededError,
        match=r"1 of 16 items failed \(image_embeds is not finite\), the budget is 1.00%",
    ):
        assembled(config, prepared, error_budget=0.01)


def test_a_killed_attempt_at_failed_items_is_resumed(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sixteen items fail. The second attempt renders five and is killed; resumed, it renders eleven."""
    config = on(MONDAY, config, images_per_file=1)

    def failing(_: RenderImages, batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(
            [{"item_id": item, "seed": 1, "error": "bad luck"} for item in batch["item_id"].to_pylist()],
            schema=schemas.IMAGES,
        )

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    context = context_of(config)
    decisions = write_plan(context)
    planned = planned_items(context.run)
    with monkeypatch.context() as patch:
        patch.setattr(RenderImages, "render", failing)
        render_rows(context, 0, planned)
    actors = RenderActors(monkeypatch, limit=5)
    render(context, decisions)
    assert actors.item_ids == []
    assert read_marker(context, 0).failed == 16

    with monkeypatch.context() as patch:
        patch.setattr(render_module, "write_record", killed)
        with pytest.raises(KeyboardInterrupt):
            render(context, decisions, retry_failed=True)
    assert read_marker(context, 0).attempt == 0
    assert len(actors.item_ids) == 5
    actors.limit = None
    rendered = render(context, decisions, retry_failed=True)
    assert sorted(actors.item_ids) == sorted(planned["item_id"].to_pylist())
    assert Counter(record.attempt for record in read_records(context.run, 0)) == {0: 1, 1: 16}
    manifest = assembled(config, Prepared(context, decisions, rendered))
    assert nonzero_counts(manifest) == {"new": 16}
    assert open_snapshot(config.catalog, context.run.snapshot).table("errors").num_rows == 0


def test_the_next_attempt_renders_lost_rows(config: GenerateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a deadline no time runs out: a shard with a gap gets no marker, and nothing is published."""
    config = on(MONDAY, config)
    context = context_of(config)
    decisions = write_plan(context)
    actors = RenderActors(monkeypatch, limit=15)
    rendered = render(context, decisions)
    assert not rendered.timed_out
    assert ShardMarker.read(context.run, 0) is None
    with pytest.raises(
        ResumableError,
        match="1 of 16 planned items were not rendered; nothing is published, start it again to resume",
    ):
        assembled(config, Prepared(context, decisions, rendered))
    rendered = render(context, decisions)
    assert len(set(actors.item_ids)) == len(actors.item_ids) == 16
    assert nonzero_counts(assembled(config, Prepared(context, decisions, rendered))) == {"new": 16}


def night(config: GenerateConfig, *, shards: int, and_rows: int = 0) -> tuple[Manifest, Prepared]:
    """A published run with time for some shards and some rows of the next one; its manifest."""
    context = context_of(config)
    decisions = write_plan(context)
    planned = planned_items(context.run)
    for shard in range(shards):
        render_rows(context, shard, planned.filter(pc.equal(planned["shard"], shard)))
    if and_rows:
        next_shard = planned.filter(pc.equal(planned["shard"], shards))
        render_rows(context, shards, next_shard.slice(0, and_rows))
    rendered = render(context, decisions, deadline=1.0)  # in 1970
    prepared = Prepared(context, decisions, rendered)
    manifest = assembled(config, prepared)
    publish(config.catalog, context.run)
    return manifest, prepared


@pytest.mark.parametrize(
    ("limits", "ends"),
    [
        ({}, None),
        # The next such time, less one and a half times the last assembling.
        ({"publish_by": "06:00"}, "2026-03-03T05:59:00"),
        ({"publish_by": "23:00"}, "2026-03-02T22:59:00"),
        ({"publish_by": "22:30"}, "2026-03-03T22:29:00"),
        ({"max_gpu_hours": 3.0}, "2026-03-03T00:15:00"),  # of two actors, which rendered for half an hour
        ({"publish_by": "06:00", "max_gpu_hours": 3.0}, "2026-03-03T00:15:00"),
        ({"publish_by": "23:00", "max_gpu_hours": 3.0}, "2026-03-02T22:59:00"),
    ],
)
def test_limits_decide_when_rendering_stops(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch, limits: dict[str, Any], ends: str | None
) -> None:
    """The run began at half past ten in the evening, and came to rendering half an hour later."""
    now = datetime.datetime(2026, 3, 2, 23, tzinfo=datetime.UTC).timestamp()
    monkeypatch.setattr(estimate, "time", SimpleNamespace(time=lambda: now))
    measured = Measured(stages={"assemble": StageFigures(seconds=40.0)})
    previous = Snapshot(
        root="",
        path="",
        files=schemas.FILES.empty_table(),
        manifest=Manifest.model_construct(measured=measured),
    )
    decoder = config.decoder.model_copy(update={"num_actors": 2})
    config = config.model_copy(update={"limits": LimitSettings.model_validate(limits), "decoder": decoder})
    began_at = datetime.datetime(2026, 3, 2, 22, 30, tzinfo=datetime.UTC)
    context = replace(context_of(config), previous=previous, began_at=began_at)
    deadline = deadline_of(context, 1800.0)
    assert (deadline and datetime.datetime.fromtimestamp(deadline, datetime.UTC).isoformat()) == (
        ends and f"{ends}+00:00"
    )


def test_a_second_night_completes_a_first_catalog_that_time_ran_out_for(config: GenerateConfig) -> None:
    """The least urgent users are deferred, also one with a single rendered item: nobody has half a list."""
    manifest, prepared = night(on(MONDAY, config, items_per_shard=6), shards=1, and_rows=1)
    assert prepared.rendered.timed_out
    done = manifest.counts.new
    assert nonzero_counts(manifest) == {
        "new": done,
        "deferred": 16 - done,
        "stale_users": 5 - manifest.counts.users,
    }
    assert 0 < done < 16
    before = read_catalog(config.catalog)
    changed = {row["user_id"] for row in before.table("changes").to_pylist()}
    assert set(items_of(before)) == changed == set(before.table("users")["user_id"].to_pylist())
    # Stale users have no row, since they have no items to keep.
    assert not any(before.table("users")["stale"].to_pylist())
    assert before.table("images").num_rows == done + 1

    second = on(TUESDAY, config, items_per_shard=6)
    decisions = decide(second, run_of(second))
    assert (decisions.planned_users, decisions.planned_items) == (manifest.counts.stale_users, 16 - done)
    assert nonzero_counts(snapshot_of(second)) == {"new": 16 - done, "carried": done}
    now = items_of(read_catalog(config.catalog))
    assert items_of(before).items() <= now.items()
    assert {user: len(items) for user, items in now.items()} == {
        USERS[1]: 4,
        **dict.fromkeys([USERS[0], *USERS[2:5]], 3),
    }


def test_stale_users_keep_last_nights_items_until_theirs_are_rendered(config: GenerateConfig) -> None:
    """Other settings plan everybody anew; time allows for one shard of three."""
    assert nonzero_counts(snapshot_of(on(MONDAY, config, items_per_shard=6))) == {"new": 16}
    monday = read_catalog(config.catalog)
    sampler = config.sampler.model_copy(update={"num_inference_steps": 5})
    config = config.model_copy(update={"sampler": sampler})
    manifest, prepared = night(on(TUESDAY, config, items_per_shard=6), shards=1)
    assert (prepared.decisions.planned_users, prepared.decisions.shards) == (5, 3)
    done = manifest.counts.new
    assert 0 < done < 16
    tuesday = read_catalog(config.catalog)
    users = {row["user_id"]: row for row in tuesday.table("users").to_pylist()}
    stale = {user for user, row in users.items() if row["stale"]}
    assert nonzero_counts(manifest) == {"new": done, "carried": 16 - done, "stale_users": len(stale)}
    assert 0 < len(stale) < 5
    assert manifest.counts.users == 5
    last = {row["user_id"]: row for row in monday.table("users").to_pylist()}
    assert all(users[user] == {**last[user], "stale": True} for user in stale)
    assert {str(row["planned_on"]) for user, row in users.items() if user not in stale} == {"2026-03-03"}
    now, before = items_of(tuesday), items_of(monday)
    assert {user for user in now if now[user] == before[user]} == stale
    for user in stale:  # their pictures too
        assert tuesday.images(tuesday.items(user_ids=[user])) == monday.images(monday.items(user_ids=[user]))

    third = on(WEDNESDAY, config, items_per_shard=6)
    decisions = decide(third, run_of(third))
    assert (decisions.planned_users, decisions.planned_items) == (len(stale), 16 - done)
    assert nonzero_counts(snapshot_of(third)) == {"new": 16 - done, "carried": done}
    wednesday = read_catalog(config.catalog)
    assert not any(wednesday.table("users")["stale"].to_pylist())
    last_items = items_of(wednesday)
    assert {user for user, items in last_items.items() if items == now[user]} == set(USERS[:5]) - stale
    assert not {item for items in last_items.values() for item in items} & {
        item for items in before.values() for item in items
    }


def test_a_night_without_time_to_render_publishes_last_nights_items(config: GenerateConfig) -> None:
    snapshot_of(on(MONDAY, config))
    before = items_of(read_catalog(config.catalog))
    manifest, prepared = night(on(TUESDAY, config.model_copy(update={"num_images": 2})), shards=0)
    assert manifest.counts.requested == 12
    assert nonzero_counts(manifest) == {"carried": 12, "stale_users": 4}
    latest = published(config.catalog)
    assert latest is not None
    assert latest.manifest.run_id == prepared.run.run_id
    assert items_of(latest) == {
        user: items[: 4 if user == USERS[1] else 2] for user, items in before.items()
    }  # the request is for fewer by now


def test_cold_start_users_share_a_pool_that_was_not_rendered_in_time(
    config: GenerateConfig, tmp_path: Path
) -> None:
    """The request is for more than last night's pool has: the missing items are deferred."""
    pq.write_table(pa.table({"user_id": [USERS[0], "nobody", "nobody else"]}), tmp_path / "three.parquet")
    config = config.model_copy(update={"request": str(tmp_path / "three.parquet")})
    manifest, _ = night(on(MONDAY, config), shards=0)
    assert manifest.counts.requested == 9
    assert nonzero_counts(manifest) == {"deferred": 9, "stale_users": 3}
    assert items_of(read_catalog(config.catalog)) == {}
    assert nonzero_counts(snapshot_of(on(TUESDAY, config))) == {"new": 3, "population": 6}

    more = config.model_copy(update={"num_images": 5})
    manifest, _ = night(on(WEDNESDAY, more), shards=0)
    assert nonzero_counts(manifest) == {"carried": 3, "population": 6, "deferred": 6, "stale_users": 1}
    assert nonzero_counts(snapshot_of(on(THURSDAY, more))) == {"new": 5, "population": 10}
