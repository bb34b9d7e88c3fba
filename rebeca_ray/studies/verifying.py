"""Fit the verifier of a study, and test it for users of its fit and for users that it has never seen.

Shapes: V users, N ratings, I items, D embed dim.
"""

import logging

import numpy as np

from rebeca_ray.config.evaluation import EvaluateConfig
from rebeca_ray.config.verifier import VerifierSettings
from rebeca_ray.errors import InputError
from rebeca_ray.evaluation.accuracy import Predictions, measure_accuracy
from rebeca_ray.evaluation.history_verifier import HistoryVerifier
from rebeca_ray.evaluation.independence import check_independence
from rebeca_ray.evaluation.verifier import Ratings, Verifier
from rebeca_ray.evaluation.verifier_training import choose_verifier, fit_users, fit_verifier, grid_of
from rebeca_ray.schemas import TRAINING
from rebeca_ray.studies.metrics import VerifierAccuracy, VerifierFigures
from rebeca_ray.studies.ratings import StudyRatings
from rebeca_ray.training.calibrate import factors_of
from rebeca_ray.training.selector import WEIGHT_DECAY, fit_selector

log = logging.getLogger(__name__)

AnyVerifier = Verifier | HistoryVerifier
NUM_SAMPLES = 1000  # of a bootstrap
UNSEEN_SHARE = 0.2  # of the users, whom a second verifier does not see


def fit_study_verifier(ratings: StudyRatings, config: EvaluateConfig) -> tuple[AnyVerifier, VerifierFigures]:
    """Return the verifier of a study and its figures.

    Its ratings and seed are none of the selector's. Raises InputError if they are, and for ratings that
    cannot be fitted or tested.
    """
    check_apart(ratings, config)
    interactions, x_ID = ratings.interactions, ratings.items.image_embeds
    fit, test = (ratings.verifier_ratings(mask) for mask in (ratings.parts.fit_N, ratings.parts.test_N))
    is_unseen_V = np.random.default_rng(config.seed).random(interactions.num_users) < UNSEEN_SHARE
    unseen_test = test.take(is_unseen_V[test.user_N])
    verifier: AnyVerifier
    later: AnyVerifier
    if config.verifier is None:
        verifier, later = (
            fit_history_verifier(ratings, is_fitted_V, config.verifier_seed)
            for is_fitted_V in (np.ones_like(is_unseen_V), ~is_unseen_V)
        )
        kind, num_factors, weight_decay = "history", verifier.factor_VF.shape[1] - 1, WEIGHT_DECAY
    else:
        verifier = choose(fit, x_ID, config.verifier, config)
        settings = verifier.settings
        others = fit_verifier(fit.take(~is_unseen_V[fit.user_N]), x_ID, settings)
        later = fit_users(others, fit.take(is_unseen_V[fit.user_N]), x_ID)
        kind, num_factors, weight_decay = settings.kind, settings.num_factors, settings.weight_decay
    return verifier, VerifierFigures(
        kind=kind,
        num_factors=num_factors,
        weight_decay=weight_decay,
        ratings=len(fit.user_N),
        seen=tested(verifier, test, x_ID, config.seed),
        unseen=tested(later, unseen_test, x_ID, config.seed),
    )


def fit_history_verifier(ratings: StudyRatings, is_fitted_V: np.ndarray, seed: int) -> HistoryVerifier:
    """Return a verifier of the form `history`, fitted to some users; it has factors of all.

    Raises InputError unless there are likes.
    """
    fit_N, interactions = ratings.parts.fit_N, ratings.interactions
    block = ratings.block(fit_N)
    x_ID = ratings.items.image_embeds
    model = fit_selector([block.part(is_fitted_V[interactions.user_index[fit_N]])], x_ID, seed)
    if model is None:
        raise InputError("verifier: no likes among its ratings; raise interactions.test")
    model.requires_grad_(False)
    factor_VF = factors_of(model, block, np.arange(interactions.num_users), x_ID)
    return HistoryVerifier(model=model, factor_VF=factor_VF, num_ratings_V=block.counts_V)


def choose(fit: Ratings, x_ID: np.ndarray, settings: VerifierSettings, config: EvaluateConfig) -> Verifier:
    """Return the verifier whose dimension and regularisation validate best."""
    choice = choose_verifier(
        fit, x_ID, grid_of(settings, config.num_factors_tried, config.weight_decay_tried)
    )
    for point in choice.points:
        log.info(
            f"verifier with {point.settings.num_factors} factors, weight decay "
            f"{point.settings.weight_decay:g}: validation loss {point.validation_loss:.4f} "
            f"after {point.num_epochs} epochs"
        )
    return choice.verifier


def check_apart(ratings: StudyRatings, config: EvaluateConfig) -> None:
    """Raise InputError if the verifier shares ratings or its seed with the selector."""
    interactions = ratings.interactions
    user_N = interactions.user_id[interactions.user_index]

    def pairs(chosen_N: np.ndarray) -> set[tuple[str, str]]:
        return set(zip(user_N[chosen_N].tolist(), interactions.item_id[chosen_N].tolist(), strict=True))

    check_independence(
        pairs(ratings.parts.fit_N | ratings.parts.test_N),
        pairs(interactions.split == TRAINING),
        config.verifier.seed if config.verifier else config.verifier_seed,
        config.training_seed,
    )


def tested(verifier: AnyVerifier, test: Ratings, x_ID: np.ndarray, seed: int) -> VerifierAccuracy:
    """Return the accuracy on the test ratings of users whom the verifier knows."""
    known = test.take(np.isin(test.user_N, np.flatnonzero(verifier.num_ratings_V)))
    like_N = verifier.like_probability(x_ID[known.item_N], known.user_N)
    measured = measure_accuracy(Predictions(like_N, known.like_N, known.user_N), NUM_SAMPLES, seed)
    return VerifierAccuracy.model_validate(measured)
