"""Choosing among candidates: liked, different, and copies last; nearest items exactly."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rebeca_ray.prior import selection
from rebeca_ray.prior.selection import choose, nearest_items


def unit(rows: list[list[float]]) -> np.ndarray:
    values = np.array(rows, np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


ALIKE = unit([[1, 0], [1, 0.01], [0, 1], [1, 1]])
NO_COPIES = np.zeros(4, bool)


def test_by_like_alone_the_most_liked_come_first() -> None:
    assert choose(ALIKE, np.array([0.2, 0.9, 0.5, 0.1]), NO_COPIES, 2, 0.0).tolist() == [1, 2]


def test_diversity_passes_over_what_is_like_those_chosen() -> None:
    like = np.array([0.9, 0.89, 0.5, 0.1])
    assert choose(ALIKE, like, NO_COPIES, 2, 0.0).tolist() == [0, 1]
    assert choose(ALIKE, like, NO_COPIES, 2, 0.5).tolist() == [0, 2]


def test_a_copy_is_taken_only_when_nothing_else_is_left() -> None:
    like, copies = np.array([0.9, 0.1, 0.2, 0.3]), np.array([True, False, False, False])
    assert choose(ALIKE, like, copies, 3, 0.0).tolist() == [3, 2, 1]
    assert choose(ALIKE[:3], like[:3], np.array([True, True, False]), 2, 0.0).tolist() == [2, 0]


def test_as_many_candidates_as_requested_are_kept_in_their_order() -> None:
    assert choose(
        ALIKE, np.array([0.1, 0.9, 0.5, 0.3]), np.array([True, False, False, False]), 4, 0.3
    ).tolist() == [0, 1, 2, 3]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(0, 11), st.floats(0, 1), st.integers(0, 1000))
def test_always_as_many_different_ones_as_requested(
    num_chosen: int, more: int, diversity: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    count = num_chosen + more
    vectors = unit(random.standard_normal((count, 3)).tolist())
    chosen = choose(vectors, random.random(count), random.random(count) < 0.5, num_chosen, diversity)
    assert len(set(chosen.tolist())) == num_chosen


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_nearest_items_are_the_nearest_whatever_the_chunks(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "ITEMS_PER_CHUNK", chunk)
    items = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)))
    row, similarity = nearest_items(items[[5, 17, 39]] * torch.tensor([[1.0], [-1.0], [1.0]]), items)
    assert row[[0, 2]].tolist() == [5, 39]
    assert row[1] == (items @ -items[17]).argmax()
    torch.testing.assert_close(
        similarity, (items[[5, 17, 39]] * torch.tensor([[1.0], [-1.0], [1.0]]) @ items.T).max(1).values
    )
