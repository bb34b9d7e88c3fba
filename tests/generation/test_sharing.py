"""Nights on which users share images: the promises of a catalog hold, and a shared image is drawn once."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rebeca_ray import schemas
from rebeca_ray.catalog.exports.image_objects import export_images
from rebeca_ray.catalog.gc import collect
from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import LayoutSettings, RefreshSettings, SelectionSettings
from rebeca_ray.generation import pipeline
from rebeca_ray.generation.sharing import planned
from rebeca_ray.generation.sharing.planned import lenders_of
from rebeca_ray.identity import bucket_of
from rebeca_ray.prior.checkpoint import TrainedPrior, load_prior
from rebeca_ray.prior.selector import Selector
from rebeca_ray.ray_runtime import for_each
from tests.conftest import USERS, D, prior_users, snapshot_of, write_tiny_prior
from tests.generation.test_nights import by_user, change_digest, counts, night, request_for

BOUND = 0.4


def sharing(config: GenerateConfig, **update: Any) -> GenerateConfig:
    """A config that shares images."""
    return config.model_copy(update={"selection": SelectionSettings(share_within=BOUND), **update})


def owners(snapshot: Snapshot) -> dict[str, list[str]]:
    """The users of each shared item."""
    users: dict[str, list[str]] = {}
    for row in snapshot.items(["item_id", "user_id"]).to_pylist():
        users.setdefault(row["item_id"], []).append(row["user_id"])
    return {item: sorted(who) for item, who in users.items() if len(who) > 1}


def rendered_rows(snapshot: Snapshot) -> int:
    files = snapshot.files.filter(pc.equal(snapshot.files["table"], "images"))
    return int(pc.sum(files["rows"]).as_py())


def images_by_item(snapshot: Snapshot) -> dict[str, set[bytes]]:
    items = snapshot.items()
    images: dict[str, set[bytes]] = {}
    for item, image in zip(items["item_id"].to_pylist(), snapshot.images(items), strict=True):
        images.setdefault(item, set()).add(image)
    return images


def torch_of(items: pa.Table) -> torch.Tensor:
    flat = items["image_embeds"].combine_chunks().flatten().to_numpy().copy()
    return torch.from_numpy(flat).reshape(items.num_rows, -1)


def test_users_share_images_and_every_count_adds_up(
    config: GenerateConfig, caplog: pytest.LogCaptureFixture
) -> None:
    apart, alone = night(config, USERS)
    alone_items = {(row["user_id"], row["rank"]): row for row in alone.items().to_pylist()}
    with caplog.at_level(logging.INFO, logger="rebeca_ray"):
        manifest, snapshot = night(sharing(config), USERS, 1)
    shared = manifest.decisions.shared_items
    assert apart.decisions.shared_items == 0
    assert 3 <= shared < 21
    assert counts(manifest, "requested", "new", "users") == (21, 21, 7)
    assert rendered_rows(snapshot) == 21 - shared
    assert f"{shared} of 21 images are saved ({shared / 21:.1%}): users share them" in caplog.text
    assert sum(len(users) - 1 for users in owners(snapshot).values()) == shared
    for row in snapshot.items().to_pylist():
        before = alone_items[row["user_id"], row["rank"]]
        a, b = np.array(row["image_embeds"]), np.array(before["image_embeds"])
        assert 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) < BOUND
        lent = next(other for other in alone_items.values() if other["item_id"] == row["item_id"])
        assert row["image_embeds"] == lent["image_embeds"]
        assert row["nearest_item_id"] == lent["nearest_item_id"]
    assert {len(images) for images in images_by_item(snapshot).values()} == {1}


@pytest.mark.usefixtures("ray_local")
def test_ray_shares_the_images_that_this_process_shares(
    config: GenerateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, local = night(sharing(config), USERS)

    def on_ray(*arguments: Any, name: str, in_process: bool) -> list[Any]:
        assert in_process
        return for_each(*arguments, name=name, in_process=False)

    monkeypatch.setattr(planned, "for_each", on_ray)
    manifest, shared = night(sharing(config, catalog=str(tmp_path / "on-ray")), USERS)
    assert manifest.decisions.shared_items >= 3
    names = ["user_id", "rank", "item_id", "image_embeds", "like_probability"]
    assert shared.items(names).equals(local.items(names))
    assert images_by_item(shared) == images_by_item(local)


def test_a_run_that_is_killed_while_it_shares_or_later_gives_the_same_snapshot(
    config: GenerateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = request_for(sharing(config), USERS)
    snapshot_of(config)
    expected = read_catalog(config.catalog)
    again = config.model_copy(update={"catalog": str(tmp_path / "again")})

    def die(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    for module, name in ((planned, "with_busy_seconds"), (pipeline, "assemble")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, die)
            with pytest.raises(KeyboardInterrupt):
                snapshot_of(again)
    manifest = snapshot_of(again)
    resumed = read_catalog(again.catalog)
    assert manifest.decisions.shared_items == expected.manifest.decisions.shared_items > 0
    names = ["user_id", "rank", "item_id", "image_embeds", "like_probability"]
    assert resumed.items(names).equals(expected.items(names))
    assert images_by_item(resumed) == images_by_item(expected)
    assert rendered_rows(resumed) == rendered_rows(expected)


def test_an_image_stays_as_long_as_one_of_its_users_through_collection_compaction_and_export(
    config: GenerateConfig, tmp_path: Path
) -> None:
    def export(snapshot: Snapshot) -> None:
        export_images(snapshot, str(tmp_path / "export"), "/recs")

    _, alone = night(config.model_copy(update={"catalog": str(tmp_path / "alone")}), USERS)
    config = sharing(config)
    _, first = night(config, USERS)
    item, users = next(iter(owners(first).items()))
    # All but one of its users get other items. The one who stays borrowed the image.
    kept = next(user for user in users if item not in by_user(alone)[user])
    before = images_by_item(first)[item]
    export(first)
    for user in set(USERS) - {kept}:
        change_digest(config, user)
    manifest, second = night(config, USERS, 1)
    assert counts(manifest, "new", "carried") == (18, 3)
    assert item in by_user(second)[kept]
    assert any("compacted" in path for path in second.paths("images"))
    assert images_by_item(second)[item] == before
    export(second)
    _, third = night(config, USERS, 2)
    export(third)
    assert any(path.name.startswith(item) for path in (tmp_path / "export/objects").rglob("*.*"))
    collect(config.catalog, keep=1, grace_hours=0)
    assert images_by_item(read_catalog(config.catalog))[item] == before
    assert item not in owners(third)


def test_a_compaction_copies_a_shared_image_once(config: GenerateConfig) -> None:
    config = sharing(config)
    _, first = night(config, USERS)
    item, users = max(owners(first).items(), key=lambda pair: len(pair[1]))
    for user in set(USERS) - set(users[:2]):
        change_digest(config, user)
    _, second = night(config, USERS, 1)
    assert any("compacted" in path for path in second.paths("images"))
    rows = [row for row in second.items().to_pylist() if row["item_id"] == item]
    assert len(rows) == 2
    assert len({(row["image_file"], row["image_row"]) for row in rows}) == 1


def test_rescored_users_of_one_image_each_get_their_own_like_probability(
    config: GenerateConfig, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    uri = write_tiny_prior(tmp_path, users=prior_users(USERS), selector=Selector(D, 4))
    config = sharing(
        config,
        prior=uri,
        selection=SelectionSettings(share_within=1.0),
        refresh=RefreshSettings(on_new_prior="rescore"),
    )
    manifest, _ = night(config, USERS)
    assert manifest.decisions.shared_items > 0
    write_tiny_prior(tmp_path, users=prior_users(USERS), selector=Selector(D, 4))
    _, after = night(config, USERS, 1)
    prior = load_prior(uri)
    assert prior.selector is not None
    assert prior.selector.rows_VF is not None
    items = after.items()
    x_ND = prior.scaler.scale(torch_of(items))
    user_NF = prior.selector.rows_VF[[USERS.index(user) for user in items["user_id"].to_pylist()]]
    expected = prior.selector.like_probability(x_ND, user_NF).numpy()
    np.testing.assert_allclose(items["like_probability"].to_numpy(), expected, atol=1e-5)
    assert owners(after)


def test_a_borrower_is_judged_by_the_embedding_that_is_drawn(config: GenerateConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    uri = write_tiny_prior(tmp_path, users=prior_users(USERS), selector=Selector(D, 4))
    config = config.model_copy(update={"prior": uri})
    _, alone = night(config, USERS)
    alone_items = dict(
        zip(*(alone.items()[name].to_pylist() for name in ("item_id", "user_id")), strict=True)
    )
    _, snapshot = night(sharing(config, selection=SelectionSettings(share_within=1.0)), USERS, 1)
    prior = load_prior(uri)
    assert prior.selector is not None
    assert prior.selector.rows_VF is not None
    items = snapshot.items()
    borrowed = items.filter(
        pa.array([alone_items[row["item_id"]] != row["user_id"] for row in items.to_pylist()], pa.bool_())
    )
    assert borrowed.num_rows
    user_NF = prior.selector.rows_VF[[USERS.index(user) for user in borrowed["user_id"].to_pylist()]]
    expected = prior.selector.like_probability(prior.scaler.scale(torch_of(borrowed)), user_NF).numpy()
    np.testing.assert_allclose(borrowed["like_probability"].to_numpy(), expected, atol=1e-5)


def test_another_number_of_buckets_plans_those_again_whom_it_separates(config: GenerateConfig) -> None:
    config = sharing(config, selection=SelectionSettings(share_within=0.3))
    _, first = night(config, USERS)
    separated = {
        user
        for users in owners(first).values()
        for user in users
        if len({bucket_of(other, 3) for other in users}) > 1
    }
    assert 0 < len(separated) < len(USERS)
    cut = sharing(config, layout=LayoutSettings(num_buckets=3), selection=SelectionSettings(share_within=0.3))
    manifest, after = night(cut, USERS, 1)
    assert counts(manifest, "new", "carried") == (3 * len(separated), 21 - 3 * len(separated))
    for users in owners(after).values():
        assert len({bucket_of(user, 3) for user in users}) == 1


def test_variants_newcomers_and_other_prompts_share_nothing(config: GenerateConfig) -> None:
    config = sharing(config, selection=SelectionSettings(share_within=1.0))
    users = [*USERS, "stranger", "poet"]
    prompts = ["", "", "a", "a", "b", "", "", "", "a"]
    given = [*[None] * 5, "real-1", "real-1", None, None]
    strength = pa.array([*[None] * 5, 0.5, 0.5, None, None], pa.float32())
    tonight = request_for(config, users, prompt=prompts, item_id=given, strength=strength)
    manifest = snapshot_of(tonight)
    assert manifest.counts.requested == 27
    pairs = {tuple(who) for who in owners(read_catalog(config.catalog)).values()}
    assert tuple(USERS[:2]) in pairs
    assert pairs <= {("", "stranger"), tuple(USERS[:2]), tuple(USERS[2:4])}


def planned_rows(prior: TrainedPrior, seed: int, count: int) -> pa.Table:
    random = np.random.default_rng(seed)
    embeds = random.standard_normal((count, D)).astype(np.float32)
    embeds[:, 2:] *= 0.1
    names = {
        "item_id": [f"{number:032x}" for number in random.permutation(count)],
        "user_id": [f"user-{number}" for number in random.integers(0, 6, count)],
        "prompt": random.choice(["", "a"], count).tolist(),
        "negative_prompt": random.choice(["", "b"], count).tolist(),
    }
    factors = random.standard_normal((count, 5)).astype(np.float32)
    return pa.table(
        {
            **names,
            "image_embeds": pa.FixedSizeListArray.from_arrays(
                pa.array(embeds.ravel()), type=schemas.image_embeds(D)
            ),
            "shard": pa.array(random.integers(0, 2, count), pa.int32()),
            "user_factors": pa.array(list(factors), pa.list_(pa.float32())),
        }
    )


@pytest.fixture(scope="module")
def judging_prior(tmp_path_factory: pytest.TempPathFactory) -> TrainedPrior:
    folder = tmp_path_factory.mktemp("judging")
    return load_prior(write_tiny_prior(folder, users=prior_users(USERS), selector=Selector(D, 4)))


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_the_order_of_the_rows_changes_no_lender_and_prompts_stay_apart(
    judging_prior: TrainedPrior, seed: int, count: int
) -> None:
    plan = planned_rows(judging_prior, seed, count)
    every = np.arange(count)

    def pairs(plan: pa.Table) -> set[tuple[str, str, float]]:
        lender_N, like_N = lenders_of(plan, every, judging_prior, 0.3, 32)
        assert like_N is not None
        ids = plan["item_id"].to_pylist()
        rows = plan.select(["prompt", "negative_prompt", "shard"]).to_pylist()
        for row, lender in enumerate(lender_N.tolist()):
            assert (rows[row]["prompt"], rows[row]["negative_prompt"]) == (
                rows[lender]["prompt"],
                rows[lender]["negative_prompt"],
            )
            assert rows[lender]["shard"] <= rows[row]["shard"]
        return {
            (ids[row], ids[lender], float(like))
            for row, (lender, like) in enumerate(zip(lender_N.tolist(), like_N, strict=True))
        }

    shuffled = plan.take(pa.array(np.random.default_rng(seed + 1).permutation(count)))
    assert pairs(plan) == pairs(shuffled)
