"""Independence: no rating and no seed serves both the selector and the verifier."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rebeca_ray.config.sections import InteractionSettings, OptimizationSettings
from rebeca_ray.config.verifier import VerifierSettings
from rebeca_ray.data.histories import build_histories
from rebeca_ray.data.interactions import Interactions, read_interactions
from rebeca_ray.errors import InputError
from rebeca_ray.evaluation.independence import check_independence, ratings_for_verifier
from rebeca_ray.evaluation.verifier import Ratings
from rebeca_ray.evaluation.verifier_training import fit_verifier
from rebeca_ray.schemas import TEST, TRAINING, VALIDATION
from rebeca_ray.training import calibrate
from rebeca_ray.training.calibrate import training_blocks
from rebeca_ray.training.selector import fit_selector, ratings_of

USERS, ITEMS, D = 12, 60, 8
ITEM_IDS = np.array([f"i{number:02}" for number in range(ITEMS)])
Pairs = list[tuple[str, str]]


def write_ratings(folder: Path, flipped: set[tuple[str, str]] | None = None) -> InteractionSettings:
    """Write 40 ratings per user at random; those of the pairs `flipped` are turned round."""
    random = np.random.default_rng(0)
    rows = [
        (f"u{user:02}", ITEM_IDS[item], float(rating))
        for user in range(USERS)
        for item, rating in zip(random.permutation(ITEMS)[:40], random.integers(1, 6, 40), strict=True)
    ]
    rows = [
        (user, item, 6 - rating if (user, item) in (flipped or ()) else rating) for user, item, rating in rows
    ]
    user, item, rating = zip(*rows, strict=True)
    folder.mkdir()
    columns = {"user_id": user, "item_id": item, "rating": pa.array(rating, pa.float32())}
    pq.write_table(pa.table(columns), folder / "ratings.parquet")
    return InteractionSettings(path=str(folder), min_likes=0, hold_out=0.2, test=0.25)


def selector_pairs(settings: InteractionSettings, storage: Path) -> Pairs:
    """Return the ratings that the selector's training reads, by the path of the training job."""
    histories = build_histories(settings, ITEM_IDS, str(storage))
    user_N, item_N, _ = ratings_of(training_blocks(histories))
    return [(f"u{user:02}", str(ITEM_IDS[item])) for user, item in zip(user_N, item_N, strict=True)]


def pairs_of(interactions: Interactions, rows: np.ndarray) -> Pairs:
    users = interactions.user_id[interactions.user_index[rows]]
    return list(zip(users, interactions.item_id[rows], strict=True))


def parts_of(interactions: Interactions) -> tuple[np.ndarray, np.ndarray]:
    users = interactions.user_id[interactions.user_index]
    return ratings_for_verifier(interactions.split, users, interactions.item_id)


@pytest.fixture
def settings(tmp_path: Path) -> InteractionSettings:
    return write_ratings(tmp_path / "ratings")


def test_no_rating_is_in_both(settings: InteractionSettings, tmp_path: Path) -> None:
    interactions = read_interactions(settings)
    fit_N, test_N = parts_of(interactions)
    guided = set(selector_pairs(settings, tmp_path / "work"))
    fit, test = (set(pairs_of(interactions, rows)) for rows in (fit_N, test_N))
    assert not guided & fit
    assert not guided & test
    assert not fit & test
    assert len(guided) + len(fit) + len(test) == 40 * USERS
    assert set(interactions.split[fit_N | test_N]) == {VALIDATION, TEST}
    assert len(guided) == (40 - 8 - 10) * USERS
    check_independence(fit | test, guided, VerifierSettings().seed, OptimizationSettings().seed)


