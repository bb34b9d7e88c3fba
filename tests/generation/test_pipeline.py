"""The main job on real Ray and real storage: a complete snapshot is published, a partial one never."""

import hashlib
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from rebeca_ray import schemas
from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.manifest import Counts, DecisionCounts, Manifest
from rebeca_ray.catalog.read import open_snapshot, published, read_catalog
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import GateSettings, LayoutSettings
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.decoder.interface import DecodedImage, Rows
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.errors import ErrorBudgetExceededError, QualityGateError, ResumableError, UserError
from rebeca_ray.generation.parts import BUSY
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.generation.render import Rendered, RenderImages, read_records
from rebeca_ray.generation.request import check_request
from rebeca_ray.identity import bucket_of, image_seed
from rebeca_ray.prior.selector import Selector
from rebeca_ray.stickers.build.data import to_pixels
from tests.conftest import (
    USERS,
    D,
    assembled,
    generate_config,
    prepare,
    prior_users,
    publish,
    write_tiny_prior,
)


@pytest.fixture(scope="module")
def generated(
    tmp_path_factory: pytest.TempPathFactory, tiny_decoder: DecoderSettings, ray_local: None
) -> tuple[GenerateConfig, Manifest]:
    """One run of the whole job, shared by the tests that only read it: its config and its manifest."""
    shared = generate_config(tmp_path_factory.mktemp("generated"), tiny_decoder)
    return shared, generate_catalog(shared).manifest


@pytest.fixture(scope="module")
def on_s3(generated: tuple[GenerateConfig, Manifest]) -> dict[str, str]:
    """The same prior, request and items on S3, and a catalog there."""
    config, _ = generated
    filesystem = fsspec.filesystem("s3")
    filesystem.put(config.prior, "rebeca/in/prior", recursive=True)
    filesystem.put_file(config.request, "rebeca/in/request.parquet")
    filesystem.put_file(config.items, "rebeca/in/items.parquet")
    return {
        "prior": "s3://rebeca/in/prior",
        "request": "s3://rebeca/in/request.parquet",
        "items": "s3://rebeca/in/items.parquet",
        "catalog": "s3://rebeca/catalog",
    }


def test_a_complete_snapshot_is_published(generated: tuple[GenerateConfig, Manifest]) -> None:
    config, manifest = generated
    assert manifest.counts == Counts(
        requested=16,
        new=16,
        carried=0,
        population=0,
        failed=0,
        filtered=0,
        deferred=0,
        users=5,
        stale_users=0,
    )
    snapshot = read_catalog(config.catalog)
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
    cosine = (
        embeds @ real_embeds.T / np.linalg.norm(embeds, axis=1)[:, None] / np.linalg.norm(real_embeds, axis=1)
    )
    assert items["nearest_item_id"].to_pylist() == [
        real["item_id"][int(best)].as_py() for best in cosine.argmax(1)
    ]
    np.testing.assert_allclose(items["nearest_similarity"].to_numpy(), cosine.max(1), rtol=1e-4)

    images = to_pixels(snapshot.images(items))
    assert images.shape == (16, 16, 16, 3)
    rows = snapshot.table("images")
    assert rows.schema.remove_metadata() == schemas.IMAGES
    by_id = {row["item_id"]: row["image"]["bytes"] for row in rows.to_pylist()}
    assert snapshot.images(items) == [by_id[item] for item in items["item_id"].to_pylist()]


