"""Lenders: deterministic whatever the order of rows, within the bound, and never a user's own item."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rebeca_ray.prior import sharing
from rebeca_ray.prior.sharing import LARGEST_LOSS, Tastes, find_lenders


def unit(random: np.random.Generator, count: int, size: int = 4) -> np.ndarray:
    vectors = random.standard_normal((count, size))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.floats(0.01, 1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_lenders_keep_every_promise(seed: int, count: int, bound: float, judged: bool) -> None:
    random = np.random.default_rng(seed)
    unit_ND, user_N = unit(random, count), random.integers(0, 9, count)
    tastes = None
    if judged:
        tastes = Tastes(
            user_NF=random.standard_normal((count, 4)), item_NF=random.standard_normal((count, 4))
        )
    lender_N = find_lenders(unit_ND, user_N, bound, tastes)
    borrows = lender_N != np.arange(count)
    assert (lender_N <= np.arange(count)).all()
    assert not borrows[lender_N].any()  # who lends borrows nothing
    assert ((1 - (unit_ND * unit_ND[lender_N]).sum(1))[borrows] < bound + 1e-12).all()
    assert (user_N[borrows] != user_N[lender_N[borrows]]).all()
    assert (
        len({*zip(user_N.tolist(), lender_N.tolist(), strict=True)}) == count
    )  # nobody shows an image twice
    if tastes is not None:
        least = (1 - LARGEST_LOSS) * tastes.like_of(np.arange(count))
        assert (tastes.like_of(lender_N) >= least - 1e-12).all()


def test_an_item_borrows_from_the_nearest_lender_and_a_lender_borrows_nothing() -> None:
    angle = np.array([0.0, 0.3, 0.2, 0.25])  # the third is nearer to the second than to the first
    unit_ND = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    bound = 1 - np.cos(0.22)
    assert find_lenders(unit_ND, np.arange(4), bound).tolist() == [0, 1, 1, 1]
    # The same user has the last two items: the nearest one lends to the third alone.
    assert find_lenders(unit_ND, np.array([0, 1, 2, 2]), bound).tolist() == [0, 1, 1, 3]


def test_items_are_compared_within_parts_of_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    alike_ND, users = np.ones((5, 1)), np.arange(5)
    assert find_lenders(alike_ND, users, 0.1).tolist() == [0, 0, 0, 0, 0]
    monkeypatch.setattr(sharing, "MAX_COMPARED", 2)
    assert find_lenders(alike_ND, users, 0.1).tolist() == [0, 0, 2, 2, 4]


def test_blocks_change_no_lender(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    unit_ND, user_N = unit(random, 200), random.integers(0, 50, 200)
    whole = find_lenders(unit_ND, user_N, 0.1)
    monkeypatch.setattr(sharing, "BLOCK", 7)
    assert find_lenders(unit_ND, user_N, 0.1).tolist() == whole.tolist()
    assert 0 < (whole != np.arange(200)).sum() < 150
