"""Night after night in this process: carried items, files, counts. Each snapshot is verified in full."""

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.catalog.manifest import Manifest
from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.catalog.verify import verify
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import LayoutSettings, LimitSettings, RefreshSettings
from rebeca_ray.generation.render import Rendered
from rebeca_ray.identity import bucket_of
from rebeca_ray.prior.checkpoint import load_prior, save_prior
from rebeca_ray.prior.selector import Selector
from rebeca_ray.storage.parquet import read_table
from tests.conftest import USERS, D, assembled, prepare, prior_users, publish, snapshot_of, write_tiny_prior

MONDAY = datetime.date(2026, 3, 2)


def request_for(config: GenerateConfig, users: list[str], night: int = 0, **columns: Any) -> GenerateConfig:
    """The config of one night, for some users."""
    pq.write_table(pa.table({"user_id": users, **columns}), config.request)
    return config.model_copy(update={"run_date": MONDAY + datetime.timedelta(days=night)})


def night(config: GenerateConfig, users: list[str], number: int = 0) -> tuple[Manifest, Snapshot]:
    """One night for some users, three items each, published and verified in full."""
    config = request_for(config, users, number)
    manifest = snapshot_of(config)
    assert manifest.counts.requested == 3 * len(users)
    snapshot = read_catalog(config.catalog)
    assert verify(snapshot, "full") == []
    return manifest, snapshot


def counts(manifest: Manifest, *names: str) -> tuple[int, ...]:
    return tuple(getattr(manifest.counts, name) for name in names)


def by_user(snapshot: Snapshot) -> dict[str, list[str]]:
    items = snapshot.items(["user_id", "item_id"]).to_pylist()
    by_user: dict[str, list[str]] = {}
    for item in items:
        by_user.setdefault(item["user_id"], []).append(item["item_id"])
    return by_user


def change_digest(config: GenerateConfig, user: str) -> None:
    """Change the history digest of a user in the prior's table, as a new rating would."""
    prior = load_prior(config.prior)
    assert prior.users is not None
    names, digests = (prior.users[name].to_pylist() for name in ("user_id", "history_digest"))
    changed = pa.array(
        [f"{digest}!" if name == user else digest for name, digest in zip(names, digests, strict=True)]
    )
    index = prior.users.schema.get_field_index("history_digest")
    users = prior.users.set_column(index, prior.users.schema.field(index), changed)
    save_prior(replace(prior, users=users), config.prior)


def test_an_unchanged_night_renders_nothing_and_the_third_is_carried_by_reference(
    config: GenerateConfig,
) -> None:
    first, before = night(config, USERS[:5])
    second, after = night(config, USERS[:5], 1)
    third, last = night(config, USERS[:5], 2)
    assert counts(first, "new", "carried") == (15, 0)
    assert counts(second, "new", "carried") == counts(third, "new", "carried") == (0, 15)
    assert by_user(before) == by_user(after) == by_user(last)
    assert set(after.items()["origin"].to_pylist()) == {"carried"}
    # The second says `carried` where the first said `new`.
    assert [second.carried_buckets, third.carried_buckets] == [0, 1]
    assert last.paths("items") == after.paths("items")
    assert last.paths("images") == before.paths("images")
    assert last.table("changes").num_rows == 0
    assert first.created_at[:4] == str(after.items()["generated_at"][0].as_py().year)


def test_changed_users_get_new_items_absent_users_lose_theirs_and_others_keep_them(
    config: GenerateConfig,
) -> None:
    _, before = night(config, USERS[:5])
    change_digest(config, USERS[1])
    manifest, after = night(config, [*USERS[1:5], USERS[6]], 1)
    assert counts(manifest, "new", "carried", "users") == (6, 9, 5)
    old, new = by_user(before), by_user(after)
    assert [new[user] == old[user] for user in USERS[2:5]] == [True] * 3
    assert not set(new[USERS[1]]) & set(old[USERS[1]])
    changes = {(row["user_id"], row["change"]) for row in after.table("changes").to_pylist()}
    assert changes == {(USERS[0], "removed"), (USERS[1], "removed"), (USERS[1], "added"), (USERS[6], "added")}
    assert after.images(after.items(user_ids=[USERS[3]])) == before.images(before.items(user_ids=[USERS[3]]))


def test_cold_start_users_share_one_pool_that_is_rendered_once(config: GenerateConfig) -> None:
    users = [USERS[0], "stranger", "nobody"]
    first, snapshot = night(config, users)
    assert counts(first, "new", "population", "users") == (3, 6, 3)
    assert first.decisions.planned_items == 6
    items = by_user(snapshot)
    assert items["stranger"] == items["nobody"] == items[POPULATION_USER]
    second, after = night(config, [*users, "third stranger"], 1)
    assert counts(second, "new", "carried", "population") == (0, 3, 9)
    assert second.decisions.planned_items == 0
    assert by_user(after)["third stranger"] == items[POPULATION_USER]
    night(config, [*users, "third stranger"], 2)
    third, _ = night(config, [*users, "third stranger"], 3)
    assert third.carried_buckets == 1


