"""Reading the published snapshot: lookups, columns, other forms, and following publications."""

import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from rebeca_ray import schemas
from rebeca_ray.catalog import row_groups
from rebeca_ray.catalog.gc import collect
from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.catalog.verify import verify
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import LayoutSettings
from rebeca_ray.errors import UserError
from rebeca_ray.generation.bucket import changes_table
from rebeca_ray.identity import bucket_of
from rebeca_ray.schemas import TABLES
from tests.catalog.conftest import Rows
from tests.catalog.large import BUCKETS, ITEMS_PER_USER, MANY_USERS, NUM_USERS, D, write_snapshot
from tests.conftest import USERS
from tests.generation.test_nights import change_digest, night


class Reads:
    """Count the bytes that a reader reads of a catalog's Parquet files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes, self.files = 0, 0
        opened = LocalFileSystem.open

        def counting(filesystem: LocalFileSystem, path: str, mode: str = "rb", **options: Any) -> Any:
            file = opened(filesystem, path, mode, **options)
            self.files += 1
            read = file.f.read

            def counted(*size: int) -> bytes:
                data: bytes = read(*size)
                self.bytes += len(data)
                return data

            file.read = counted
            return file

        monkeypatch.setattr(LocalFileSystem, "open", counting)


def test_a_lookup_reads_one_row_group_of_one_file_of_the_users_bucket(
    large: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = large.items()
    reads = Reads(monkeypatch)
    row_groups.footer_bytes.cache_clear()
    for number in range(0, NUM_USERS, 37):
        user = f"üser-{number:03d}"
        expected = everything.filter(pc.equal(everything["user_id"], user))
        assert large.for_user(user).equals(expected)
        assert large.for_user(user)["rank"].to_pylist() == [0, 1, 2, 3]
    before, files = reads.bytes, reads.files
    rows = large.for_user("üser-007", ["item_id", "like_probability"])
    assert (rows.column_names, rows.num_rows) == (["item_id", "like_probability"], 4)
    file = next(row for row in large.files.to_pylist() if row["bucket"] == bucket_of("üser-007", BUCKETS))
    metadata = pq.read_metadata(f"{large.root}/{file['path']}")
    read_columns = {"item_id", "like_probability", "user_id", "rank"}
    sizes = [
        sum(
            metadata.row_group(group).column(column).total_compressed_size
            for column in range(metadata.num_columns)
            if metadata.row_group(group).column(column).path_in_schema in read_columns
        )
        for group in range(metadata.num_row_groups)
    ]
    assert len(sizes) > 5
    assert reads.files - files == 1  # its footer is cached
    assert min(sizes) <= reads.bytes - before <= 2 * max(sizes)


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    users=st.lists(NAMES, min_size=1, max_size=25, unique=True),
    others=st.lists(NAMES, max_size=10),
    rows_per_group=st.integers(1, 9),
)
def test_a_lookup_of_any_user_equals_a_scan(users: list[str], others: list[str], rows_per_group: int) -> None:
    """Names have any letters, in any order of the alphabet. Some of the users exist, and some do not."""
    with tempfile.TemporaryDirectory() as folder:
        snapshot = read_catalog(write_snapshot(Path(folder), rows_per_group=rows_per_group, users=users, D=2))
        everything = snapshot.items(["user_id", "rank", "item_id"])
        for user in [*users, *others, *(user[:-1] for user in users), *(f"{user}a" for user in users)]:
            expected = everything.filter(pc.equal(everything["user_id"], user))
            assert snapshot.for_user(user, ["user_id", "rank", "item_id"]).equals(expected)
            assert expected.num_rows == (ITEMS_PER_USER if user in users else 0)
        some = sorted({*users[::2], *others})
        expected = everything.filter(pc.is_in(everything["user_id"], value_set=pa.array(some, pa.string())))
        order = [("user_id", "ascending"), ("rank", "ascending")]
        assert snapshot.items(["user_id", "rank", "item_id"], some).equals(expected.sort_by(order))


def test_some_users_are_read_in_one_table_sorted_by_user_and_rank(large: Snapshot) -> None:
    users = [f"üser-{number:03d}" for number in (450, 3, 77, 78, 3)]
    items = large.items(["rank", "user_id"], [*users, "nobody"])
    assert items.column_names == ["rank", "user_id"]
    assert items["user_id"].to_pylist() == [
        user for user in sorted(set(users)) for _ in range(ITEMS_PER_USER)
    ]
    assert items["rank"].to_pylist() == [0, 1, 2, 3] * 4
    assert large.to_pandas("items", ["item_id"], users[:1]).shape == (4, 1)
    assert large.to_polars("items", None, users[:1]).shape == (4, len(schemas.items(D)))
    assert large.dataset("items", users[:2]).to_table(columns=["rank"]).num_rows == 8
    assert len(large.dataset("items", users[:1]).files) == 1


def test_a_lookup_of_several_users_reads_no_more_than_lookups_of_each_alone(
    large: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The users are one per user bucket, from the beginning, the middle and the end of the alphabet.

    No file has rows between two of them.
    """
    by_bucket = [
        [user for user in MANY_USERS if bucket_of(user, BUCKETS) == bucket] for bucket in range(BUCKETS)
    ]
    chosen = [by_bucket[0][0], by_bucket[1][len(by_bucket[1]) // 2], by_bucket[2][-1]]
    large.items(user_ids=chosen)  # the footers
    reads = Reads(monkeypatch)
    alone = pa.concat_tables([large.for_user(user) for user in chosen])
    before = reads.bytes
    assert large.items(user_ids=chosen).equals(alone)
    assert reads.bytes - before == before > 0


def test_an_unknown_user_has_an_empty_result(large: Snapshot) -> None:
    for user in ("nobody", "", "\x00", "ÿ", "a" * 2000, "\ud800"):
        rows = large.for_user(user)
        assert rows.num_rows == 0
        assert rows.schema.equals(schemas.items(D))
        assert large.for_user(user, ["rank"]).schema.names == ["rank"]
    assert large.items(user_ids=[]).num_rows == large.dataset("items", []).count_rows() == 0
    assert large.images(large.for_user("nobody")) == []


def test_a_table_without_rows_has_its_columns(large: Snapshot, ray_local: str) -> None:
    for name in set(TABLES) - {"items"}:
        assert large.table(name).schema.equals(schemas.table(name, D).remove_metadata(), check_metadata=False)
        assert large.to_ray(name).count() == 0
        assert large.uris(name) == []
    assert large.table("changes", None, ["üser-003"]).num_rows == 0


def test_unknown_tables_and_columns_are_refused_by_name(large: Snapshot) -> None:
    with pytest.raises(UserError, match="there is no table 'item'; did you mean 'items'"):
        large.table("item")
    for read in (large.items, large.to_pandas, large.to_ray):
        with pytest.raises(UserError, match="items has no column 'image_embed'; did you mean 'image_embeds'"):
            read(columns=["image_embed"])  # type: ignore[operator]
    with pytest.raises(UserError, match=r"images: has no users; read the users' items"):
        large.table("images", None, ["a"])
    with pytest.raises(UserError, match="the items have no column image_file, image_row; read them with it"):
        large.images(large.items(["user_id"]))
    with pytest.raises(
        UserError, match="run large: there is no image file 0; the items are of another snapshot"
    ):
        large.images(large.for_user("üser-003"))
    with pytest.raises(TypeError, match="user_ids: 7 is a int; every user_id is a string"):
        large.for_user(7)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"columns is the string 'item_id'; give a list of columns, \['item_id'\]"
    ):
        large.items("item_id")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match="images: the items are a DataFrame; give rows of `Snapshot.items`, a pyarrow table"
    ):
        large.images(large.to_pandas())


