"""Ratings of generated items: their embeddings come from the catalog and guide the next night."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from rebeca_ray import schemas
from rebeca_ray.catalog.gc import collect
from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.config.jobs import GenerateConfig, TrainConfig
from rebeca_ray.config.sections import (
    InteractionSettings,
    LayoutSettings,
    RefreshSettings,
    SamplerSettings,
    SelectionSettings,
)
from rebeca_ray.data.feedback import find_rated, with_rated
from rebeca_ray.data.histories import build_histories
from rebeca_ray.data.interactions import read_interactions
from rebeca_ray.data.items import read_image_embeds
from rebeca_ray.errors import UserError
from rebeca_ray.storage.filesystem import list_files
from rebeca_ray.training.train import train_prior
from tests.conftest import USERS, D, snapshot_of
from tests.generation.test_nights import change_digest, night
from tests.training.in_process import loop_in_process as loop_in_process  # a fixture

REAL = np.array(["real-0", "real-1"])


def rate(path: Path, rows: list[tuple[str, str, float | None, str | None]]) -> InteractionSettings:
    """Write interactions: user, item, rating and event."""
    user, item, rating, event = zip(*rows, strict=True)
    pq.write_table(
        pa.table(
            {
                "user_id": user,
                "item_id": item,
                "rating": pa.array(rating, pa.float32()),
                "event": pa.array(event, pa.string()),
            }
        ),
        path,
    )
    return InteractionSettings(path=str(path), hold_out=0.0)


def first_items(snapshot: Snapshot, *users: str) -> list[dict[str, Any]]:
    return [snapshot.for_user(user).slice(0, 1).to_pylist()[0] for user in users]


@pytest.mark.parametrize("num_buckets", [1, 3])
def test_rated_items_are_found_once_and_outlive_their_snapshot(
    config: GenerateConfig, tmp_path: Path, request: pytest.FixtureRequest, num_buckets: int
) -> None:
    if num_buckets > 1:
        request.getfixturevalue("ray_local")
    config = config.model_copy(update={"layout": LayoutSettings(num_buckets=num_buckets)})
    _, monday = night(config, [*USERS[:4], "newcomer"])
    one, two, shared = first_items(monday, USERS[0], USERS[1], "newcomer")
    rows = [
        (USERS[0], one["item_id"], 5.0, None),
        ("passer-by", shared["item_id"], 4.0, "rating"),
        (USERS[0], "real-0", 5.0, "rating"),
    ]
    impressions = [(USERS[2], first_items(monday, USERS[2])[0]["item_id"], None, "impression")]
    interactions = rate(tmp_path / "interactions.parquet", [*rows, *impressions])
    rated = find_rated(config.catalog, interactions, REAL, D, None)
    assert rated.schema.equals(schemas.embedded_items(D))
    assert {row["item_id"]: row["image_embeds"] for row in rated.to_pylist()} == {
        item["item_id"]: item["image_embeds"] for item in (one, shared)
    }
    assert len(list_files(f"{config.catalog}/rated")) == 1
    manifest = Path(config.catalog, monday.path, "manifest.json")
    record = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**record, "clip_fingerprint": "this-clip"}))
    assert find_rated(config.catalog, interactions, REAL, D, "another-clip").num_rows == 0
    assert find_rated(config.catalog, interactions, REAL, D + 1, "this-clip").num_rows == 0
    assert find_rated(config.catalog, interactions, REAL, D, "this-clip").equals(rated)
    manifest.write_text(json.dumps(record))

    for user in USERS[:4]:
        change_digest(config, user)
    night(config, USERS[:4], 1)
    night(config, USERS[:4], 2)
    of_another = monday.for_user(USERS[1])["item_id"][1].as_py()  # this user did not rate it
    later = rate(
        tmp_path / "interactions.parquet",
        [*rows, (USERS[1], two["item_id"], 1.0, None), (USERS[0], of_another, 5.0, None)],
    )
    # One of the three comes from a snapshot that is no longer published.
    assert find_rated(config.catalog, later, REAL, D, None).num_rows == 3
    collect(config.catalog, keep=1, grace_hours=0)
    assert read_catalog(config.catalog).items(["item_id"])["item_id"].to_pylist().count(one["item_id"]) == 0
    kept = find_rated(config.catalog, later, REAL, D, None)
    assert kept["item_id"].to_pylist() == sorted(item["item_id"] for item in (one, two, shared))
    assert len(list_files(f"{config.catalog}/rated/clip-{D}")) == 2
    items = read_image_embeds(str(config.items))
    together = with_rated(items, config.catalog, later)
    assert together.item_id.tolist() == [*items.item_id, *kept["item_id"].to_pylist()]
    assert np.array_equal(together.image_embeds[-3:], np.array(kept["image_embeds"].to_pylist(), np.float32))


def test_ratings_without_an_embedding_are_refused_for_real_items_and_dropped_for_generated_ones(
    config: GenerateConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    night(config, USERS[:2])
    rows = [(USERS[0], "real-0", 5.0, None), (USERS[0], "f" * 32, 5.0, None)]
    settings = rate(tmp_path / "interactions.parquet", rows)
    assert find_rated(config.catalog, settings, REAL, D, None).num_rows == 0
    histories = build_histories(settings, REAL, str(tmp_path / "storage"))
    assert pq.read_table(histories.file(0))["item_index"].to_pylist() == [[0]]
    assert "1 of 2 rate an item without an embedding (generated long ago" in caplog.text
    rate(Path(settings.path), [*rows, (USERS[0], "reel-1", 1.0, None)])
    with pytest.raises(
        UserError,
        match=r"1 of 2 rate an item that has no embedding \(reel-1\); .* interactions.unknown_items=drop",
    ):
        build_histories(settings, REAL, str(tmp_path / "storage"))
    histories = build_histories(
        settings.model_copy(update={"unknown_items": "drop"}), REAL, str(tmp_path / "storage")
    )
    assert pq.read_table(histories.file(0))["item_index"].to_pylist() == [[0]]


def test_a_damaged_snapshot_is_skipped_and_a_damaged_file_of_rated_items_stops_the_night(
    config: GenerateConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, monday = night(config, USERS[:2])
    change_digest(config, USERS[1])
    _, tuesday = night(config, USERS[:2], 1)
    one, two = first_items(monday, USERS[0], USERS[1])
    interactions = rate(
        tmp_path / "interactions.parquet",
        [(USERS[0], one["item_id"], 5.0, None), (USERS[1], two["item_id"], 5.0, None)],
    )
    Path(config.catalog, monday.manifest.files.path).write_bytes(b"damaged")
    assert find_rated(config.catalog, interactions, REAL, D, None)["item_id"].to_pylist() == [one["item_id"]]
    assert f"{monday.path}/manifest.json; ratings of its items are left out" in caplog.text
    Path(list_files(f"{config.catalog}/rated")[0]).write_bytes(b"damaged")
    with pytest.raises(
        UserError, match=r"rated items .*: not readable \(.*\); restore the damaged file, or remove it"
    ):
        find_rated(config.catalog, interactions, REAL, D, None)
    assert tuesday.for_user(USERS[0]).num_rows == 3


def test_impressions_are_no_ratings(tmp_path: Path) -> None:
    rows = [
        ("a", "real-0", 5.0, "rating"),
        ("a", "real-0", None, "impression"),
        ("a", "real-1", 3.0, ""),
        ("b", "real-1", None, "impression"),
    ]
    interactions = read_interactions(rate(tmp_path / "interactions.parquet", rows))
    assert interactions.user_id.tolist() == ["a"]
    assert dict(zip(interactions.item_id, interactions.like, strict=True)) == {"real-0": 1, "real-1": 0}
    settings = rate(tmp_path / "interactions.parquet", [("a", "real-0", 5.0, "click")])
    with pytest.raises(
        UserError,
        match=r"1 of 1 rows have an event that is neither rating nor impression \(rows 0\); name it so",
    ):
        read_interactions(settings)
    rate(Path(settings.path), [("a", "real-0", 5.0, "rating"), ("a", "f" * 32, 5.0, "click")])
    with pytest.raises(
        UserError,
        match=r"1 of 2 rows have an event that is neither rating nor impression \(rows 1\); name it so",
    ):
        find_rated(str(tmp_path / "catalog"), settings, REAL, D, None)


@pytest.fixture
def trained(tmp_path: Path, loop_in_process: None) -> TrainConfig:
    """Train a prior on two distant kinds of items. Users like one kind, the other, or both."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((2, D)) * 3
    embeds = (np.repeat(centres, 20, axis=0) + 0.3 * random.standard_normal((40, D))).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeds.ravel()), type=schemas.image_embeds(D))
    pq.write_table(
        pa.table({"item_id": [f"i{number:02d}" for number in range(40)], "image_embeds": column}),
        tmp_path / "real.parquet",
    )
    rows: list[tuple[str, str, float | None, str | None]] = []
    for number in range(24):
        liked = [{0}, {1}, {0, 1}][number % 3]
        for item in random.choice(40, 16, replace=False):
            rows.append((f"person-{number}", f"i{item:02d}", 5.0 if item // 20 in liked else 1.0, "rating"))
    for user in ("newcomer", "twin"):
        rows += [(user, f"i{item:02d}", 5.0, None) for item in (3, 23)]
    rate(tmp_path / "interactions.parquet", rows)
    config = TrainConfig.model_validate(
        {
            "interactions": {"path": str(tmp_path / "interactions.parquet")},
            "items": str(tmp_path / "real.parquet"),
            "out": str(tmp_path / "learnt"),
            "storage": str(tmp_path / "storage"),
            "network": {
                "num_layers": 2,
                "num_heads": 2,
                "width": 32,
                "num_tokens": 2,
                "user_encoder": "history",
                "max_history": 24,
            },
            "diffusion": {"num_train_timesteps": 100},
            "optimization": {
                "learning_rate": 3e-3,
                "batch_size": 64,
                "samples_per_user": 256,
                "max_epochs": 6,
                "ema_decay": 0.9,
            },
            "workers": {"cpus_per_worker": 0.5},
        }
    )
    train_prior(config)
    return config


def test_liked_generated_items_draw_the_next_night_towards_them(
    trained: TrainConfig, config: GenerateConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Between two nights the newcomer likes the rarer kind and dislikes the other. The twin rates nothing."""
    pq.write_table(pa.table({"user_id": ["newcomer", "twin"]}), config.request)
    config = config.model_copy(
        update={
            "prior": trained.out,
            "items": trained.items,
            "interactions": trained.interactions,
            "num_images": 16,
            "sampler": SamplerSettings(num_inference_steps=10, batch_size=32, cpus_per_actor=0.5),
            "selection": SelectionSettings(candidates_per_item=1),
            "refresh": RefreshSettings(rotation=0.0),
        }
    )
    assert snapshot_of(config).counts.new == 32
    monday = read_catalog(config.catalog)
    real = read_image_embeds(trained.items)
    kind_of = {item: int(number >= 20) for number, item in enumerate(real.item_id.tolist())}
    items = monday.for_user("newcomer").to_pylist()
    kinds = [kind_of[item["nearest_item_id"]] for item in items]
    assert set(kinds) == {0, 1}, "a user who likes both kinds gets both"
    rarer = min((0, 1), key=kinds.count)
    liked = [item for item, kind in zip(items, kinds, strict=True) if kind == rarer]
    ratings = [
        ("newcomer", item["item_id"], 5.0 if kind == rarer else 1.0, "rating")
        for item, kind in zip(items, kinds, strict=True)
    ]
    shown = [("twin", item, None, "impression") for item in monday.for_user("twin")["item_id"].to_pylist()]
    before = [tuple(row.values()) for row in pq.read_table(trained.interactions.path).to_pylist()]
    rate(Path(trained.interactions.path), [*before, *ratings, *shown])

    manifest = snapshot_of(config)
    assert (manifest.counts.new, manifest.counts.carried) == (16, 16)
    tuesday = read_catalog(config.catalog)
    centre = np.mean([item["image_embeds"] for item in liked], axis=0)
    then, now = (closeness(snapshot.for_user("newcomer"), centre) for snapshot in (monday, tuesday))
    assert now > then + 0.2
    kinds_now = [kind_of[item] for item in tuesday.for_user("newcomer")["nearest_item_id"].to_pylist()]
    assert kinds_now.count(rarer) > kinds.count(rarer) + 1
    assert tuesday.for_user("twin", ["item_id"]).equals(monday.for_user("twin", ["item_id"]))
    assert pc.all(
        pc.is_in(tuesday.items()["nearest_item_id"], value_set=pa.array(real.item_id.tolist()))
    ).as_py()  # never a generated one

    again = trained.model_copy(
        update={
            "out": str(tmp_path / "again"),
            "catalog": config.catalog,
            "optimization": trained.optimization.model_copy(update={"max_epochs": 1}),
        }
    )
    caplog.clear()
    assert train_prior(again)["best_epoch"] == 1
    assert "left out" not in caplog.text


def closeness(items: pa.Table, centre: np.ndarray) -> float:
    embeds = np.array(items["image_embeds"].to_pylist())
    return float(np.mean(embeds @ centre / np.linalg.norm(embeds, axis=1) / np.linalg.norm(centre)))