def test_a_prompt_keeps_a_cold_start_user_out_of_the_pool_and_the_largest_request_sizes_the_pool(
    config: GenerateConfig,
) -> None:
    config = request_for(
        config,
        ["stranger", "greedy", "poet"],
        num_images=pa.array([1, 4, 2], pa.int32()),
        prompt=["", None, "noto food pizza"],
    )
    manifest = snapshot_of(config)
    assert manifest.counts.requested == 7
    items = by_user(read_catalog(config.catalog))
    assert counts(manifest, "new", "population") == (0, 7)
    assert (len(items[POPULATION_USER]), items["stranger"], items["greedy"]) == (
        4,
        items[POPULATION_USER][:1],
        items[POPULATION_USER],
    )
    assert not set(items["poet"]) & set(items[POPULATION_USER])


def test_rotation_gives_users_other_items_in_their_turn(config: GenerateConfig) -> None:
    config = config.model_copy(update={"refresh": RefreshSettings(rotation=0.5)})
    _, first = night(config, USERS)
    _, second = night(config, USERS, 1)
    _, third = night(config, USERS, 2)
    changed = [
        {user for user in USERS if by_user(one)[user] != by_user(other)[user]}
        for one, other in ((first, second), (second, third))
    ]
    assert changed[0] | changed[1] == set(USERS)
    assert not changed[0] & changed[1]


def test_a_new_prior_may_rescore_kept_items(config: GenerateConfig, tmp_path: Path) -> None:
    uri = write_tiny_prior(tmp_path, users=prior_users(USERS), selector=Selector(D, 4))
    config = config.model_copy(update={"prior": uri, "refresh": RefreshSettings(on_new_prior="rescore")})
    _, before = night(config, USERS[:3])
    # The same prior but for the numbers in the selector:
    write_tiny_prior(tmp_path, users=prior_users(USERS), selector=Selector(D, 4))
    manifest, after = night(config, USERS[:3], 1)
    assert counts(manifest, "new", "carried") == (0, 9)
    assert sorted(before.items()["item_id"].to_pylist()) == sorted(after.items()["item_id"].to_pylist())
    old, new = before.items(["item_id", "like_probability"]), after.items(["item_id", "like_probability"])
    assert (
        old.sort_by("item_id")["like_probability"].to_pylist()
        != new.sort_by("item_id")["like_probability"].to_pylist()
    )
    for user in USERS[:3]:
        likes = after.items(["like_probability"], [user])["like_probability"].to_pylist()
        assert likes == sorted(likes, reverse=True)
    assert set(after.table("changes")["change"].to_pylist()) == {"updated"}
    assert after.changed_users(before.run_id) == sorted(USERS[:3])


def test_another_number_of_buckets_keeps_every_item(config: GenerateConfig) -> None:
    _, before = night(config, USERS)
    cut = config.model_copy(update={"layout": LayoutSettings(num_buckets=4, images_per_file=2)})
    manifest, after = night(cut, USERS, 1)
    assert counts(manifest, "new", "carried") == (0, 21)
    assert by_user(after) == by_user(before)
    files = after.files.filter(pc.equal(after.files["table"], "items"))
    for row in files.to_pylist():
        users = read_table(f"{config.catalog}/{row['path']}", "items", ["user_id"])["user_id"].to_pylist()
        assert {bucket_of(user, 4) for user in users} <= {row["bucket"]}
    _, last = night(cut, USERS, 2)
    assert by_user(last) == by_user(before)


def test_a_first_catalog_fills_over_several_nights_that_time_runs_out_for(config: GenerateConfig) -> None:
    """Users whose items are not rendered in time keep those of last night."""
    config = config.model_copy(
        update={"layout": LayoutSettings(items_per_shard=3), "limits": LimitSettings(max_gpu_hours=1.0)}
    )
    priority = pa.array([0.0, 5.0, 0.0, 1.0, 0.0], pa.float32())

    def cut_short(number: int, shards: int) -> tuple[Manifest, Snapshot]:
        """A night with time for the first shards alone."""
        tonight = request_for(config, USERS[:5], number, priority=priority)
        prepared = prepare(tonight)
        files = [file for file in prepared.rendered.files if file.shard < shards]
        rendered = Rendered(files=files, timed_out=True)
        manifest = assembled(tonight, prepared._replace(rendered=rendered))
        assert manifest.counts.requested == 15
        publish(tonight.catalog, prepared.run)
        snapshot = read_catalog(tonight.catalog)
        assert verify(snapshot, "full") == []
        return manifest, snapshot

    first, snapshot = cut_short(0, 2)
    assert counts(first, "new", "carried", "deferred", "users", "stale_users") == (6, 0, 9, 2, 3)
    assert set(by_user(snapshot)) == {USERS[1], USERS[3]}  # the most urgent
    second, snapshot = cut_short(1, 2)
    assert counts(second, "new", "carried", "deferred", "stale_users") == (6, 6, 3, 1)
    change_digest(config, USERS[1])
    third, snapshot = cut_short(2, 0)
    assert counts(third, "new", "carried", "deferred", "stale_users") == (0, 12, 3, 2)
    stale = {row["user_id"]: row["stale"] for row in snapshot.table("users").to_pylist()}
    assert stale[USERS[1]]
    assert sum(stale.values()) == 1
    fourth, snapshot = cut_short(3, 9)
    assert counts(fourth, "new", "carried", "deferred", "stale_users") == (6, 9, 0, 0)
    assert set(by_user(snapshot)) == set(USERS[:5])


