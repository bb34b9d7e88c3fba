"""A row that kills its process is recorded as failed, and everything else is rendered."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from rebeca_ray import schemas
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.generation import render as render_module
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.generation.progress import Progress
from rebeca_ray.generation.render import ShardMarker, render_all
from rebeca_ray.generation.repair import suspects as suspects_module
from rebeca_ray.generation.repair.suspects import DEATHS, REASON, Suspects
from rebeca_ray.storage.filesystem import delete
from tests.conftest import NO_GATE, context_of, planned_items, snapshot_of, write_plan
from tests.generation.light_render import KilledByOneRow, LightRender


class DyingError(Exception):
    """Stands for the death of the process."""


def batch_of(*item_ids: str) -> pa.Table:
    return pa.table({"item_id": list(item_ids)})


def attempts(
    monkeypatch: pytest.MonkeyPatch, folder: Path, killers: set[str], item_ids: list[str]
) -> tuple[list[list[str]], pa.Table]:
    """Render a batch in one process after another until one survives; return the draws and the rows."""
    drawn: list[list[str]] = []
    monkeypatch.setattr(suspects_module, "delete", lambda uri: drawn_alive(uri))

    def drawn_alive(uri: str) -> None:
        if not killers & {*drawn[-1]}:  # a dead process removes no note
            delete(uri)

    def render(batch: pa.Table) -> pa.Table:
        drawn.append(batch["item_id"].to_pylist())
        if killers & {*drawn[-1]}:
            raise DyingError
        rows = [{"item_id": item, "seed": 1, "width": 16} for item in drawn[-1]]
        return pa.Table.from_pylist(rows, schema=schemas.IMAGES)

    for _ in range(40):
        suspects = Suspects(str(folder / "suspects"), watchful=True)
        try:
            return drawn, suspects.render(batch_of(*item_ids), render)
        except DyingError:
            continue
    raise AssertionError("no process survived")


@pytest.mark.parametrize("killers", [set(), {"b"}, {"a", "d"}, {"a", "b", "c", "d"}])
def test_only_rows_that_kill_alone_fail(
    tmp_path: Path, killers: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, images = attempts(monkeypatch, tmp_path, killers, ["a", "b", "c", "d"])
    assert images["item_id"].to_pylist() == ["a", "b", "c", "d"]
    assert images.schema == schemas.IMAGES
    errors = dict(zip(images["item_id"].to_pylist(), images["error"].to_pylist(), strict=True))
    assert {item for item, error in errors.items() if error} == killers
    assert set(errors.values()) <= {None, REASON}
    together = [batch for batch in drawn if len(batch) == 4]
    assert len(together) == (2 if killers else 1)
    for killer in killers:
        assert drawn.count([killer]) == 2


def test_nothing_is_noted_before_the_first_death(tmp_path: Path) -> None:
    suspects = Suspects(str(tmp_path / "suspects"), watchful=False)
    images = suspects.render(batch_of("a"), lambda batch: batch)
    assert images["item_id"].to_pylist() == ["a"]
    assert not (tmp_path / "suspects").exists()


def test_notes_of_finished_batches_are_removed(tmp_path: Path) -> None:
    suspects = Suspects(str(tmp_path / "suspects"), watchful=True)
    noted = []

    def render(batch: pa.Table) -> pa.Table:
        noted.append(len(list((tmp_path / "suspects").glob("*.json"))))
        return batch

    suspects.render(batch_of("a", "b"), render)
    assert noted == [1]
    assert not list((tmp_path / "suspects").glob("*.json"))


def test_rows_are_noted_in_one_call_at_a_time(tmp_path: Path) -> None:
    """A death would else tell of rows that another call of the actor draws."""
    suspects = Suspects(str(tmp_path / "suspects"), watchful=True)
    noted = []

    def render(batch: pa.Table) -> pa.Table:
        waiting.wait(0.2)  # the time for the other call to begin, too
        noted.append(len(list((tmp_path / "suspects").glob("*.json"))))
        return batch

    waiting = threading.Event()
    with ThreadPoolExecutor(2) as calls:
        list(calls.map(lambda item: suspects.render(batch_of(item), render), ("a", "b")))
    assert noted == [1, 1]


def test_a_row_that_kills_its_actor_costs_that_row_alone(
    config: GenerateConfig, ray_local: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = config.model_copy(update={"catalog": f"{config.catalog}-reference"})
    snapshot_of(reference)
    expected = read_catalog(reference.catalog).items()
    poison = expected["item_id"][5].as_py()
    Path(config.catalog).mkdir()
    Path(config.catalog, "poison").write_text(poison)
    monkeypatch.setattr(render_module, "RenderImages", KilledByOneRow)
    tonight = config.model_copy(update={"gate": NO_GATE, "error_budget": 0.1})
    counts = generate_catalog(tonight).manifest.counts
    assert (counts.requested, counts.new, counts.failed) == (16, 15, 1)
    snapshot = read_catalog(config.catalog)
    (error,) = snapshot.table("errors").to_pylist()
    assert (error["item_id"], error["error"]) == (poison, REASON)
    others = expected.filter(pc.not_equal(expected["item_id"], poison))
    assert sorted(snapshot.items()["item_id"].to_pylist()) == sorted(others["item_id"].to_pylist())


def test_a_row_that_killed_is_drawn_again_with_the_failed_ones(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(config)
    decisions = write_plan(context)
    poison = planned_items(context.run)["item_id"][5].as_py()
    drawn: list[list[str]] = []

    class Dying(LightRender):
        def render(self, batch: pa.Table) -> pa.Table:
            drawn.append(batch["item_id"].to_pylist())
            if poison in drawn[-1]:
                raise DyingError
            return super().render(batch)

    def render(*, retry_failed: bool = False) -> int:
        render_all(context, decisions, Progress(), deadline=None, retry_failed=retry_failed)
        marker = ShardMarker.read(context.run, 0)
        assert marker is not None
        return marker.failed

    with monkeypatch.context() as patch:
        patch.setattr(render_module, "RenderImages", Dying)
        patch.setattr(suspects_module, "delete", lambda uri: poison in drawn[-1] or delete(uri))
        for _ in range(2 * DEATHS):
            with pytest.raises(DyingError):
                render()
        assert render() == 1
    monkeypatch.setattr(render_module, "RenderImages", LightRender)
    assert render() == 1
    assert render(retry_failed=True) == 0