def test_users_and_columns_may_come_in_any_sequence(large: Snapshot) -> None:
    users = ["üser-003", "üser-004"]
    expected = large.items(["item_id"], users)
    for some in (
        tuple(users),
        iter(users),
        (user for user in users),
        pa.array(users),
        pa.chunked_array([users]),
        np.array(users, object),
    ):
        assert large.items(("item_id",), some).equals(expected)  # type: ignore[arg-type]
    items = read_catalog(Path(large.root)).items(("item_id",))  # type: ignore[arg-type]
    assert items.num_rows == NUM_USERS * ITEMS_PER_USER


def test_a_reader_follows_publications_and_holds_its_snapshot_until_it_is_collected(
    config: GenerateConfig,
) -> None:
    _, monday = night(config, USERS[:5])
    assert monday.refresh() is monday
    items, images = monday.items(), monday.images(monday.items())
    change_digest(config, USERS[0])
    _, tuesday = night(config, USERS[:5], 1)
    now = monday.refresh()
    assert (now.path, now.run_id, now.refresh()) == (tuesday.path, tuesday.run_id, now)
    _, wednesday = night(config, USERS[:5], 2)
    assert collect(config.catalog, keep=1, grace_hours=48).manifests == []
    assert monday.items().equals(items)  # held through two publications and a collection
    assert monday.images(items) == images
    collect(config.catalog, keep=1, grace_hours=0)  # keeps the published one, and the one it followed
    row_groups.footer_bytes.cache_clear()
    for read in (monday.items, lambda: monday.for_user(USERS[0]), lambda: monday.to_pandas("users")):
        with pytest.raises(
            UserError,
            match=f"run {monday.run_id} was collected and cannot be read any more; go on with `refresh",
        ):
            read()
    assert monday.refresh().run_id == wednesday.run_id
    assert monday.refresh().for_user(USERS[1], ["item_id"]).equals(tuesday.for_user(USERS[1], ["item_id"]))


