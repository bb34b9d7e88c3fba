"""Draws from histories: users count alike, the hold-out is left out, and no history has its targets."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rebeca_ray import schemas
from rebeca_ray.prior.user_blocks import MICROSECONDS_PER_DAY, Batch, UserBlock
from rebeca_ray.schemas import TRAINING, VALIDATION

Users = list[list[tuple[int, bool]]]  # of each user: like and held out, in order of time


def block(users: Users, **kinds: Any) -> UserBlock:
    """User k's n-th interaction is with item 100 k + n, n days after the first."""
    table = pa.table(
        {
            "user_id": [f"u{number}" for number in range(len(users))],
            "bucket": pa.array([0] * len(users), pa.int32()),
            "row": pa.array(range(len(users)), pa.int32()),
            "num_likes": pa.array([0] * len(users), pa.int32()),
            "history_digest": [""] * len(users),
            "item_index": [[100 * user + row for row in range(len(rows))] for user, rows in enumerate(users)],
            "like": [[like for like, _ in rows] for rows in users],
            "timestamp": [[row * MICROSECONDS_PER_DAY for row in range(len(rows))] for rows in users],
            "split": [[VALIDATION if held else TRAINING for _, held in rows] for rows in users],
        },
        schema=schemas.HISTORIES,
    )
    return UserBlock(table, np.array([1000]), **kinds)


def draws(of: UserBlock, **changes: Any) -> list[Batch]:
    defaults: dict[str, Any] = {
        "samples_per_user": 40,
        "with_replacement": True,
        "like_share": None,
        "batch_size": 16,
        "targets": 4,
        "max_history": 5,
        "seed": (1, 2),
    }
    return list(of.batches(**{**defaults, **changes}))


