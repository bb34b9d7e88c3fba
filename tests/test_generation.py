"""The main job on real Ray and real storage: a complete snapshot is published, a partial one never."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rebeca_ray import identity, schemas
from rebeca_ray.catalog.assemble import IncompleteRunError, assemble
from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.publish import LostRaceError, publish, read_pointer
from rebeca_ray.catalog.read import open_snapshot, published, read_catalog
from rebeca_ray.checkpoint import TrainedPrior, fingerprint, load_prior, read_prior_config, save_prior
from rebeca_ray.config import (
    DecoderSettings,
    DiffusionSettings,
    GenerateConfig,
    InteractionSettings,
    PriorSampling,
    SamplerSettings,
    SelectionSettings,
)
from rebeca_ray.decoder_files import decoder_fingerprint
from rebeca_ray.diffusion import Diffusion
from rebeca_ray.embeds import EmbedScaler
from rebeca_ray.errors import ErrorBudgetExceededError, UserError
from rebeca_ray.generation import generate_catalog
from rebeca_ray.histories import Histories
from rebeca_ray.planning import PlanUsers, request_histories
from rebeca_ray.prior import Prior
from rebeca_ray.rendering import RenderImages
from rebeca_ray.request import check_request
from rebeca_ray.sampling import sample_liked
from rebeca_ray.selector import Selector
from rebeca_ray.stickers.training_data import to_pixels
from rebeca_ray.storage import ChecksumHandler
from tests.conftest import TINY_NETWORK, USERS, D, wake, write_request, write_tiny_prior


def write_items(folder: Path) -> str:
    embeds = np.random.default_rng(3).standard_normal((20, D)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeds.ravel()), type=schemas.image_embeds(D))
    pq.write_table(pa.table({"item_id": [f"real-{number}" for number in range(20)], "image_embeds": column}), folder / "items.parquet")
    return str(folder / "items.parquet")


def configure(folder: Path, decoder: DecoderSettings) -> GenerateConfig:
    return GenerateConfig(
        prior=write_tiny_prior(folder),
        decoder=decoder,
        request=write_request(folder),
        root=str(folder / "catalog"),
        items=write_items(folder),
        num_images=3,
        sampler=SamplerSettings(num_inference_steps=4, batch_size=32, prior_guidance_scale=2.0, cpus_per_actor=0.5),
    )


@pytest.fixture
def config(tmp_path: Path, tiny_decoder: DecoderSettings) -> GenerateConfig:
    return configure(tmp_path, tiny_decoder)


@pytest.fixture(scope="module")
def generated(
    tmp_path_factory: pytest.TempPathFactory, tiny_decoder: DecoderSettings, ray_local: None
) -> tuple[GenerateConfig, dict[str, Any]]:
    """One run of the whole job, shared by the tests that only read it: its config and its manifest."""
    shared = configure(tmp_path_factory.mktemp("generated"), tiny_decoder)
    return shared, generate_catalog(shared)


def versions_of(config: GenerateConfig) -> dict[str, str]:
    return {"prior": fingerprint(read_prior_config(config.prior)), "decoder": decoder_fingerprint(config.decoder)}


def plan(config: GenerateConfig, request: pa.Table, histories: Histories | None = None) -> pa.Table:
    """The planned items of some rows of a request, by the stage itself."""
    bucket = [histories.bucket_of(user) if histories else 0 for user in request["user_id"].to_pylist()]
    return PlanUsers(config, versions_of(config), histories)(request.append_column("bucket", pa.array(bucket, pa.int32())))


def prepare(config: GenerateConfig, *, break_first: bool = False) -> Run:
    """Plan and render a run by calling the stages one after the other, without Ray."""
    run = Run.start(config)
    planned = plan(config, pq.read_table(config.request))
    if break_first:
        values = planned["image_embeds"].combine_chunks().flatten().to_numpy().copy()
        values[0] = np.nan
        column = pa.FixedSizeListArray.from_arrays(pa.array(values), type=schemas.image_embeds(D))
        planned = planned.set_column(planned.column_names.index("image_embeds"), "image_embeds", column)
    Path(run.plan).mkdir(parents=True)
    pq.write_table(planned, f"{run.plan}/plan.parquet")
    images = RenderImages(config.decoder)(planned.select(["item_id", "image_embeds", "prompt"]))
    filesystem = pyarrow.fs.PyFileSystem(ChecksumHandler(fsspec.filesystem("file"), run.checksums))
    pq.write_table(images, f"{run.root}/{run.images}/part-000001-a.parquet", filesystem=filesystem)
    return run


def test_a_complete_snapshot_is_published(generated: tuple[GenerateConfig, dict[str, Any]]) -> None:
    config, manifest = generated
    assert manifest["counts"] == {"requested": 16, "new": 16, "carried": 0, "population": 0, "failed": 0, "filtered": 0, "users": 5}
    snapshot = read_catalog(config.root)
    items = snapshot.items()
    assert items.schema.remove_metadata() == schemas.items(D)
    assert items["user_id"].to_pylist() == sorted(items["user_id"].to_pylist())
    assert [items.filter(np.array(items["user_id"]) == user)["rank"].to_pylist() for user in USERS[:5]] == [
        [0, 1, 2], [0, 1, 2, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2],
    ]  # fmt: skip
    assert len(set(items["item_id"].to_pylist())) == 16
    embeds = items["image_embeds"].combine_chunks().flatten().to_numpy().reshape(16, D)
    assert np.array_equal(embeds, embeds.astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 3.0, rtol=1e-3)

    real = pq.read_table(config.items)
    real_embeds = real["image_embeds"].combine_chunks().flatten().to_numpy().reshape(20, D)
    cosine = embeds @ real_embeds.T / np.linalg.norm(embeds, axis=1)[:, None] / np.linalg.norm(real_embeds, axis=1)
    assert items["nearest_item_id"].to_pylist() == [real["item_id"][int(best)].as_py() for best in cosine.argmax(1)]
    np.testing.assert_allclose(items["nearest_similarity"].to_numpy(), cosine.max(1), rtol=1e-4)

    images = to_pixels(snapshot.images(items))
    assert images.shape == (16, 16, 16, 3)
    rows = snapshot.table("images")
    assert rows.schema.remove_metadata() == schemas.IMAGES
    by_id = {row["item_id"]: row["image"]["bytes"] for row in rows.to_pylist()}
    assert snapshot.images(items) == [by_id[item] for item in items["item_id"].to_pylist()]


def test_the_file_list_describes_every_file_exactly(generated: tuple[GenerateConfig, dict[str, Any]]) -> None:
    config, _ = generated
    snapshot = read_catalog(config.root)
    for row in snapshot.files.to_pylist():
        data = (Path(config.root) / row["path"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert row["rows"] == pq.read_metadata(Path(config.root) / row["path"]).num_rows
    assert {row["table"] for row in snapshot.files.to_pylist()} == {"images", "items", "errors", "changes"}
    assert not list(Path(config.root).rglob("*.partial"))


def assert_same_items(left: pa.Table, right: pa.Table) -> None:
    """Identities, users, ranks and neighbours exactly; embeddings up to float rounding (and its half-precision step)."""
    for name in ("item_id", "user_id", "rank", "nearest_item_id", "origin"):
        assert left[name].to_pylist() == right[name].to_pylist(), name
    one, two = (table["image_embeds"].combine_chunks().flatten().to_numpy() for table in (left, right))
    np.testing.assert_allclose(one, two, atol=2e-3)


def assert_same_pixels(left: list[bytes], right: list[bytes]) -> None:
    difference = to_pixels(left).astype(int) - to_pixels(right)
    assert np.abs(difference).max() <= 3


def test_two_runs_agree_whatever_order_and_actors_and_the_second_follows(
    generated: tuple[GenerateConfig, dict[str, Any]], tmp_path: Path
) -> None:
    config, first = generated
    shutil.copytree(config.root, tmp_path / "catalog")  # the shared one stays as it is
    config = config.model_copy(update={"root": str(tmp_path / "catalog")})
    before = read_catalog(config.root)
    pq.write_table(pq.read_table(config.request).take([4, 2, 3, 1]), tmp_path / "shuffled.parquet")
    decoder = config.decoder.model_copy(update={"num_actors": 2, "cpus_per_actor": 0.5})
    second = generate_catalog(config.model_copy(update={"request": str(tmp_path / "shuffled.parquet"), "decoder": decoder}))
    after = read_catalog(config.root)
    kept = np.array(before.items()["user_id"]) != USERS[0]
    left, right = before.items().filter(kept), after.items()
    assert_same_items(left, right)
    assert_same_pixels(before.images(left), after.images(right))
    assert (first["epoch"], second["epoch"]) == (1, 2)
    changes = after.table("changes").to_pylist()
    assert [(row["user_id"], row["change"]) for row in changes] == [(USERS[0], "removed")] * 3
    assert before.items().num_rows == 16  # a reader that holds the first snapshot still reads it


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(st.tuples(st.sampled_from(USERS), st.none() | st.integers(1, 5)), min_size=1, unique_by=lambda row: row[0]),
    cut=st.integers(0, len(USERS)),
)
def test_any_request_is_planned_item_by_item_whatever_the_batches(
    config: GenerateConfig, asked: list[tuple[str, int | None]], cut: int
) -> None:
    """Every user gets their count, ranks without a gap, and the very same items however the request is cut."""
    users, counts = (list(column) for column in zip(*asked, strict=True))
    request = pa.table({"user_id": users, "num_images": pa.array(counts, pa.int32())})
    whole = plan(config, request)
    wanted = {user: count or config.num_images for user, count in asked}
    assert [(row["user_id"], row["rank"]) for row in whole.to_pylist()] == [(u, rank) for u in users for rank in range(wanted[u])]
    assert len(set(whole["item_id"].to_pylist())) == whole.num_rows
    parts = [plan(config, part) for part in (request.slice(0, cut), request.slice(cut)) if part.num_rows]
    assert pa.concat_tables(parts).combine_chunks() == whole.combine_chunks()


def test_failed_rows_are_kept_apart_and_the_budget_decides(config: GenerateConfig) -> None:
    run = prepare(config, break_first=True)
    with pytest.raises(ErrorBudgetExceededError, match=r"1 of 16 items failed \(image_embeds is not finite\)") as caught:
        assemble(run, requested=16, error_budget=0.01, versions={})
    assert caught.value.exit_code == 3
    assert published(config.root) is None
    manifest = assemble(run, requested=16, error_budget=0.1, versions={})
    assert (manifest["counts"]["new"], manifest["counts"]["failed"]) == (15, 1)
    snapshot = open_snapshot(config.root, run.snapshot)
    error = snapshot.table("errors").to_pylist()[0]
    assert (error["stage"], error["error"]) == ("render", "image_embeds is not finite")
    items = snapshot.items()
    assert error["item_id"] not in items["item_id"].to_pylist()
    assert items.filter(np.array(items["user_id"]) == error["user_id"])["rank"].to_pylist() == [0, 1]  # no gap


def test_a_partial_run_is_not_published(config: GenerateConfig) -> None:
    run = prepare(config)
    with pytest.raises(IncompleteRunError, match="17 items requested, 16 planned, 16 rendered; nothing is published") as caught:
        assemble(run, requested=17, error_budget=0.1, versions={})
    assert caught.value.exit_code == 75
    for record in Path(run.checksums).glob("*.json"):
        record.unlink()  # what a kill in the middle of a write leaves: a file without its record
    with pytest.raises(IncompleteRunError, match="no finished image file"):
        assemble(run, requested=16, error_budget=0.1, versions={})
    assert not (Path(config.root) / "latest.json").exists()


def test_a_batch_that_fails_costs_only_the_row_at_fault(tiny_decoder: DecoderSettings) -> None:
    stage = RenderImages(tiny_decoder)
    whole = stage.decoder.decode

    def picky(embeds: np.ndarray, seeds: Any, prompts: Any) -> np.ndarray:
        if "bad" in prompts:
            raise RuntimeError("out of\nluck")
        return whole(embeds, seeds, prompts)

    stage.decoder.decode = picky  # type: ignore[method-assign]
    embeds = np.random.default_rng(0).standard_normal((3, D)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeds.ravel()), type=schemas.image_embeds(D))
    out = stage(pa.table({"item_id": ["a", "b", "c"], "image_embeds": column, "prompt": ["", "bad", ""]}))
    assert out.schema == schemas.IMAGES
    assert out["item_id"].to_pylist() == ["a", "b", "c"]
    assert out["error"].to_pylist() == [None, "RuntimeError: out of luck", None]
    assert [row["image"] is None for row in out.to_pylist()] == [False, True, False]


@pytest.mark.parametrize(
    ("request_table", "message"),
    [
        ({"user": ["user-0"]}, "column 'user_id' is missing"),
        ({"user_id": pa.array([], pa.string())}, "has no rows"),
        ({"user_id": ["user-0", "", None]}, "2 rows have an empty user_id"),
        ({"user_id": ["user-0", "user-0"]}, "1 user_ids are repeated"),
        ({"user_id": ["user-0"], "num_images": pa.array([0], pa.int32())}, "num_images goes from 0 to 0"),
        ({"user_id": ["user-0"], "num_images": pa.array([40_000], pa.int32())}, "num_images goes from 40000 to 40000; ask for 1 to 32,767"),
        ({"user_id": pa.array([7], pa.int64())}, "column 'user_id' is int64, expected string"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(
    config: GenerateConfig, tmp_path: Path, request_table: dict[str, Any], message: str
) -> None:
    pq.write_table(pa.table(request_table), tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=message):
        generate_catalog(config.model_copy(update={"request": str(tmp_path / "bad.parquet")}))
    assert not Path(config.root).exists()


def test_a_prior_that_does_not_fit_the_decoder_is_refused(config: GenerateConfig) -> None:
    path = Path(config.prior) / "config.json"
    told = json.loads(path.read_text())
    told["scaler"]["embed_dim"] = 24
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"draws embeddings of size 24, decoder .* reads 16"):
        generate_catalog(config)
    assert not Path(config.root).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": {"num_inference_steps": 101}}, r"prior .*: sampler.num_inference_steps is 101, it was trained on 100"),
        ({"decoder": {"model": "/no/such/decoder"}}, r"no model_index.json there; give a diffusers directory"),
        ({"items": "nothing.parquet"}, "items .*nothing.parquet: not found"),
    ],
)
def test_what_the_models_cannot_do_is_refused_before_anything_is_written(
    config: GenerateConfig, changes: dict[str, Any], message: str
) -> None:
    told = config.model_dump()
    for name, value in changes.items():
        told[name] = {**told[name], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message):
        generate_catalog(GenerateConfig.model_validate(told))
    assert not Path(config.root).exists()


def test_a_prior_without_condition_dropout_refuses_guidance(config: GenerateConfig) -> None:
    path = Path(config.prior) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "condition_dropout": 0.0}))
    with pytest.raises(UserError, match=r"prior_guidance_scale is 2.0, but prior .* was trained without condition dropout"):
        generate_catalog(config)
    assert not Path(config.root).exists()


def test_real_items_by_another_clip_are_refused(config: GenerateConfig) -> None:
    wide = np.zeros((2, 24), np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(wide.ravel()), type=schemas.image_embeds(24))
    pq.write_table(pa.table({"item_id": ["a", "b"], "image_embeds": column}), str(config.items))
    with pytest.raises(UserError, match=r"embeddings of size 24 by CLIP None, the prior knows size 16"):
        generate_catalog(config)


def test_a_prior_replaced_while_planning_is_noticed(config: GenerateConfig) -> None:
    with pytest.raises(UserError, match="was replaced while this run was planning; run again"):
        PlanUsers(config, {"prior": "another version", "decoder": "any"}, None)


def test_a_damaged_prior_is_refused_before_anything_is_planned(config: GenerateConfig) -> None:
    path = Path(config.prior) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="model.safetensors is not the file config.json describes"):
        generate_catalog(config)
    assert not list(Path(config.root).iterdir())


def test_a_request_may_have_dictionary_encoded_users(config: GenerateConfig, tmp_path: Path) -> None:
    users = pa.table({"user_id": pa.array(USERS[:3]).dictionary_encode()})
    pq.write_table(users, tmp_path / "categorical.parquet")
    assert check_request(config.model_copy(update={"request": str(tmp_path / "categorical.parquet")})) == 3 * config.num_images


def test_a_run_id_is_used_once(config: GenerateConfig) -> None:
    run = prepare(config)
    with pytest.raises(UserError, match=rf"run_id {run.run_id} was used before \(.*/images/run_id={run.run_id}"):
        generate_catalog(config.model_copy(update={"run_id": run.run_id}))


def test_a_decoder_that_overflows_draws_no_black_image_and_nothing_twice(tiny_decoder: DecoderSettings) -> None:
    stage = RenderImages(tiny_decoder)
    batches = []

    def overflow_in_the_second_row(module: torch.nn.Module, inputs: tuple[torch.Tensor], pixels: torch.Tensor) -> None:
        batches.append(len(pixels))
        pixels[1, 0, 3, 3] = torch.inf

    stage.decoder.vae.decoder.conv_out.register_forward_hook(overflow_in_the_second_row)  # type: ignore[arg-type]
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(3 * D, np.float32)), type=schemas.image_embeds(D))
    rows = stage(pa.table({"item_id": ["a", "b", "c"], "image_embeds": column, "prompt": [""] * 3})).to_pylist()
    assert [row["image"] is None for row in rows] == [False, True, False]
    assert [row["error"] for row in rows] == [None, "the decoder drew values that are not finite in float32", None]
    assert batches == [tiny_decoder.batch_size]


def test_images_of_repeated_rows_are_all_found(generated: tuple[GenerateConfig, dict[str, Any]]) -> None:
    snapshot = read_catalog(generated[0].root)
    one, other = snapshot.images(snapshot.items().slice(0, 2))
    assert snapshot.images(snapshot.items().take([0, 1, 0])) == [one, other, one]


def test_a_root_that_cannot_be_written_is_refused(config: GenerateConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        generate_catalog(config.model_copy(update={"root": str(tmp_path / "file" / "catalog")}))


def test_only_one_of_two_runs_that_started_together_publishes(tmp_path: Path) -> None:
    root = str(tmp_path)
    publish(root, "snapshots/a", run_id="a", run_date="2026-01-01", epoch=1)
    with pytest.raises(LostRaceError, match="run a published epoch 1") as caught:
        publish(root, "snapshots/b", run_id="b", run_date="2026-01-01", epoch=1)
    assert caught.value.exit_code == 5
    assert read_pointer(root)[0]["run_id"] == "a"  # type: ignore[index]


def test_one_user_in_place_of_a_list_is_refused(generated: tuple[GenerateConfig, dict[str, Any]]) -> None:
    snapshot = read_catalog(generated[0].root)
    assert snapshot.items(user_ids=[USERS[1]])["rank"].to_pylist() == [0, 1, 2, 3]
    with pytest.raises(TypeError, match=r"give a list of users, \['user-1'\]"):
        snapshot.items(user_ids=USERS[1])  # type: ignore[arg-type]


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing is published there \(no latest.json\)"):
        read_catalog(str(tmp_path))
    publish(str(tmp_path), "snapshots/a", run_id="a", run_date="2026-01-01", epoch=1)
    with pytest.raises(UserError, match=r"has no manifest.json"):
        read_catalog(str(tmp_path))


def test_the_same_on_s3(generated: tuple[GenerateConfig, dict[str, Any]]) -> None:
    """Everything on S3: prior, request, items, catalog."""
    config, local = generated
    expected = read_catalog(config.root)
    filesystem = fsspec.filesystem("s3")
    filesystem.put(config.prior, "rebeca/in/prior", recursive=True)
    filesystem.put_file(config.request, "rebeca/in/request.parquet")
    filesystem.put_file(config.items, "rebeca/in/items.parquet")
    on_s3 = config.model_copy(
        update={
            "prior": "s3://rebeca/in/prior",
            "request": "s3://rebeca/in/request.parquet",
            "items": "s3://rebeca/in/items.parquet",
            "root": "s3://rebeca/catalog",
        }
    )
    manifest = generate_catalog(on_s3)
    assert manifest["counts"] == local["counts"]
    assert manifest["epoch"] == 1
    there = read_catalog(on_s3.root)
    assert_same_items(there.items(), expected.items())
    assert_same_pixels(there.images(there.items()), expected.images(expected.items()))


def write_history_prior(folder: Path, user_encoder: str) -> str:
    """A prior with random weights that knows users by their history, or not at all."""
    torch.manual_seed(0)
    settings = TINY_NETWORK.model_copy(update={"user_encoder": user_encoder, "max_history": 4})
    selector = Selector(D, num_factors=4)
    prior = TrainedPrior(
        network=wake(Prior(settings, D)),
        settings=settings,
        diffusion=DiffusionSettings(num_train_timesteps=100),
        scaler=EmbedScaler(embed_dim=D, norm=3.0),
        sampling=PriorSampling(prior_guidance_scale=2.0),
        condition_dropout=0.15,
        clip=None,
        selector=selector,
    )
    save_prior(prior, str(folder / user_encoder))
    return str(folder / user_encoder)


def write_histories(folder: Path, **ratings: list[tuple[int, float]]) -> InteractionSettings:
    rows = [(user.replace("_", "-"), f"real-{item}", rating) for user, rated in ratings.items() for item, rating in rated]
    user, item, rating = zip(*rows, strict=True)
    columns = {"user_id": user, "item_id": item, "rating": pa.array(rating, pa.float32())}
    pq.write_table(pa.table(columns), folder / "interactions.parquet")
    return InteractionSettings(path=str(folder / "interactions.parquet"))


def plan_with_histories(config: GenerateConfig, users: list[str]) -> list[dict[str, Any]]:
    run = Run.start(config)
    return plan(config, pa.table({"user_id": users}), request_histories(config, run)).to_pylist()


def test_who_has_rated_anything_is_served_and_who_has_not_gets_the_population(config: GenerateConfig, tmp_path: Path) -> None:
    interactions = write_histories(tmp_path, user_0=[(1, 5.0), (2, 1.0)], new_user=[(3, 4.0)], grumpy=[(4, 1.0), (5, 2.0)])
    config = config.model_copy(update={"prior": write_history_prior(tmp_path, "history"), "interactions": interactions})
    check_request(config)
    rows = plan_with_histories(config, ["user-0", "stranger", "new-user", "grumpy"])
    assert [row["origin"] for row in rows] == ["new"] * 3 + ["population"] * 3 + ["new"] * 6
    assert all(0 < row["like_probability"] < 1 for row in rows)
    before = {row["item_id"]: row["image_embeds"] for row in rows}

    changed = write_histories(tmp_path, user_0=[(1, 5.0), (2, 1.0)], new_user=[(3, 4.0), (6, 5.0)], grumpy=[(4, 1.0), (5, 2.0)])
    again = plan_with_histories(config.model_copy(update={"interactions": changed}), ["user-0", "stranger", "new-user", "grumpy"])
    same = [row["item_id"] in before for row in again]
    assert same == [True] * 6 + [False] * 3 + [True] * 3  # new taste, new items; the others' stay, embedding and all
    assert all(before[row["item_id"]] == row["image_embeds"] for row, kept in zip(again, same, strict=True) if kept)


def test_a_prior_by_id_gives_strangers_the_population(config: GenerateConfig) -> None:
    rows = plan(config, pa.table({"user_id": ["user-1", "stranger"]})).to_pylist()
    assert [row["origin"] for row in rows] == ["new"] * 3 + ["population"] * 3


def test_a_prior_without_users_is_the_populations(config: GenerateConfig, tmp_path: Path) -> None:
    config = config.model_copy(update={"prior": write_history_prior(tmp_path, "none")})
    assert {row["origin"] for row in plan(config, pa.table({"user_id": ["user-1"]})).to_pylist()} == {"population"}


def test_a_history_prior_says_what_it_needs(config: GenerateConfig, tmp_path: Path) -> None:
    config = config.model_copy(update={"prior": write_history_prior(tmp_path, "history")})
    with pytest.raises(UserError, match="knows users by their history: set `interactions`"):
        check_request(config)
    config = config.model_copy(update={"interactions": write_histories(tmp_path, user_0=[(1, 5.0)]), "items": None})
    with pytest.raises(UserError, match="interactions: need `items` too"):
        check_request(config)


def test_one_candidate_an_item_is_plain_sampling_and_more_are_a_choice_among_them(config: GenerateConfig) -> None:
    users = pa.table({"user_id": USERS[:2]})
    plain, chosen = (
        plan(config.model_copy(update={"selection": SelectionSettings(candidates_per_item=count)}), users).to_pylist() for count in (1, 4)
    )
    prior = load_prior(config.prior)
    sampler = config.sampler.resolve(prior.sampling, 100)
    settings = PlanUsers(
        config.model_copy(update={"selection": SelectionSettings(candidates_per_item=1)}), versions_of(config), None
    ).settings
    digests = prior.users["history_digest"].to_pylist()  # type: ignore[index]
    keys = [
        identity.plan_key(prior=prior.fingerprint, settings=settings, user_id=user, history_digest=digest, generation=0)
        for user, digest in zip(USERS[:2], digests, strict=False)
    ]
    seeds = [identity.candidate_seed(key, number) for key in keys for number in range(3)]
    tokens = prior.user_tokens(np.array([0, 1]), None)
    x = sample_liked(prior.network, Diffusion.build(prior.diffusion), tokens, np.repeat([0, 1], 3), seeds, sampler)
    expected = prior.scaler.unscale(x).numpy().astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(np.array([row["image_embeds"] for row in plain]), expected)
    assert [row["rank"] for row in plain] == [0, 1, 2] * 2
    assert [row["rank"] for row in chosen] == [0, 1, 2] * 2


def test_population_items_are_counted_apart(config: GenerateConfig) -> None:
    pq.write_table(pa.table({"user_id": ["user-1", "stranger"]}), config.request)
    run = prepare(config)
    counts = assemble(run, requested=6, error_budget=0, versions={})["counts"]
    assert (counts["requested"], counts["new"], counts["population"]) == (6, 3, 3)
    assert open_snapshot(config.root, run.snapshot).items()["origin"].to_pylist() == ["population"] * 3 + ["new"] * 3
