"""An input that is replaced while somebody works from it stops the job, before anything is made of it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data import histories as histories_module
from rebeca_ray.data import items as items_module
from rebeca_ray.data.histories import build_histories
from rebeca_ray.data.items import read_image_embeds
from rebeca_ray.errors import InputError
from rebeca_ray.generation import pipeline
from rebeca_ray.generation.pipeline import generate_catalog
from tests.conftest import NO_GATE, USERS


def rated(folder: Path, item: str = "real-0") -> InteractionSettings:
    """Write ratings of one item by three users into a file of a folder."""
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"user_id": USERS[:3], "item_id": [item] * 3}), folder / f"{item}.parquet")
    return InteractionSettings(path=str(folder), min_likes=0)


@pytest.mark.parametrize("name", ["items", "interactions", "request"])
def test_a_run_stops_when_one_of_its_tables_changes(
    config: GenerateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also when rows only come to it: the run was described with another table."""
    config = config.model_copy(update={"interactions": rated(tmp_path / "rated"), "gate": NO_GATE})
    decide = pipeline.decide_all

    def and_change(*arguments: object) -> object:
        decisions = decide(*arguments)  # type: ignore[arg-type]
        if name == "interactions":
            rated(tmp_path / "rated", "real-1")
        else:
            path = getattr(config, name)
            pq.write_table(pq.read_table(path).slice(0, 4), path)
        return decisions

    monkeypatch.setattr(pipeline, "decide_all", and_change)
    with pytest.raises(
        InputError, match=rf"^{name} .*: was replaced while this run was deciding; run again$"
    ):
        generate_catalog(config, in_process=True)
    monkeypatch.setattr(pipeline, "decide_all", decide)
    assert generate_catalog(config, in_process=True).manifest.counts.new > 0


def test_an_actor_that_starts_later_reads_no_other_items(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace_items(*_: object) -> None:
        pq.write_table(pq.read_table(config.items).slice(1), config.items)

    monkeypatch.setattr(pipeline, "require_same_inputs", replace_items)
    with pytest.raises(InputError, match=r"^items .*: was replaced while this run was planning; run again$"):
        generate_catalog(config.model_copy(update={"gate": NO_GATE}), in_process=True)


def test_items_that_are_replaced_between_ids_and_embeddings_are_refused(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_item_ids = items_module.read_item_ids

    def and_replace(items: items_module.ParquetInput) -> np.ndarray:
        ids = read_item_ids(items)
        pq.write_table(pq.read_table(config.items).slice(0, 19), config.items)
        return ids

    monkeypatch.setattr(items_module, "read_item_ids", and_replace)
    with pytest.raises(InputError, match=r"^items .*; run again$|not readable as Parquet"):
        read_image_embeds(str(config.items))


def test_histories_of_replaced_interactions_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, ids = rated(tmp_path / "rated"), np.array([f"real-{number}" for number in range(9)])
    read_columns = histories_module.read_columns

    def and_replace(source: histories_module.ParquetInput) -> pa.Table:
        table = read_columns(source)
        pq.write_table(table.slice(1), tmp_path / "rated" / "real-0.parquet")
        return table

    monkeypatch.setattr(histories_module, "read_columns", and_replace)
    with pytest.raises(InputError, match=r"^interactions .*: was replaced while it was grouped by user; run"):
        build_histories(settings, ids, str(tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("*.json"))

    def and_append(source: histories_module.ParquetInput) -> pa.Table:
        table = read_columns(source)
        rated(tmp_path / "rated", "real-1")
        return table

    monkeypatch.setattr(histories_module, "read_columns", and_append)
    assert (
        build_histories(settings, ids, str(tmp_path / "out")).num_users == 2
    )  # of the files that were listed