def test_the_file_list_describes_every_file_exactly(generated: tuple[GenerateConfig, Manifest]) -> None:
    config, _ = generated
    snapshot = read_catalog(config.catalog)
    for row in snapshot.files.to_pylist():
        data = (Path(config.catalog) / row["path"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert row["rows"] == pq.read_metadata(Path(config.catalog) / row["path"]).num_rows
    assert {row["table"] for row in snapshot.files.to_pylist()} == {
        "images",
        "items",
        "users",
        "changes",
    }  # nothing failed
    assert not (Path(config.catalog) / "work" / f"run_id={snapshot.manifest.run_id}").exists()
    assert not list(Path(config.catalog).rglob("*.partial"))


def assert_same_items(left: pa.Table, right: pa.Table) -> None:
    """Compare ids, users, ranks and neighbours exactly, embeddings up to rounding in half precision."""
    for name in ("item_id", "user_id", "rank", "nearest_item_id"):
        assert left[name].to_pylist() == right[name].to_pylist(), name
    one, two = (table["image_embeds"].combine_chunks().flatten().to_numpy() for table in (left, right))
    np.testing.assert_allclose(one, two, atol=2e-3)


def assert_same_pixels(left: list[bytes], right: list[bytes]) -> None:
    difference = to_pixels(left).astype(int) - to_pixels(right)
    assert np.abs(difference).max() <= 3


def test_two_runs_agree_whatever_their_order_actors_buckets_shards_files_and_store(
    generated: tuple[GenerateConfig, Manifest], on_s3: dict[str, str], tmp_path: Path
) -> None:
    """Another catalog, on S3 and cut into buckets, shards and files, agrees with the first item by item."""
    config, _ = generated
    before = read_catalog(config.catalog)
    pq.write_table(pq.read_table(config.request).take([4, 2, 3, 1]), tmp_path / "shuffled.parquet")
    decoder = config.decoder.model_copy(update={"num_actors": 2, "cpus_per_actor": 0.5})
    layout = LayoutSettings(num_buckets=3, items_per_shard=7, images_per_file=4)
    update = {
        **on_s3,
        "catalog": "s3://rebeca/cut",
        "request": str(tmp_path / "shuffled.parquet"),
        "decoder": decoder,
        "layout": layout,
    }
    manifest = generate_catalog(config.model_copy(update=update)).manifest
    after = read_catalog("s3://rebeca/cut")
    left = before.items().filter(np.array(before.items()["user_id"]) != USERS[0])
    right = after.items().sort_by([("user_id", "ascending"), ("rank", "ascending")])
    assert_same_items(left, right)
    assert_same_pixels(before.images(left), after.images(right))
    assert manifest.decisions == DecisionCounts(planned_users=4, planned_items=13, shards=2)
    assert (manifest.num_buckets, manifest.measured.stages["render"].rows) == (3, 13)
    folders = {row["path"].split("/")[2] for row in after.files.to_pylist() if row["table"] == "images"}
    assert folders == {f"bucket={bucket_of(user, 3)}" for user in USERS[1:5]}


def test_failed_items_are_listed_separately_and_the_budget_decides(config: GenerateConfig) -> None:
    prepared = prepare(config, break_first=True)
    run = prepared.run
    with pytest.raises(
        ErrorBudgetExceededError, match=r"1 of 16 items failed \(image_embeds is not finite\)"
    ) as caught:
        assembled(config, prepared, error_budget=0.01)
    assert caught.value.exit_code == 3
    assert published(config.catalog) is None
    manifest = assembled(config, prepared, error_budget=0.1)
    assert (manifest.counts.new, manifest.counts.failed) == (15, 1)
    snapshot = open_snapshot(config.catalog, run.snapshot)
    error = snapshot.table("errors").to_pylist()[0]
    assert (error["stage"], error["error"]) == ("render", "image_embeds is not finite")
    items = snapshot.items()
    assert error["item_id"] not in items["item_id"].to_pylist()
    ranks = items.filter(np.array(items["user_id"]) == error["user_id"])["rank"].to_pylist()
    assert ranks == [0, 1]  # no gap


def test_a_partial_run_is_not_published(config: GenerateConfig) -> None:
    prepared = prepare(config)
    with pytest.raises(ResumableError, match=r"17 items requested, 16 accounted for .*nothing is published"):
        assembled(config, prepared, requested=17)
    for record in Path(prepared.run.records(0)).glob("*.json"):
        record.unlink()  # a kill in the middle of a write leaves a file without its record
    assert read_records(prepared.run, 0) == []
    with pytest.raises(ResumableError, match="16 of 16 planned items were not rendered"):
        assembled(config, prepared._replace(rendered=Rendered(files=[], timed_out=False)))
    assert not (Path(config.catalog) / "latest.json").exists()


def planned_rows(count: int) -> pa.Table:
    embeds = np.random.default_rng(0).standard_normal((count, D)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeds.ravel()), type=schemas.image_embeds(D))
    columns = {
        "prompt": [""] * count,
        "negative_prompt": [""] * count,
        "bucket": pa.array([5] * count, pa.int32()),
    }
    item_ids = [f"item-{number}" for number in range(count)]
    return pa.table({"item_id": item_ids, "image_embeds": column, **columns})


def test_rendering_keeps_the_order_of_the_rows(
    tiny_decoder: DecoderSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = RenderImages(tiny_decoder)
    whole = stage.decoder.decode

    def decode(rows: Rows) -> list[DecodedImage]:
        images = whole(rows)
        return [
            images[0],
            DecodedImage(seed=7, error="bad luck"),
            DecodedImage(seed=8, safety_probability=0.75),
        ]

    monkeypatch.setattr(stage.decoder, "decode", decode)
    out = stage(planned_rows(3))
    assert out.drop_columns(["bucket", BUSY]).schema == schemas.IMAGES
    rows = out.to_pylist()
    assert [row["bucket"] for row in rows] == [5] * 3
    assert stage.__class__(tiny_decoder, deadline=1.0)(planned_rows(3)).num_rows == 0  # time ran out in 1970
    assert [row["item_id"] for row in rows] == ["item-0", "item-1", "item-2"]
    assert [row["error"] for row in rows] == [None, "bad luck", None]
    assert [row["seed"] for row in rows] == [image_seed("item-0"), 7, 8]
    assert [row["safety_probability"] for row in rows] == [None, None, 0.75]
    assert rows[0]["image"]["path"] == "item-0.png"
    assert [row["image"] is None for row in rows] == [False, True, True]


def test_unsafe_images_are_filtered_or_flagged(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sixteen items one is left out, and one is shown all the same, by a decoder with another policy."""
    decoder = config.decoder.model_copy(update={"batch_size": 16})  # one call of the decoder
    config = config.model_copy(update={"decoder": decoder})
    whole = LocalDecoder.decode

    def decode(self: LocalDecoder, rows: Rows) -> list[DecodedImage]:
        images = whole(self, rows)
        return [
            DecodedImage(seed=1, safety_probability=0.9),
            replace(images[1], safety_probability=0.8),
            *images[2:],
        ]

    monkeypatch.setattr(LocalDecoder, "decode", decode)
    prepared = prepare(config)
    run = prepared.run
    counts = assembled(config, prepared).counts
    assert (counts.requested, counts.new, counts.filtered, counts.failed) == (16, 15, 1, 0)
    items = open_snapshot(config.catalog, run.snapshot).items()
    assert items["safety_flag"].to_pylist().count(True) == 1
    images = {
        row["item_id"]: row["safety_probability"]
        for row in open_snapshot(config.catalog, run.snapshot).table("images").to_pylist()
    }
    flagged = items.filter(items["safety_flag"])["item_id"][0].as_py()
    assert images[flagged] == pytest.approx(0.8)
    first = items.filter(pc.equal(items["user_id"], items["user_id"][0]))
    assert first["rank"].to_pylist() == list(range(len(first)))  # no gap


def test_a_request_may_have_dictionary_encoded_users(config: GenerateConfig, tmp_path: Path) -> None:
    users = pa.table({"user_id": pa.array(USERS[:3]).dictionary_encode()})
    pq.write_table(users, tmp_path / "categorical.parquet")
    config = config.model_copy(update={"request": str(tmp_path / "categorical.parquet")})
    assert check_request(config, identify_decoder(config.decoder)) == 3 * config.num_images


def test_a_run_id_is_used_once(config: GenerateConfig) -> None:
    prepared = prepare(config)
    assembled(config, prepared)
    with hold_lease(config.catalog, "a pointer", 60):
        pass
    with pytest.raises(UserError, match=f"run_id {prepared.run.run_id} was used before; choose another"):
        generate_catalog(config.model_copy(update={"run_id": prepared.run.run_id}))


def test_repeated_rows_get_all_their_images(generated: tuple[GenerateConfig, Manifest]) -> None:
    snapshot = read_catalog(generated[0].catalog)
    one, other = snapshot.images(snapshot.items().slice(0, 2))
    assert snapshot.images(snapshot.items().take([0, 1, 0])) == [one, other, one]


def test_one_user_instead_of_a_list_is_refused(generated: tuple[GenerateConfig, Manifest]) -> None:
    snapshot = read_catalog(generated[0].catalog)
    assert snapshot.items(user_ids=[USERS[1]])["rank"].to_pylist() == [0, 1, 2, 3]
    with pytest.raises(TypeError, match=r"give a list of users, \['user-1'\]"):
        snapshot.items(user_ids=USERS[1])  # type: ignore[arg-type]


def test_reading_without_a_published_snapshot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is published there; give another root"):
        read_catalog(str(tmp_path))
    publish(str(tmp_path), Run(root=str(tmp_path), run_date="2026-01-01", run_id="a", fencing_token=1))
    with pytest.raises(UserError, match=r"has no manifest.json"):
        read_catalog(str(tmp_path))


def test_a_catalog_on_s3_is_the_same(
    generated: tuple[GenerateConfig, Manifest], on_s3: dict[str, str]
) -> None:
    """Everything on S3: prior, request, items, catalog."""
    config, local = generated
    expected = read_catalog(config.catalog)
    manifest = generate_catalog(config.model_copy(update=on_s3), in_process=True).manifest
    assert manifest.counts == local.counts
    assert manifest.fencing_token == 1
    snapshot = read_catalog(on_s3["catalog"])
    assert_same_items(snapshot.items(), expected.items())
    assert_same_pixels(snapshot.images(snapshot.items()), expected.images(expected.items()))


def test_an_impersonal_plan_is_neither_rendered_nor_published(config: GenerateConfig, tmp_path: Path) -> None:
    """No p-value of 10,000 permutations is below 1e-5, so that this gate stops any plan."""
    users = [f"user-{number}" for number in range(20)]
    prior = write_tiny_prior(tmp_path, users=prior_users(users), selector=Selector(D, 4))
    pq.write_table(pa.table({"user_id": users}), tmp_path / "request.parquet")
    gate = GateSettings(max_p_value=1e-5)
    config = config.model_copy(update={"prior": prior, "gate": gate, "num_images": 2})
    with pytest.raises(QualityGateError, match=r"20 users.*Nothing was rendered or published"):
        generate_catalog(config, in_process=True)
    assert published(config.catalog) is None
    assert not (Path(config.catalog) / "images").exists()
