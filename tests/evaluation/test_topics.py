"""Topic precision: exact by hand, with the properties of a subset rule; planted topics are recovered."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rebeca_ray.errors import InputError
from rebeca_ray.evaluation.topic_model import fit_bertopic, fit_topics, rows_of_one, split_passages
from rebeca_ray.evaluation.topics import liked_topics, topic_precision, topic_sets
from rebeca_ray.stickers.captions import real_captions
from rebeca_ray.stickers.simulate import draw_ratings, draw_taste, load_world

THEMES = (
    ["otter", "river", "salmon", "reeds"],
    ["violin", "orchestra", "concert", "cello"],
    ["volcano", "lava", "crater", "ash"],
)
cases = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 8))


def some_probabilities(seed: int, count: int, num_topics: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(num_topics, 0.4), count)


def planted(count: int = 60, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Return captions of three themes, each of three words of its theme, and the themes [N]."""
    random = np.random.default_rng(seed)
    theme = np.arange(count) % len(THEMES)
    captions = [f"a picture of the {' and the '.join(random.permutation(THEMES[row])[:3])}" for row in theme]
    return captions, theme


def test_a_caption_has_the_most_probable_topics_until_their_sum_reaches_the_mass() -> None:
    probability = np.array([[0.05, 0.6, 0.35], [1, 0, 0], [0.5, 0.4, 0.1], [0.25, 0.5, 0.25], [1 / 3] * 3])
    expected = [[0, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert topic_sets(probability).tolist() == np.array(expected, bool).tolist()
    # At equal probability the first topic comes first.
    assert topic_sets(probability, 0.7).tolist()[3] == [True, True, False]
    assert topic_sets(probability, 1e-9).sum(1).tolist() == [1] * 5
    # 0.3 + 0.3 + 0.3 is below 0.9 in floating point.
    assert topic_sets(np.array([[0.3, 0.3, 0.3, 0.1]])).tolist() == [[True, True, True, False]]
    assert topic_sets(np.zeros((0, 3))).shape == (0, 3)


@given(cases, st.floats(0.01, 1), st.floats(0.01, 1))
@settings(deadline=None, max_examples=60)
def test_sets_grow_with_the_mass_and_none_can_be_smaller(
    case: tuple[int, int, int], one: float, other: float
) -> None:
    probability = some_probabilities(*case)
    small, large = sorted((one, other))
    topics = topic_sets(probability, large)
    assert not (topic_sets(probability, small) & ~topics).any()
    assert (topics * probability).sum(1) == pytest.approx(1, abs=1 - large + 2e-6)
    for row, chosen in zip(probability, topics, strict=True):
        assert not (~chosen).any() or row[chosen].min() >= row[~chosen].max()
        # Without its least probable topic, a set does not reach the mass.
        assert chosen.sum() == 1 or row[chosen].sum() - row[chosen].min() < large
    order = np.random.default_rng(case[0]).permutation(len(probability))
    assert (topic_sets(probability[order], large) == topics[order]).all()


def test_precision_of_three_users_by_hand() -> None:
    training = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], bool)
    liked = liked_topics(training, np.array([0, 0, 1]), num_users=4)
    assert liked.astype(int).tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    generated = np.array([[1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0]], bool)
    precision = topic_precision(generated, np.array([0, 0, 0, 1, 2]), liked)
    # User 2 has no liked topic, and user 3 no picture at all.
    assert precision == pytest.approx([2 / 3, 0, np.nan, np.nan], nan_ok=True)
    assert np.isnan(topic_precision(generated[:0], np.array([], int), liked)).all()


@given(cases, st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_a_picture_counts_if_its_topics_are_a_subset(case: tuple[int, int, int], num_users: int) -> None:
    random = np.random.default_rng(case[0])
    topics = topic_sets(some_probabilities(*case))
    user = random.integers(0, num_users, len(topics))
    everything = np.ones((num_users, topics.shape[1]), bool)
    has_pictures = np.bincount(user, minlength=num_users) > 0
    assert (topic_precision(topics, user, everything)[has_pictures] == 1).all()
    # Pictures of a user's liked training set itself all count.
    liked = liked_topics(topics, user, num_users)
    assert (topic_precision(topics, user, liked)[has_pictures] == 1).all()
    fewer = liked & (random.random(liked.shape) < 0.6)
    precision = topic_precision(topics, user, fewer)
    for row in range(num_users):
        mine = [set(np.flatnonzero(chosen)) for chosen in topics[user == row]]
        known = set(np.flatnonzero(fewer[row]))
        expected = sum(chosen <= known for chosen in mine) / len(mine) if mine and known else np.nan
        assert precision[row] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: topic_sets(np.array([[0.5, 0.6]])), "row 0 with a sum of 1.1"),
        (lambda: topic_sets(np.array([[1, 0], [1.5, -0.5]])), "row 1 .* smallest value of -0.5"),
        (lambda: topic_sets(np.array([[np.nan, 1]])), "row 0"),
        (lambda: topic_sets(np.ones(3)), "found shape (3,)"),
        (lambda: topic_sets(np.ones((1, 1)), 0), "mass: found 0"),
        (lambda: topic_sets(np.ones((1, 1)), 1.1), "mass: found 1.1"),
        (lambda: liked_topics(np.ones((1, 2), bool), np.array([3]), 3), "users: found 3 to 3"),
        (lambda: liked_topics(np.ones((1, 2), bool), np.array([-1]), 3), "users: found -1"),
        (lambda: liked_topics(np.ones((2, 2), bool), np.array([1]), 3), "for 1 users"),
        (lambda: liked_topics(np.ones((1, 2)), np.array([1]), 3), "of float64"),
        (
            lambda: topic_precision(np.ones((1, 2), bool), np.array([0]), np.ones((1, 3), bool)),
            "found 2 of the generated and 3 of the liked",
        ),
    ],
)
def test_misuse_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        call()


