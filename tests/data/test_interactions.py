"""Interactions: errors give counts and examples of every defect. Likes, filter and hold-out are exact."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data.interactions import history_digests, pair_hashes, read_interactions, split
from rebeca_ray.errors import UserError
from rebeca_ray.schemas import TEST, TRAINING, VALIDATION

GOOD = {
    "user_id": ["b", "a", "a", "a", "c", "b"],
    "item_id": ["i1", "i1", "i2", "i3", "i1", "i2"],
    "rating": pa.array([5, 4, 3, 5, 1, 2], pa.float32()),
    "timestamp": pa.array([3, 2, 1, 3, 4, 5], pa.timestamp("us")),
}


def write(folder: Path, **changes: Any) -> str:
    path = folder / "interactions.parquet"
    columns = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    pq.write_table(pa.table(columns), path)
    return str(path)


def read(path: str, **changes: Any) -> Any:
    return read_interactions(InteractionSettings(path=path, hold_out=0.0, **changes))


def test_likes_users_and_order(tmp_path: Path) -> None:
    interactions = read(write(tmp_path))
    assert interactions.user_id.tolist() == ["a", "b"]  # c liked nothing
    assert interactions.user_index.tolist() == [0, 0, 0, 1, 1]
    assert interactions.item_id.tolist() == ["i2", "i1", "i3", "i1", "i2"]  # by time within a user
    assert interactions.like.tolist() == [0, 1, 1, 1, 0]


def test_threshold_and_minimum_likes(tmp_path: Path) -> None:
    interactions = read(write(tmp_path), like_threshold=3.0, min_likes=3)
    assert interactions.user_id.tolist() == ["a"]
    assert interactions.like.tolist() == [1, 1, 1]


def test_another_scale_and_a_threshold_outside_it(tmp_path: Path) -> None:
    path = write(tmp_path, rating=pa.array([90, 40, 80, 100, 0, 20], pa.float32()))
    assert read(path, rating_scale=(0, 100), like_threshold=70).like.tolist() == [1, 0, 1, 1, 0]
    with pytest.raises(ValueError, match=r"like_threshold 4 is outside rating_scale 10 to 100"):
        InteractionSettings(path=path, rating_scale=(10, 100))


def test_without_ratings_every_row_is_a_like(tmp_path: Path) -> None:
    interactions = read(write(tmp_path, rating=None))
    assert interactions.like.tolist() == [1] * 6
    assert interactions.user_id.tolist() == ["a", "b", "c"]


def test_integer_ratings_and_large_strings_are_read(tmp_path: Path) -> None:
    interactions = read(
        write(
            tmp_path,
            rating=pa.array([5, 4, 3, 5, 1, 2], pa.int64()),
            user_id=pa.array(GOOD["user_id"], pa.large_string()),
        )
    )
    assert interactions.like.sum() == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item_id": None}, "column 'item_id' is missing"),
        ({"user_id": pa.array([1, 2, 3, 4, 5, 6])}, "column 'user_id' is int64, expected string"),
        ({"rating": pa.array(["good"] * 6)}, "column 'rating' is string, expected float"),
        (
            {"rating": pa.array([5, float("nan"), 3, 5, None, 2], pa.float32())},
            r"2 of 6 rows have a rating that is null, NaN or infinite (of the items i1, i1)",
        ),
        (
            {"rating": pa.array([5, 4, 0, 5, 1, 7], pa.float32())},
            "2 of 6 rows have a rating outside 1 to 5 (of the items i2, i2); "
            "correct them, or set interactions.rating_scale",
        ),
        ({"user_id": ["b", "", "a", "a", "c", None]}, "2 of 6 rows have an empty user_id (rows 1, 5)"),
        (
            {"item_id": ["i1", "i1", "i1", "i3", "i1", "i1"]},
            "2 of 6 rows have a (user_id, item_id) pair seen before (of the items i1, i1)",
        ),
    ],
)
def test_defects_are_named_with_counts_and_examples(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        read(write(tmp_path, **changes))
    assert message in str(caught.value)


def test_empty_file_and_no_likes_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table(GOOD).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="has no rows"):
        read(str(tmp_path / "empty.parquet"))
    with pytest.raises(UserError, match="no user has at least 9 likes; lower interactions.min_likes"):
        read(write(tmp_path), min_likes=9)


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        read(str(tmp_path / "nothing"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 this is no Parquet")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read(str(tmp_path / "bad.parquet"))


shares = st.sampled_from([0.0, 0.1, 0.25, 0.4, 1.0, 5.0])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), shares, shares, st.integers(0, 2**32 - 1))
def test_a_split_takes_the_same_of_everyone_whatever_the_order(
    counts: list[int], validation: float, test: float, seed: int
) -> None:
    users = np.array([f"u{number}" for number in range(len(counts))])
    user_index = np.repeat(np.arange(len(counts)), counts)
    items = np.array([f"i{number}" for number in range(len(user_index))])
    _, key = pair_hashes(users[user_index], items)
    splits = split(key, user_index, len(counts), validation, test)
    for user, count in enumerate(counts):
        num_test, num_validation = (int(n * count) if n < 1 else int(n) for n in (test, validation))
        num_test = min(num_test, count - 1)
        num_validation = min(num_validation, count - 1 - num_test)
        user_splits = splits[user_index == user].tolist()
        assert (user_splits.count(TEST), user_splits.count(VALIDATION)) == (num_test, num_validation)
        assert user_splits.count(TRAINING) == count - num_test - num_validation
    order = np.random.default_rng(seed).permutation(len(items))
    assert (split(key[order], user_index[order], len(counts), validation, test) == splits[order]).all()


def test_histories_without_times_are_in_random_order(tmp_path: Path) -> None:
    """Their last half is not that of the names: the order by name says nothing about it."""
    names = [f"i{number:03d}" for number in range(200)]
    pq.write_table(pa.table({"user_id": ["a"] * 200, "item_id": names}), tmp_path / "one.parquet")
    pq.write_table(pa.table({"user_id": ["a"] * 200, "item_id": names[::-1]}), tmp_path / "two.parquet")
    one, two = (read(str(tmp_path / f"{name}.parquet")) for name in ("one", "two"))
    assert one.item_id.tolist() == two.item_id.tolist()
    position = np.argsort(one.item_id.astype(str))
    assert abs(np.corrcoef(position, np.arange(200))[0, 1]) < 0.2
    assert 30 < sum(name < "i100" for name in one.item_id[100:]) < 70


def test_history_digest_changes_with_the_history_alone(tmp_path: Path) -> None:
    before = history_digests(read(write(tmp_path)))
    rated = history_digests(read(write(tmp_path, rating=pa.array([5, 4, 3, 5, 1, 5], pa.float32()))))
    assert rated[0] == before[0]
    assert rated[1] != before[1]


def test_history_digest_knows_the_times(tmp_path: Path) -> None:
    """The prior reads the age of a rating, so other times make another history, even in the same order."""
    days = [
        history_digests(read(write(tmp_path, timestamp=pa.array([0, 1, 2, 3, 4, last], pa.timestamp("us")))))
        for last in (5, 9)
    ]
    assert days[0] != days[1]


def test_one_long_id_costs_no_more_than_its_letters(tmp_path: Path) -> None:
    """In an array of numpy's text it would set the size of every row: 160 MB here."""
    rows = 20_000
    users = ["x" * 1000, *(f"u{row}" for row in range(1, rows))]
    items = [*(f"i{row}" for row in range(1, rows)), "y" * 1000]
    path = write(tmp_path, user_id=users, item_id=items, rating=None, timestamp=None)
    tracemalloc.start()
    interactions = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert interactions.user_id[-1] == "x" * 1000
    assert sorted(interactions.item_id)[-1] == "y" * 1000
    assert peak < 40e6
