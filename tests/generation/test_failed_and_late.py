"""What failed, and what time ran out for: nobody loses an item by it, and the next attempt or the next night draws it."""

import datetime
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from rebeca_ray import schemas
from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.read import Snapshot, open_snapshot, published, read_catalog
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import LayoutSettings, LimitSettings
from rebeca_ray.errors import ErrorBudgetExceededError, ResumableError
from rebeca_ray.generation import pipeline
from rebeca_ray.generation import render as render_module
from rebeca_ray.generation.decide import Decisions
from rebeca_ray.generation.pipeline import deadline_of
from rebeca_ray.generation.progress import Progress
from rebeca_ray.generation.render import Rendered, RenderImages, read_records, render_all
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.objects import read_json
from rebeca_ray.storage.parquet import read_table
from tests.conftest import (
    USERS,
    Prepared,
    assembled,
    decide,
    draw_rows,
    prepare,
    publish,
    run_of,
    snapshot_of,
    write_plan,
)

MONDAY, TUESDAY, WEDNESDAY, THURSDAY = (datetime.date(2026, 3, day) for day in (2, 3, 4, 5))
KINDS = ("new", "carried", "population", "failed", "filtered", "deferred")


class Graph:
    """What `render.graph` gives, in this process: planned rows that are not done are drawn, one file a row, up to `most` of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int = 100) -> None:
        self.most = most
        self.drawn: list[str] = []
        monkeypatch.setattr(render_module, "graph", self)

    def __call__(
        self,
        config: GenerateConfig,
        run: Run,
        unit: int,
        parts: list[dict[str, Any]],
        done: pa.Array,
        attempt: int,
        deadline: float | None,
    ) -> "Graph":
        rows = pa.concat_tables([read_table(join(run.work, part["path"]), "plan") for part in parts])
        self.rows = rows.filter(pc.invert(pc.is_in(rows["item_id"], value_set=done))).slice(0, self.most)
        self.draw = lambda row: draw_rows(config, run, unit, row, attempt)
        return self

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        for number in range(self.rows.num_rows):
            row = self.rows.slice(number, 1)
            self.drawn += row["item_id"].to_pylist()
            yield pa.Table.from_pylist(self.draw(row))


def on(date: datetime.date, config: GenerateConfig, **layout: int) -> GenerateConfig:
    update = {"run_date": date, "layout": LayoutSettings(**layout)} if layout else {"run_date": date}
    return config.model_copy(update=update)


def render(
    config: GenerateConfig,
    run: Run,
    decisions: Decisions,
    *,
    deadline: float | None = None,
    retry_failed: bool = False,
) -> Rendered:
    return render_all(config, run, decisions, Progress(), deadline=deadline, retry_failed=retry_failed)


def add_up(manifest: dict[str, Any]) -> dict[str, int]:
    """The counts of what there is, of which each requested item is one."""
    counts = manifest.counts
    assert counts["requested"] == sum(counts[kind] for kind in KINDS)
    return {kind: counts[kind] for kind in (*KINDS, "late_users") if counts[kind]}


def items_of(snapshot: Snapshot) -> dict[str, list[str]]:
    """The item ids of every user, by rank."""
    found: dict[str, list[str]] = {}
    for row in snapshot.items().sort_by([("user_id", "ascending"), ("rank", "ascending")]).to_pylist():
        found.setdefault(row["user_id"], []).append(row["item_id"])
    return found


def test_who_has_an_item_that_failed_is_drawn_again_the_next_night(config: GenerateConfig) -> None:
    first = on(MONDAY, config)
    prepared = prepare(first, break_first=True)
    assert add_up(assembled(first, prepared, requested=16, error_budget=0.1)) == {"new": 15, "failed": 1}
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
    manifest = snapshot_of(second, requested=16)
    assert add_up(manifest) == {"new": unlucky["num_images"], "carried": 16 - unlucky["num_images"]}
    now = items_of(read_catalog(config.catalog))
    assert error["item_id"] in now[error["user_id"]]  # the very item, for nothing else of the user's changed
    assert {
        user: found for user, found in items_of(before).items() if user != error["user_id"]
    }.items() <= now.items()


def test_what_failed_is_drawn_again_as_an_attempt_of_its_own(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row fails for good, so that it fails in both attempts; units without a failure are left as they are."""
    config = on(MONDAY, config, items_per_shard=6)
    prepared = prepare(config, break_first=True)
    run, decisions = prepared.run, prepared.decisions
    assert decisions.units == 3
    graph = Graph(monkeypatch)
    render(config, run, decisions)
    assert graph.drawn == []  # all of it has records
    (failed,) = (unit for unit in range(3) if (read_json(run.unit(unit)) or {})["failed"])
    others = {unit: read_json(run.unit(unit)) for unit in range(3) if unit != failed}

    rendered = render(config, run, decisions, retry_failed=True)
    marker = read_json(run.unit(failed))
    assert marker is not None
    assert (marker["attempt"], marker["failed"], marker["late"]) == (1, 1, False)
    assert others == {unit: read_json(run.unit(unit)) for unit in others}
    assert add_up(
        assembled(config, prepared._replace(rendered=rendered), requested=16, error_budget=0.1)
    ) == {"new": 15, "failed": 1}
    (error,) = open_snapshot(config.catalog, run.snapshot).table("errors").to_pylist()
    assert graph.drawn == [error["item_id"]]
    assert (error["stage"], error["error"], error["attempt"]) == ("render", "image_embeds is not finite", 1)
    with pytest.raises(
        ErrorBudgetExceededError,
        match=r"1 of 16 items failed \(image_embeds is not finite\), the budget is 1.00%",
    ):
        assembled(config, prepared._replace(rendered=rendered), requested=16, error_budget=0.01)