some_users = st.lists(
    st.lists(st.tuples(st.integers(0, 1), st.booleans()), min_size=1, max_size=9).map(
        lambda rows: [(rows[0][0], False), *rows[1:]]
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=50, deadline=None)
@given(users=some_users, targets=st.sampled_from([1, 4]), like_share=st.sampled_from([None, 0.5, 1.0]))
def test_everyone_is_drawn_equally_often_from_what_is_not_held_out(
    users: Users, targets: int, like_share: float | None
) -> None:
    count = np.zeros(len(users), int)
    for batch in draws(block(users), targets=targets, like_share=like_share):
        owner = batch.user_index_G[batch.row_B] - 1000
        assert (batch.item_index_B // 100 == owner).all()  # items of this user
        count += np.bincount(owner, minlength=len(users))
        for item, like in zip(batch.item_index_B, batch.like_B, strict=True):
            assert users[item // 100][item % 100] == (like, False)
    assert (count == 40).all()


@settings(max_examples=50, deadline=None)
@given(users=some_users, samples=st.integers(1, 12))
def test_without_replacement_nobody_is_drawn_more_often_than_they_rated(users: Users, samples: int) -> None:
    batches = draws(block(users), targets=1, samples_per_user=samples, with_replacement=False)
    drawn = np.concatenate([batch.item_index_B for batch in batches])
    assert len(np.unique(drawn)) == len(drawn)
    for user, rows in enumerate(users):
        kept = [100 * user + row for row, (_, held) in enumerate(rows) if not held]
        user_items = drawn[drawn // 100 == user]
        assert set(user_items) <= set(kept)
        assert len(user_items) == min(samples, len(kept))


@settings(max_examples=50, deadline=None)
@given(users=some_users)
def test_a_history_is_a_part_of_the_rest_with_days_since_its_own_last(users: Users) -> None:
    """At most five in a row, the latest first; where there are no more, all."""
    for batch in draws(block(users)):
        history = batch.history
        for draw, user in enumerate(batch.user_index_G - 1000):
            present = history.present_GL[draw]
            items, ages = history.item_index_GL[draw][present], history.age_GL[draw][present]
            targets = set(batch.item_index_B[batch.row_B == draw].tolist())
            kept = [100 * user + row for row, (_, held) in enumerate(users[user]) if not held]
            windows = [kept[::-1][skip : skip + 5] for skip in range(max(1, len(kept) - 4))]
            assert items.tolist() in [[item for item in window if item not in targets] for window in windows]
            assert ages.tolist() == [items[0] - item for item in items]
            assert [users[user][item % 100][0] for item in items] == history.like_GL[draw][present].tolist()


def test_an_epoch_is_a_function_of_its_seed() -> None:
    of = block([[(1, False), (0, False), (1, False)]] * 5)
    first, again, other = (
        np.concatenate([batch.item_index_B for batch in draws(of, seed=seed)])
        for seed in ((1, 2), (1, 2), (1, 3))
    )
    assert (first == again).all()
    assert (first != other).any()


def test_the_share_of_likes_is_the_requested_one_for_users_with_both() -> None:
    mixed, all_disliked = [(1, False), *[(0, False)] * 9], [(0, False)] * 3
    batches = draws(block([mixed, all_disliked]), like_share=0.75, samples_per_user=4000, batch_size=256)
    like, user = (
        np.concatenate([getattr(batch, name) for batch in batches]) for name in ("like_B", "item_index_B")
    )
    assert like[user < 100].mean() == pytest.approx(0.75, abs=0.03)
    assert like[user >= 100].mean() == 0


def test_a_user_with_one_interaction_has_an_empty_history_for_it() -> None:
    batch = draws(block([[(1, False)]]))[0]
    assert not batch.history.present_GL.any()
    assert set(batch.item_index_B.tolist()) == {0}


def test_held_out_interactions_have_the_rest_as_history() -> None:
    batch = block([[(1, False), (0, True), (1, False)], [(1, False)], [(0, False), (1, True)]]).held_out(
        max_history=4, limit=10
    )
    assert batch is not None
    assert batch.item_index_B.tolist() == [1, 201]
    assert batch.like_B.tolist() == [0, 1]
    assert [
        row[present].tolist()
        for row, present in zip(batch.history.item_index_GL, batch.history.present_GL, strict=True)
    ] == [
        [2, 0],
        [200],
    ]
    liked = block([[(1, False), (0, True)], [(0, False), (1, True)]]).held_out(
        max_history=4, limit=10, likes_only=True
    )
    assert liked is not None
    assert liked.item_index_B.tolist() == [101]
    part = batch.take(np.array([1]))
    assert (part.item_index_B.tolist(), part.row_B.tolist(), part.user_index_G.tolist()) == (
        [201],
        [0],
        [1002],
    )
    assert block([[(1, False)]]).held_out(max_history=4, limit=10) is None


def test_for_serving_the_hold_out_is_history_too() -> None:
    history = block([[(1, False), (0, True)]], training_only=False).history(np.array([0]), max_history=3)
    assert history.item_index_GL[history.present_GL].tolist() == [1, 0]


@settings(max_examples=50, deadline=None)
@given(users=some_users, like_share=st.sampled_from([None, 0.5, 1.0]))
def test_a_draw_leaves_half_of_its_pool_in_the_history(users: Users, like_share: float | None) -> None:
    """Else training would never see the short histories that serving sees."""
    for batch in draws(block(users), like_share=like_share, targets=8):
        for draw, user in enumerate(batch.user_index_G - 1000):
            targets = np.unique(batch.item_index_B[batch.row_B == draw])
            kinds = np.unique(batch.like_B[batch.row_B == draw])
            pool = min(
                sum(not held and (like_share is None or like == kind) for like, held in users[user])
                for kind in kinds
            )
            assert len(targets) <= max(1, pool // 2)


def test_a_part_has_the_same_users_and_some_of_their_interactions() -> None:
    whole = block([[(1, False), (0, False), (1, False)], [(0, False)], [(1, False), (1, False)]])
    part = whole.part(np.array([True, False, True, False, False, True]))
    assert part.counts_V.tolist() == [2, 0, 1]
    assert part.user_index_V.tolist() == whole.user_index_V.tolist()
    assert part.item_index_N.tolist() == [0, 2, 201]
    history = part.history(np.arange(3), max_history=4)
    assert [
        row[present].tolist() for row, present in zip(history.item_index_GL, history.present_GL, strict=True)
    ] == [[2, 0], [], [201]]
    assert whole.counts_V.tolist() == [3, 1, 2]


def test_rated_items_are_those_of_the_requested_users_without_the_hold_out() -> None:
    users: Users = [[(1, False), (0, True), (0, False)], [(1, False)], [(1, True)]]
    user_G = np.array([2, 0, 1])
    assert [rows.tolist() for rows in block(users).rated_items(user_G)] == [[], [0, 2], [100]]
    everything = block(users, training_only=False).rated_items(user_G)
    assert [rows.tolist() for rows in everything] == [[200], [0, 1, 2], [100]]


def test_a_long_history_is_read_from_any_point_on() -> None:
    """Training sees other parts of it than the latest; a short one is read as a whole."""
    users = block([[(1, False)] * 50, [(1, False)] * 3])
    batches = draws(users, max_history=10, samples_per_user=400)
    firsts = {
        int(batch.history.item_index_GL[draw, batch.history.present_GL[draw]][0])
        for batch in batches
        for draw, user in enumerate(batch.user_index_G)
        if user == 1000
    }
    assert max(firsts) >= 48
    assert min(firsts) <= 12
    for batch in batches:
        short = batch.history.present_GL[batch.user_index_G == 1001]
        assert (short.sum(1) >= 2).all()