def test_the_selector_does_not_change_with_the_verifiers_ratings(
    settings: InteractionSettings, tmp_path: Path
) -> None:
    """All of the verifier's likes become dislikes and the reverse: the selector is the same to the bit."""
    interactions = read_interactions(settings)
    fit_N, test_N = parts_of(interactions)
    flipped = write_ratings(tmp_path / "flipped", set(pairs_of(interactions, fit_N | test_N)))
    x0_ID = np.random.default_rng(1).standard_normal((ITEMS, D)).astype(np.float32)
    selectors = []
    for number, source in enumerate((settings, flipped)):
        histories = build_histories(source, ITEM_IDS, str(tmp_path / f"work{number}"))
        selectors.append(fit_selector(training_blocks(histories), x0_ID, seed=1))
    before, after = selectors
    assert before is not None
    assert after is not None
    for name, weight in before.state_dict().items():
        assert torch.equal(weight, after.state_dict()[name])
    changed = read_interactions(flipped)
    assert (changed.like != interactions.like)[fit_N | test_N].mean() > 0.5  # a 3 stays a dislike


def test_the_verifier_does_not_change_with_the_selectors_ratings(settings: InteractionSettings) -> None:
    interactions = read_interactions(settings)
    fit_N, _ = parts_of(interactions)
    x_ID = np.random.default_rng(1).standard_normal((ITEMS, D)).astype(np.float32)
    quick = VerifierSettings(num_factors=2, max_epochs=5)
    fitted = []
    for like_N in (interactions.like, np.where(interactions.split == TRAINING, 1, interactions.like)):
        item_N = np.searchsorted(ITEM_IDS, interactions.item_id.astype(str))
        ratings = Ratings(interactions.user_index, item_N, like_N).take(fit_N)
        fitted.append(fit_verifier(ratings, x_ID, quick))
    assert torch.equal(fitted[0].theta_VT, fitted[1].theta_VT)


def test_the_parts_depend_on_user_and_item_alone(settings: InteractionSettings) -> None:
    interactions = read_interactions(settings)
    fit_N, test_N = parts_of(interactions)
    share = test_N.sum() / (fit_N | test_N).sum()
    assert 0.1 < share < 0.3
    order = np.random.default_rng(2).permutation(len(fit_N))
    users = interactions.user_id[interactions.user_index]
    shuffled = ratings_for_verifier(interactions.split[order], users[order], interactions.item_id[order])
    assert (shuffled.fit_N == fit_N[order]).all()
    assert (shuffled.test_N == test_N[order]).all()
    none = ratings_for_verifier(interactions.split, users, interactions.item_id, test_share=0.0)
    assert not none.test_N.any()
    assert (none.fit_N == (interactions.split != TRAINING)).all()


def test_ratings_for_training_alone_are_refused() -> None:
    with pytest.raises(InputError, match="all 3 ratings are for training; raise interactions.test"):
        ratings_for_verifier(np.full(3, TRAINING), np.array(["a"] * 3), np.array(["b", "c", "d"]))


def test_a_shared_rating_and_a_shared_seed_are_refused() -> None:
    mine, others = [("a", "x"), ("b", "x")], [("a", "y"), ("b", "x")]
    with pytest.raises(InputError, match="1 of its ratings were seen by the selector, such as one of item x"):
        check_independence(mine, others, verifier_seed=42, training_seed=0)
    for seed in range(4):
        with pytest.raises(InputError, match=f"the selector uses {seed} too; expected none of 0 to 3"):
            check_independence(mine, [], verifier_seed=seed, training_seed=0)
    check_independence(mine, [], verifier_seed=4, training_seed=0)


def test_the_refused_seeds_are_those_of_calibration(
    settings: InteractionSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration fits a selector, a guide and a judge: every seed of theirs is refused to the verifier."""
    seeds: list[int] = []

    def record(_blocks: Any, _x0: np.ndarray, seed: int) -> None:
        seeds.append(seed)

    monkeypatch.setattr(calibrate, "fit_selector", record)
    histories = build_histories(settings, ITEM_IDS, str(tmp_path / "work"))
    prior: Any = object()
    x0_ID = np.zeros((ITEMS, D), np.float32)
    assert calibrate.calibrate_prior(prior, histories, x0_ID, seed=42) is prior
    assert calibrate.choose_guidance(prior, next(training_blocks(histories)), x0_ID, seed=42) is prior
    assert seeds == [43, 44, 45]
    for seed in (42, *seeds):
        with pytest.raises(InputError, match="verifier.seed"):
            check_independence([], [], verifier_seed=seed, training_seed=42)