def test_drawing_again_that_is_killed_goes_on_where_it_was(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sixteen fail. Of the second attempt five are drawn, then it is killed; the same attempt draws the other eleven."""
    config = on(MONDAY, config)

    def failing(_: RenderImages, batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(
            [{"item_id": item, "seed": 1, "error": "bad luck"} for item in batch["item_id"].to_pylist()],
            schema=schemas.IMAGES,
        )

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    run = run_of(config)
    decisions, planned, parts = write_plan(config, run)
    with monkeypatch.context() as patch:
        patch.setattr(RenderImages, "draw", failing)
        draw_rows(config, run, 0, planned)
    graph = Graph(monkeypatch, most=5)
    render(config, run, decisions)
    assert (read_json(run.unit(0)) or {})["failed"] == 16

    with monkeypatch.context() as patch:
        patch.setattr(render_module, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            render(config, run, decisions, retry_failed=True)
    assert (read_json(run.unit(0)) or {})["attempt"] == 0
    assert len(graph.drawn) == 5
    graph.most = 100
    rendered = render(config, run, decisions, retry_failed=True)
    assert sorted(graph.drawn) == sorted(planned["item_id"].to_pylist())
    assert Counter(record["attempt"] for record in read_records(run, 0)) == {0: 1, 1: 16}
    assert add_up(assembled(config, Prepared(run, decisions, parts, rendered), requested=16)) == {"new": 16}
    assert open_snapshot(config.catalog, run.snapshot).table("errors").num_rows == 0


def test_rows_that_are_lost_are_drawn_by_the_next_attempt(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a deadline nobody is late: a unit with a gap gets no marker, and nothing is published."""
    config = on(MONDAY, config)
    run = run_of(config)
    decisions, _, parts = write_plan(config, run)
    graph = Graph(monkeypatch, most=15)
    rendered = render(config, run, decisions)
    assert not rendered.late
    assert read_json(run.unit(0)) is None
    with pytest.raises(
        ResumableError,
        match="1 of 16 planned items were not rendered; nothing is published, start it again to resume",
    ):
        assembled(config, Prepared(run, decisions, parts, rendered), requested=16)
    rendered = render(config, run, decisions)
    assert len(set(graph.drawn)) == len(graph.drawn) == 16
    assert add_up(assembled(config, Prepared(run, decisions, parts, rendered), requested=16)) == {"new": 16}


def night(
    config: GenerateConfig, *, units: int, and_rows: int = 0, requested: int = 16
) -> tuple[dict[str, Any], Prepared]:
    """A published run that had time for so many units, and for some rows of the next; its manifest."""
    run = run_of(config)
    decisions, planned, parts = write_plan(config, run)
    for unit in range(units):
        draw_rows(config, run, unit, planned.filter(pc.equal(planned["unit"], unit)))
    if and_rows:
        draw_rows(config, run, units, planned.filter(pc.equal(planned["unit"], units)).slice(0, and_rows))
    rendered = render(config, run, decisions, deadline=1.0)  # in 1970
    prepared = Prepared(run, decisions, parts, rendered)
    manifest = assembled(config, prepared, requested=requested)
    publish(config.catalog, run)
    return manifest, prepared


@pytest.mark.parametrize(
    ("limits", "ends"),
    [
        ({}, None),
        (
            {"publish_by": "06:00"},
            "2026-03-03T05:59:00",
        ),  # the next such time, less once and a half what assembling took
        ({"publish_by": "23:00"}, "2026-03-02T22:59:00"),
        ({"publish_by": "22:30"}, "2026-03-03T22:29:00"),
        ({"max_gpu_hours": 3.0}, "2026-03-03T00:15:00"),  # of two actors, who have drawn for half an hour
        ({"publish_by": "06:00", "max_gpu_hours": 3.0}, "2026-03-03T00:15:00"),
        ({"publish_by": "23:00", "max_gpu_hours": 3.0}, "2026-03-02T22:59:00"),
    ],
)
def test_when_rendering_must_stop(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch, limits: dict[str, Any], ends: str | None
) -> None:
    """A run that began at half past ten in the evening, and came to rendering half an hour later."""
    now = datetime.datetime(2026, 3, 2, 23, tzinfo=datetime.UTC).timestamp()
    monkeypatch.setattr(pipeline, "time", SimpleNamespace(time=lambda: now))
    last = Snapshot(
        root="",
        path="",
        files=schemas.FILES.empty_table(),
        manifest={"measured": {"stages": {"assemble": {"seconds": 40.0}}}},
    )
    decoder = config.decoder.model_copy(update={"num_actors": 2})
    config = config.model_copy(update={"limits": LimitSettings.model_validate(limits), "decoder": decoder})
    begun_at = datetime.datetime(2026, 3, 2, 22, 30, tzinfo=datetime.UTC)
    found = deadline_of(config, begun_at, last, 1800.0)
    assert (found and datetime.datetime.fromtimestamp(found, datetime.UTC).isoformat()) == (
        ends and f"{ends}+00:00"
    )


def test_a_first_catalog_that_time_ran_out_for_is_whole_after_a_second_night(config: GenerateConfig) -> None:
    """The least urgent users are put off, also one of whom one item was drawn: nobody has half a list."""
    manifest, prepared = night(on(MONDAY, config, items_per_shard=6), units=1, and_rows=1)
    assert prepared.rendered.late
    done = manifest.counts.new
    assert add_up(manifest) == {
        "new": done,
        "deferred": 16 - done,
        "late_users": 5 - manifest.counts.users,
    }
    assert 0 < done < 16
    before = read_catalog(config.catalog)
    unfinished = {row["user_id"] for row in before.table("changes").to_pylist()}
    assert set(items_of(before)) == unfinished == set(before.table("users")["user_id"].to_pylist())
    assert not any(
        before.table("users")["late"].to_pylist()
    )  # the late ones have no row: nothing of theirs is there to be kept
    assert before.table("images").num_rows == done + 1

    second = on(TUESDAY, config, items_per_shard=6)
    decisions = decide(second, run_of(second))
    assert (decisions.planned_users, decisions.planned_items) == (manifest.counts.stale_users, 16 - done)
    assert add_up(snapshot_of(second, requested=16)) == {"new": 16 - done, "carried": done}
    now = items_of(read_catalog(config.catalog))
    assert items_of(before).items() <= now.items()
    assert {user: len(found) for user, found in now.items()} == {
        USERS[1]: 4,
        **dict.fromkeys([USERS[0], *USERS[2:5]], 3),
    }


def test_late_users_keep_last_nights_items_until_they_are_drawn(config: GenerateConfig) -> None:
    """Everybody is to be drawn anew with other settings; time allows for one unit of three."""
    assert add_up(snapshot_of(on(MONDAY, config, items_per_shard=6), requested=16)) == {"new": 16}
    monday = read_catalog(config.catalog)
    sampler = config.sampler.model_copy(update={"num_inference_steps": 5})
    config = config.model_copy(update={"sampler": sampler})
    manifest, prepared = night(on(TUESDAY, config, items_per_shard=6), units=1)
    assert (prepared.decisions.planned_users, prepared.decisions.units) == (5, 3)
    done = manifest.counts.new
    assert 0 < done < 16
    tuesday = read_catalog(config.catalog)
    users = {row["user_id"]: row for row in tuesday.table("users").to_pylist()}
    late = {user for user, row in users.items() if row["late"]}
    assert add_up(manifest) == {"new": done, "carried": 16 - done, "late_users": len(late)}
    assert 0 < len(late) < 5
    assert manifest.counts.users == 5
    last = {row["user_id"]: row for row in monday.table("users").to_pylist()}
    assert all(users[user] == {**last[user], "late": True} for user in late)
    assert {str(row["planned_on"]) for user, row in users.items() if user not in late} == {"2026-03-03"}
    now, before = items_of(tuesday), items_of(monday)
    assert {user for user in now if now[user] == before[user]} == late
    for user in late:  # their pictures too
        assert tuesday.images(tuesday.items(user_ids=[user])) == monday.images(monday.items(user_ids=[user]))

    third = on(WEDNESDAY, config, items_per_shard=6)
    decisions = decide(third, run_of(third))
    assert (decisions.planned_users, decisions.planned_items) == (len(late), 16 - done)
    assert add_up(snapshot_of(third, requested=16)) == {"new": 16 - done, "carried": done}
    wednesday = read_catalog(config.catalog)
    assert not any(wednesday.table("users")["late"].to_pylist())
    assert {user for user, found in items_of(wednesday).items() if found == now[user]} == set(
        USERS[:5]
    ) - late
    assert not {item for found in items_of(wednesday).values() for item in found} & {
        item for found in before.values() for item in found
    }


def test_a_night_that_draws_nothing_in_time_publishes_last_nights_items(config: GenerateConfig) -> None:
    snapshot_of(on(MONDAY, config), requested=16)
    before = items_of(read_catalog(config.catalog))
    manifest, prepared = night(
        on(TUESDAY, config.model_copy(update={"num_images": 2})), units=0, requested=12
    )
    assert add_up(manifest) == {"carried": 12, "late_users": 4}
    latest = published(config.catalog)
    assert latest is not None
    assert latest.manifest.run_id == prepared.run.run_id
    assert items_of(latest) == {
        user: found[: 4 if user == USERS[1] else 2] for user, found in before.items()
    }  # fewer are wanted by now


def test_strangers_share_a_pool_that_was_not_drawn_in_time(config: GenerateConfig, tmp_path: Path) -> None:
    """More is wanted than last night's pool has: what is missing is put off, like what is missing of anybody else."""
    pq.write_table(pa.table({"user_id": [USERS[0], "nobody", "nobody else"]}), tmp_path / "strangers.parquet")
    config = config.model_copy(update={"request": str(tmp_path / "strangers.parquet")})
    manifest, _ = night(on(MONDAY, config), units=0, requested=9)
    assert add_up(manifest) == {"deferred": 9, "late_users": 3}
    assert items_of(read_catalog(config.catalog)) == {}
    assert add_up(snapshot_of(on(TUESDAY, config), requested=9)) == {"new": 3, "population": 6}

    more = config.model_copy(update={"num_images": 5})
    manifest, _ = night(on(WEDNESDAY, more), units=0, requested=15)
    assert add_up(manifest) == {"carried": 3, "population": 6, "deferred": 6, "late_users": 1}
    assert add_up(snapshot_of(on(THURSDAY, more), requested=15)) == {"new": 5, "population": 10}