def test_planted_topics_are_recovered() -> None:
    captions, theme = planted()
    model = fit_topics(captions, len(THEMES))
    topics = topic_sets(model.probability(captions))
    assert (topics.sum(1) == 1).all()
    label = topics.argmax(1)
    topic_of_theme = [np.unique(label[theme == number]).tolist() for number in range(len(THEMES))]
    assert sorted(topic_of_theme) == [[0], [1], [2]]
    # Captions that the model never read, each with two themes or with one.
    new = ["An otter in the river. Ash of the volcano!", "the cello of an orchestra"]
    (otter,), (cello,), (ash,) = topic_of_theme
    expected = np.zeros((2, 3), bool)
    expected[0, [otter, ash]] = expected[1, cello] = True
    assert (topic_sets(model.probability(new)) == expected).all()


def test_a_models_probabilities_depend_on_the_caption_alone() -> None:
    captions, _ = planted()
    model, again = (fit_topics(captions, 3) for _ in range(2))
    probability = model.probability(captions)
    assert (probability == again.probability(captions)).all()
    assert probability.sum(1) == pytest.approx(1)
    for row in (0, 17):
        assert model.probability([captions[row]])[0] == pytest.approx(probability[row], abs=1e-9)
    # No known word, and no word at all.
    assert (model.probability(["zeppelins", ""]) == 1 / 3).all()
    one, other = model.probability(["an otter. zeppelins.", "an otter."])
    assert one == pytest.approx(other)
    assert model.probability([]).shape == (0, 3)


def test_another_embedding_takes_the_place_of_words() -> None:
    captions, theme = planted()
    random = np.random.default_rng(1)
    center = random.standard_normal((3, 8))

    def embed(texts: Sequence[str]) -> np.ndarray:
        row = [next(row for row, words in enumerate(THEMES) if words[0] in text) for text in texts]
        return center[row] + 0.01 * random.standard_normal((len(texts), 8))

    with_first_words = [f"{THEMES[row][0]} {caption}" for caption, row in zip(captions, theme, strict=True)]
    label = fit_topics(with_first_words, 3, embed=embed).probability(with_first_words).argmax(1)
    assert len({*zip(label.tolist(), theme.tolist(), strict=True)}) == 3


def test_passages_are_sentences() -> None:
    passages, row = split_passages(["One. Two; three!", "", " No. 4.5 only "])
    assert passages == ["One.", "Two;", "three!", "No.", "4.5 only"]
    assert row.tolist() == [0, 0, 0, 2, 2]
    assert rows_of_one(np.array([[2.0, 6], [0, 0]])).tolist() == [[0.25, 0.75], [0.5, 0.5]]


def test_bad_captions_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="num_topics: 3 for captions of 2 distinct sentences; expected"):
        fit_topics(["an otter", "an otter", "a cello"], 3)
    with pytest.raises(InputError, match="captions: no word remains in 2 sentences; expected"):
        fit_topics(["a the", "of"], 1)
    monkeypatch.setitem(sys.modules, "bertopic", None)
    with pytest.raises(InputError, match="bertopic is not installed; expected for BERTopic; pip install"):
        fit_bertopic(["an otter"], lambda texts: np.ones((len(texts), 2)))
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError, match=r"scikit-learn is not installed; .* 'rebeca-ray\[topics\]'"):
        fit_topics(["an otter"], 1)


def test_bertopic_recovers_planted_topics() -> None:
    pytest.importorskip("bertopic")
    captions, theme = planted(90)
    random = np.random.default_rng(0)
    center = random.standard_normal((3, 16))

    def embed(texts: Sequence[str]) -> np.ndarray:
        assert len(texts) == len(theme)
        return center[theme] + 0.05 * random.standard_normal((len(texts), 16))

    topics = topic_sets(fit_bertopic(captions, embed).probability(captions))
    pairs = {(label, row) for label, row in zip(topics.argmax(1).tolist(), theme.tolist(), strict=True)}
    assert len(pairs) == 3


def test_users_like_the_topics_of_their_held_out_stickers_more_than_others_do() -> None:
    """Take the stickers' own captions: half of a simulated user's likes are training, half are generated."""
    item_id, captions = real_captions()
    row_of = {item: row for row, item in enumerate(item_id.tolist())}
    world = load_world()
    training, held_out = [], []
    for number in range(40):
        random = np.random.default_rng((0, number))
        ratings = draw_ratings(world, str(number), draw_taste(world, random), random)
        liked = [
            row_of[item]
            for item, rating in zip(
                ratings["item_id"].to_pylist(), ratings["rating"].to_pylist(), strict=True
            )
            if rating >= 4
        ]
        training += [(row, number) for row in liked[::2]]
        held_out += [(row, number) for row in liked[1::2]]
    train_row, train_user = np.array(training).T
    row, user = np.array(held_out).T
    for texts, num_topics in ((captions.content, 40), (captions.style, 5)):
        distinct = sorted(set(texts))
        model = fit_topics(distinct, num_topics)
        text_row = np.array([distinct.index(text) for text in texts])
        topics = topic_sets(model.probability(distinct))[text_row]
        liked = liked_topics(topics[train_row], train_user, 40)
        figure = np.nanmean(topic_precision(topics[row], user, liked))
        permuted = [
            np.nanmean(topic_precision(topics[row], user, np.roll(liked, shift, axis=0)))
            for shift in range(1, 40)
        ]
        assert figure > max(permuted) + 0.05
