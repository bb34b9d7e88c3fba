"""`rebeca decode`: the images of a catalog again, from its embeddings alone."""

import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

import rebeca_ray as rr
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.cli.commands import app
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.errors import InputError
from rebeca_ray.halves.decode import decode_embeddings, decode_table
from rebeca_ray.schemas import mark_of
from tests.conftest import D, snapshot_of


def embeddings(count: int, size: int = D) -> pa.Table:
    values = np.random.default_rng(0).standard_normal(count * size).astype(np.float32)
    return pa.table({"name": [f"row-{row}" for row in range(count)], "image_embeds": as_lists(values, size)})


def as_lists(values: np.ndarray, size: int) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values), size)


def test_the_items_of_a_catalog_give_its_images_again(config: GenerateConfig, tmp_path: Path) -> None:
    snapshot_of(config)
    snapshot = read_catalog(config.catalog)
    items = snapshot.items()
    prompts = {"user-2": "noto food pizza"}  # of the request
    column = pa.array([prompts.get(user, "") for user in items["user_id"].to_pylist()])
    pq.write_table(items.append_column("prompt", column), tmp_path / "embeds.parquet")
    out = str(tmp_path / "out.parquet")
    decoded = decode_embeddings(str(tmp_path / "embeds.parquet"), config.decoder, out)
    assert (decoded.rows, decoded.images, decoded.error) == (16, 16, None)
    images = pq.read_table(out)
    assert images["item_id"].to_pylist() == items["item_id"].to_pylist()
    assert "image_embeds" not in images.column_names
    assert [image["bytes"] for image in images["image"].to_pylist()] == snapshot.images(items)
    assert set(images["width"].to_pylist()) == {16}


def test_equal_embeddings_give_equal_images_in_any_order_and_in_memory(config: GenerateConfig) -> None:
    table = embeddings(5)
    shown = rr.decode(table, config, "decoder.batch_size=2")
    assert shown.table["name"].to_pylist() == table["name"].to_pylist()
    images = shown.table["image"].to_pylist()
    assert rr.decode(table, config.decoder, "batch_size=2").table == shown.table
    assert len({image["bytes"] for image in images}) == 5
    others = decode_table(table.take([4, 0, 2]), config.decoder)["image"].to_pylist()
    assert others == [images[4], images[0], images[2]]


def test_the_command_writes_images_or_one_line_and_nothing(config: GenerateConfig, tmp_path: Path) -> None:
    config_file = tmp_path / "generate.yaml"
    config_file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    pq.write_table(embeddings(3), tmp_path / "embeds.parquet")
    pq.write_table(embeddings(3, 8), tmp_path / "small.parquet")
    pq.write_table(pa.table({"name": ["a"]}), tmp_path / "none.parquet")

    def run(embeds: str, out: str) -> tuple[int, str]:
        command = f"decode --config {config_file} --embeds {tmp_path}/{embeds} --out {tmp_path}/{out}"
        result = CliRunner().invoke(app, shlex.split(command))
        return result.exit_code, result.output

    code, output = run("embeds.parquet", "out.parquet")
    assert (code, "decoded 3 of 3 embeddings" in output.replace("\n", " ")) == (0, True)
    assert pq.read_table(tmp_path / "out.parquet").column_names[0] == "name"
    for embeds, out, message in (
        ("embeds.parquet", "out.parquet", "already exists"),
        ("embeds.parquet", "images", "give a name that ends with .parquet"),
        ("small.parquet", "new.parquet", "have size 8, decoder"),
        ("none.parquet", "new.parquet", "column 'image_embeds' is missing, there are name"),
        ("absent.parquet", "new.parquet", "absent.parquet"),
    ):
        code, output = run(embeds, out)
        assert code == 2
        assert message in output
    assert not (tmp_path / "new.parquet").exists()
    with pytest.raises(InputError, match="column 'image_embeds' is missing"):
        decode_table(pa.table({"name": ["a"]}), config.decoder)
    with pytest.raises(InputError, match="embeddings: are a list, expected a pyarrow table"):
        decode_table([[0.0] * D], config.decoder)


def test_a_row_that_cannot_be_drawn_costs_itself_alone(
    config: GenerateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rebeca_ray.decoder.local import LocalDecoder

    whole = LocalDecoder.draw_tile
    monkeypatch.setattr(LocalDecoder, "draw_tile", lambda self, rows: ["bad luck", *whole(self, rows)[1:]])
    pq.write_table(embeddings(3), tmp_path / "embeds.parquet")
    decoded = decode_embeddings(
        str(tmp_path / "embeds.parquet"), config.decoder, str(tmp_path / "out.parquet")
    )
    assert (decoded.rows, decoded.images, decoded.error) == (3, 2, "bad luck")
    assert pq.read_table(tmp_path / "out.parquet")["error"].to_pylist() == ["bad luck", None, None]


def test_nulls_and_odd_ids_cost_no_other_row(config: GenerateConfig) -> None:
    table = embeddings(3)
    lists = pa.array([table["image_embeds"][0].as_py(), None, [float("inf")] * D], pa.list_(pa.float32()))
    odd = pa.table({"item_id": ["a", None, None], "image_embeds": lists})
    drawn = decode_table(odd, config.decoder)
    assert drawn["error"].to_pylist() == [None, *["image_embeds is not finite"] * 2]
    assert drawn["image"][0]["path"].as_py() == "a.png"
    without_ids = decode_table(table, config.decoder)
    null_ids = decode_table(table.append_column("item_id", pa.nulls(3, pa.string())), config.decoder)
    assert null_ids["seed"] == without_ids["seed"]
    assert len(set(without_ids["seed"].to_pylist())) == 3
    assert decode_table(table.slice(0, 0), config.decoder).num_rows == 0
    for wrong in (embeddings(2, 8), pa.table({"image_embeds": [[1.0] * D, [1.0] * 3]})):
        with pytest.raises(InputError, match="the decoder reads fixed_size_list"):
            decode_table(wrong, config.decoder)


def test_a_file_says_which_mark_its_images_have(config: GenerateConfig, tmp_path: Path) -> None:
    pq.write_table(embeddings(2), tmp_path / "embeds.parquet")
    for mark in ("none", "xmp"):
        out = str(tmp_path / f"{mark}.parquet")
        decoder = config.decoder.model_copy(update={"provenance": mark})
        decode_embeddings(str(tmp_path / "embeds.parquet"), decoder, out)
        assert mark_of(pq.read_schema(out)) == mark