def test_a_failed_item_is_listed_with_its_user_and_rendered_again_the_next_night(
    config: GenerateConfig,
) -> None:
    prepared = prepare(request_for(config, USERS[:5]), break_first=True)
    manifest = assembled(config, prepared, error_budget=0.1)
    publish(config.catalog, prepared.run)
    assert counts(manifest, "new", "failed") == (14, 1)
    error = read_catalog(config.catalog).table("errors").to_pylist()[0]
    assert (error["user_id"], error["stage"], error["attempt"]) == (USERS[0], "render", 0)
    again, snapshot = night(config, USERS[:5], 1)
    assert counts(again, "new", "carried", "failed") == (3, 12, 0)
    assert error["item_id"] in by_user(snapshot)[USERS[0]]


def test_mostly_dead_image_files_are_copied_and_no_longer_listed(config: GenerateConfig) -> None:
    _, first = night(config, USERS)
    assert len(first.paths("images")) == 1
    for user in USERS[:4]:
        change_digest(config, user)
    manifest, after = night(config, USERS, 1)
    assert counts(manifest, "new", "carried") == (12, 9)
    copied = [path for path in after.paths("images") if "compacted" in path]
    assert len(copied) == 1
    assert not set(first.paths("images")) & set(after.paths("images"))
    kept = pc.is_in(first.items()["user_id"], value_set=pa.array(USERS[4:]))
    assert after.images(after.items(user_ids=USERS[4:])) == first.images(first.items().filter(kept))
    files = after.files.filter(pc.equal(after.files["table"], "images"))
    assert sorted(files["live_rows"].to_pylist()) == [9, 12]
    assert len(set(files["file"].to_pylist())) == 2
    assert manifest.next_file == max(files["file"].to_pylist()) + 1
    assert np.array_equal(np.unique(after.items()["image_file"]), np.sort(files["file"]))


@pytest.mark.parametrize("number", range(3))
def test_random_nights_lose_and_repeat_no_items(config: GenerateConfig, number: int) -> None:
    """Users come, go, rate and request other counts: on six nights they get all items, each once."""
    random = np.random.default_rng(number)
    config = config.model_copy(update={"refresh": RefreshSettings(rotation=0.25)})
    everybody = [*USERS, "stranger", "passer-by"]
    for day in range(6):
        users = sorted(
            random.choice(everybody, size=random.integers(1, len(everybody)), replace=False).tolist()
        )
        num_images = random.integers(1, 4, len(users))
        if day % 2:
            change_digest(config, str(random.choice(USERS)))
        tonight = request_for(config, users, day, num_images=pa.array(num_images, pa.int32()))
        manifest = snapshot_of(tonight)
        assert manifest.counts.requested == num_images.sum()
        snapshot = read_catalog(config.catalog)
        assert verify(snapshot, "full") == []
        assert {
            user: len(items) for user, items in by_user(snapshot).items() if user != POPULATION_USER
        } == dict(zip(users, num_images, strict=True))
        assert manifest.counts.users == len(users)


def test_a_cold_start_user_who_drops_a_prompt_gets_the_pools_items(config: GenerateConfig) -> None:
    users = ["poet", "stranger"]
    for number in range(3):
        snapshot_of(request_for(config, users, number, prompt=["noto food pizza", ""]))
    _, snapshot = night(config, users, 3)
    items = by_user(snapshot)
    assert items["poet"] == items["stranger"] == items[POPULATION_USER]


def test_a_stale_user_who_requested_fewer_items_gets_all_of_them_back(config: GenerateConfig) -> None:
    def num_images(*counts: int) -> pa.Array:
        return pa.array(counts, pa.int32())

    snapshot_of(request_for(config, USERS[:2], 0, num_images=num_images(4, 4)))
    fewer = request_for(config, USERS[:2], 1, num_images=num_images(2, 4))
    prepared = prepare(fewer)
    manifest = assembled(fewer, prepared._replace(rendered=Rendered(files=[], timed_out=True)))
    publish(fewer.catalog, prepared.run)
    assert manifest.counts.requested == 6
    assert counts(manifest, "carried", "stale_users", "filtered", "deferred") == (6, 1, 0, 0)
    again = snapshot_of(request_for(config, USERS[:2], 2, num_images=num_images(4, 4)))
    assert again.counts.requested == 8
    assert counts(again, "new", "carried", "filtered") == (4, 4, 0)
