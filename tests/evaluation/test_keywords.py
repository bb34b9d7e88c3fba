"""Keywords of a user: against a plain computation, and on a world of two words."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rebeca_ray.evaluation.keywords import count_words, keywords, log_odds, words_of


def test_the_ratio_is_that_of_the_paper_word_by_word() -> None:
    liked, disliked = [6, 1, 0], [1, 4, 2]
    ratios = log_odds(np.array(liked, float), np.array(disliked, float))
    for row in range(3):
        one, other = liked[row] + 1, disliked[row] + 1
        total, total_other = sum(liked) + 3, sum(disliked) + 3
        expected = math.log(one / (total - one)) - math.log(other / (total_other - other))
        assert ratios[row] == pytest.approx(expected)


def test_words_are_lower_case_without_function_words_and_digits() -> None:
    assert words_of("A Noto sticker of the parrot, No. 7 (grün)") == [
        "noto", "sticker", "parrot", "no", "grün",
    ]  # fmt: skip


def test_the_words_of_the_likes_come_first_and_shared_words_do_not_count() -> None:
    liked, disliked = ["a red cat"] * 5, ["a red dog"] * 5 + ["a blue dog"]
    vocabulary = sorted(count_words([*liked, *disliked, "a green bird"]))
    likes, dislikes = keywords(liked, disliked, vocabulary, most=2)
    assert likes[0] == "cat"
    assert dislikes[0] == "dog"
    assert not set(likes) & set(dislikes)
    assert "bird" not in (*likes, *dislikes)


@given(st.lists(st.sampled_from(["red cat", "blue dog", "green bird", "a"]), max_size=8), st.integers(0, 4))
def test_keywords_are_of_the_users_captions_alone(captions: list[str], most: int) -> None:
    vocabulary = sorted(count_words(["red cat", "blue dog", "green bird"]))
    half = len(captions) // 2
    likes, dislikes = keywords(captions[:half], captions[half:], vocabulary, most)
    assert len(likes) <= most
    assert len(dislikes) <= most
    assert set(likes) <= set(count_words(captions[:half]))
    assert set(dislikes) <= set(count_words(captions[half:]))


def test_a_user_without_ratings_and_a_world_of_one_word_have_no_keywords() -> None:
    assert keywords([], [], ["cat", "red"], 5) == ([], [])
    assert keywords(["cat"], [], ["cat"], 5) == ([], [])