def test_applying_the_changes_of_three_nights_equals_a_reload(config: GenerateConfig) -> None:
    """Users join, leave and change. Compaction copies images. The consumer misses one night."""

    def reload(snapshot: Snapshot) -> dict[str, Rows]:
        state: dict[str, Rows] = {}
        for row in snapshot.items().drop_columns(["origin"]).to_pylist():
            state.setdefault(row["user_id"], []).append(row)
        return state

    _, snapshot = night(config, USERS[:6])
    state, seen = reload(snapshot), snapshot.run_id
    kinds: set[str] = set()
    untouched = 0
    for number, users, changed in (
        (1, USERS[:7], USERS[:4]),
        (2, USERS[1:6], []),
        (3, [*USERS[2:7], "cold-start"], [USERS[5]]),
    ):
        for user in changed:
            change_digest(config, user)
        _, snapshot = night(config, users, number)
        kinds.update(snapshot.table("changes")["change"].to_pylist())
        if number == 2:
            continue  # this consumer was asleep
        touched = snapshot.changed_users(seen)
        items = reload_of(snapshot, touched)
        untouched += len(set(items) | set(state) - set(touched)) - len(items)
        state = {user: rows for user, rows in state.items() if user not in touched} | items
        seen = snapshot.run_id
        assert state == reload(snapshot)
    assert kinds == {"added", "removed", "updated"}
    assert untouched
    assert snapshot.changed_users(snapshot.run_id) == []
    with pytest.raises(
        UserError,
        match="does not follow run 'another', or a snapshot in between was collected "
        ".*load this one as a whole",
    ):
        snapshot.changed_users("another")


def reload_of(snapshot: Snapshot, users: list[str]) -> dict[str, Rows]:
    items: dict[str, Rows] = {}
    for row in snapshot.items(user_ids=users).drop_columns(["origin"]).to_pylist():
        items.setdefault(row["user_id"], []).append(row)
    return items


def test_items_of_another_snapshot_have_no_images_in_this_one(config: GenerateConfig) -> None:
    """A reader never returns another item's image, although file numbers repeat after a rollback."""
    _, monday = night(config, USERS[:3])
    items = monday.items()
    swapped = items.set_column(
        items.schema.get_field_index("image_row"), "image_row", items["image_row"].take([*range(1, 9), 0])
    )
    with pytest.raises(
        UserError,
        match="row . of image file 0 is another item's; the items are of another snapshot: give this one's",
    ):
        monday.images(swapped)
    beyond = items.set_column(
        items.schema.get_field_index("image_row"), "image_row", pa.array([99] * 9, pa.int32())
    )
    with pytest.raises(UserError, match="row 99 of image file 0 is another item's"):
        monday.images(beyond)


@pytest.mark.usefixtures("ray_local")
def test_a_column_that_came_later_is_null_in_older_files(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next version reads this version's files alone, and beside its new ones in one snapshot."""
    config = config.model_copy(update={"layout": LayoutSettings(num_buckets=1)})
    _, monday = night(config, USERS[:3])
    was = monday.items()
    grown = schemas.items

    def items(embed_dim: int) -> pa.Schema:
        return grown(embed_dim).append(pa.field("mood", pa.string()))

    monkeypatch.setattr(schemas, "items", items)
    assert verify(monday, "full") != []  # files of this version without it are incomplete
    monkeypatch.setattr(schemas, "SCHEMA_VERSION", schemas.SCHEMA_VERSION + 1)
    assert verify(monday, "full") == []
    now = read_catalog(config.catalog)
    for table in (now.items(), now.bucket("items", 0, 1), now.items(user_ids=USERS[:3])):
        assert table["mood"].null_count == 9
        assert table.drop_columns(["mood"]).equals(was)
    assert now.for_user(USERS[0], ["mood", "rank"]).to_pylist() == [
        {"mood": None, "rank": rank} for rank in range(3)
    ]
    assert now.bucket("items", 0, 1, ["mood"])["mood"].null_count == 9
    assert now.to_ray(columns=["mood", "rank"], user_ids=USERS[:1]).to_pandas().to_dict("list") == {
        "mood": [None] * 3,
        "rank": [0, 1, 2],
    }


def test_a_new_ranking_is_a_change() -> None:
    """`on_new_prior: rescore` gives the same item another probability. The change is `updated`."""
    before = pa.table(
        {
            "item_id": ["a", "b", "c"],
            "user_id": ["u", "u", "u"],
            "rank": pa.array([0, 1, 2], pa.int16()),
            "like_probability": pa.array([0.9, None, 0.5], pa.float32()),
            "image_file": pa.array([0, 0, 0], pa.int32()),
            "image_row": pa.array([0, 1, 2], pa.int32()),
        }
    )
    probability = pa.array([0.9, None, 0.6], pa.float32())
    now = before.set_column(3, "like_probability", probability)
    assert changes_table(now, before).to_pylist() == [{"item_id": "c", "user_id": "u", "change": "updated"}]
    assert changes_table(before, before).num_rows == 0
    swapped = before.take([1, 0, 2]).set_column(2, "rank", before["rank"])
    assert [row["item_id"] for row in changes_table(swapped, before).to_pylist()] == ["a", "b"]


def test_a_pickled_snapshot_for_a_task_is_small(large: Snapshot) -> None:
    before = len(pickle.dumps(large))
    large.for_user("üser-007")
    assert large.user_files
    assert large.image_files == {}
    assert len(pickle.dumps(large)) == before
    assert pickle.loads(pickle.dumps(large)).for_user("üser-007").equals(large.for_user("üser-007"))
