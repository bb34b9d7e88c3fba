"""Requests, priors and settings that a run refuses before it writes anything."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from rebeca_ray import schemas
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.errors import UserError
from rebeca_ray.generation import request
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.generation.request import check_request


@pytest.mark.parametrize(
    ("request_table", "message"),
    [
        ({"user": ["user-0"]}, "column 'user_id' is missing"),
        ({"user_id": pa.array([], pa.string())}, "has no rows"),
        ({"user_id": ["user-0", "", None]}, "2 of 3 rows have an empty user_id"),
        ({"user_id": ["user-0", "user-0"]}, "1 user_ids are repeated"),
        ({"user_id": ["user-0"], "num_images": pa.array([0], pa.int32())}, "num_images goes from 0 to 0"),
        (
            {"user_id": ["user-0"], "num_images": pa.array([40_000], pa.int32())},
            "num_images goes from 40000 to 40000; ask for 1 to 32,767",
        ),
        ({"user_id": pa.array([7], pa.int64())}, "column 'user_id' is int64, expected string"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(
    config: GenerateConfig, tmp_path: Path, request_table: dict[str, Any], message: str
) -> None:
    pq.write_table(pa.table(request_table), tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=message):
        generate_catalog(config.model_copy(update={"request": str(tmp_path / "bad.parquet")}))
    assert not Path(config.catalog).exists()


@pytest.mark.parametrize(
    ("users", "message"),
    [
        (["a", "b", "c", "a"], r"1 user_ids are repeated \(rows 3\); ask for each user once"),
        (["a", "", "b", None], r"2 of 4 rows have an empty user_id \(rows 1, 3\)"),
    ],
)
def test_a_request_that_is_read_in_pieces_is_refused_as_a_whole(
    config: GenerateConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    users: list[str | None],
    message: str,
) -> None:
    monkeypatch.setattr(request, "ROWS_PER_BATCH", 1)
    monkeypatch.setattr(request, "ROWS_AT_ONCE", 1)
    pq.write_table(pa.table({"user_id": users}), tmp_path / "bad.parquet")
    config = config.model_copy(update={"request": str(tmp_path / "bad.parquet")})
    with pytest.raises(UserError, match=message):
        check_request(config, identify_decoder(config.decoder))


def test_a_prior_that_does_not_fit_the_decoder_is_refused(config: GenerateConfig) -> None:
    path = Path(config.prior) / "config.json"
    values = json.loads(path.read_text())
    values["scaler"]["embed_dim"] = 24
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"draws embeddings of size 24, decoder .* reads 16"):
        generate_catalog(config)
    assert not Path(config.catalog).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampler": {"num_inference_steps": 101}},
            r"prior .*: sampler.num_inference_steps is 101, it was trained on 100",
        ),
        (
            {"decoder": {"model": "/no/such/decoder"}},
            r"no model_index.json there; give a diffusers directory",
        ),
        ({"items": "nothing.parquet"}, "items .*nothing.parquet: not found"),
    ],
)
def test_settings_that_the_models_do_not_support_are_refused_before_anything_is_written(
    config: GenerateConfig, changes: dict[str, Any], message: str
) -> None:
    values = config.model_dump()
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message):
        generate_catalog(GenerateConfig.model_validate(values))
    assert not Path(config.catalog).exists()


def test_a_prior_without_condition_dropout_refuses_guidance(config: GenerateConfig) -> None:
    path = Path(config.prior) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "condition_dropout": 0.0}))
    with pytest.raises(
        UserError, match=r"prior_guidance_scale is 2.0, but prior .* was trained without condition dropout"
    ):
        generate_catalog(config)
    assert not Path(config.catalog).exists()


def test_real_items_by_another_clip_are_refused(config: GenerateConfig) -> None:
    wide = np.zeros((2, 24), np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(wide.ravel()), type=schemas.image_embeds(24))
    pq.write_table(pa.table({"item_id": ["a", "b"], "image_embeds": column}), str(config.items))
    with pytest.raises(UserError, match=r"embeddings of size 24 by CLIP None, the prior knows size 16"):
        generate_catalog(config)


def test_real_items_by_another_clip_of_the_same_size_are_refused(
    config: GenerateConfig, tmp_path: Path
) -> None:
    path = Path(config.prior) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "clip": "a" * 16}))
    (tmp_path / "items").mkdir()
    shutil.move(str(config.items), tmp_path / "items" / "items.parquet")
    (tmp_path / "items" / "embedding.json").write_text(
        json.dumps({"clip": "b" * 16, "clip_name": "another", "rows": 20})
    )
    with pytest.raises(
        UserError, match=rf"size 16 by CLIP {'b' * 16}, the prior knows size 16 by CLIP {'a' * 16}"
    ):
        generate_catalog(config.model_copy(update={"items": str(tmp_path / "items")}))


def test_a_damaged_prior_is_refused_before_anything_is_planned(config: GenerateConfig) -> None:
    path = Path(config.prior) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="model.safetensors is not the file config.json describes"):
        generate_catalog(config)
    assert not Path(config.catalog).exists()


def test_a_catalog_that_cannot_be_written_is_refused(config: GenerateConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        generate_catalog(config.model_copy(update={"catalog": str(tmp_path / "file" / "catalog")}))
