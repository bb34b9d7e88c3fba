"""The verifier: exact forms, planted tastes, users who count alike, unseen users, and refusals."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from rebeca_ray.config.verifier import VerifierSettings
from rebeca_ray.errors import InputError
from rebeca_ray.evaluation.accuracy import Predictions, auc
from rebeca_ray.evaluation.verifier import BilinearVerifier, NcfVerifier, Ratings, Verifier, make_network
from rebeca_ray.evaluation.verifier_training import (
    choose_verifier,
    examples_of,
    fit_users,
    fit_verifier,
    grid_of,
    mean_loss,
    schedule_of,
    validation_mask,
)

D, ITEMS, USERS, UNSEEN, RATED = 12, 400, 60, 30, 100
BILINEAR = VerifierSettings(
    num_factors=4, learning_rate=3e-2, weight_decay=1e-3, early_stopping_patience=15, max_epochs=300
)
NCF = VerifierSettings(
    kind="ncf", num_factors=4, hidden_sizes=(8, 4), learning_rate=3e-2, early_stopping_patience=15
)


class Planted(NamedTuple):
    """Users with a bilinear taste of rank 3, and ratings drawn from their probabilities."""

    x_ID: np.ndarray
    probability_VI: np.ndarray
    fit: Ratings
    test: Ratings

    def oracle_auc(self, ratings: Ratings) -> float:
        probability_N = self.probability_VI[ratings.user_N, ratings.item_N]
        return auc(Predictions(probability_N, ratings.like_N, ratings.user_N))

    def auc_of(self, verifier: Verifier, ratings: Ratings, first_user: int = 0) -> float:
        user_N = ratings.user_N - first_user
        like_N = verifier.like_probability(self.x_ID[ratings.item_N], user_N)
        return auc(Predictions(like_N, ratings.like_N, user_N))


@pytest.fixture(scope="module")
def planted() -> Planted:
    """The first users rate for training, the others are unseen; every user also has test ratings."""
    random = np.random.default_rng(0)
    users = USERS + UNSEEN
    x_ID = random.standard_normal((ITEMS, D)).astype(np.float32)
    taste_VD = 1.2 * random.standard_normal((users, 3)) @ np.linalg.qr(random.standard_normal((D, 3)))[0].T
    logit_VI = (taste_VD + 0.3 * random.standard_normal(D)) @ x_ID.T + random.standard_normal((users, 1))
    probability_VI = 1 / (1 + np.exp(-logit_VI))
    item_VN = np.stack([random.permutation(ITEMS)[: 2 * RATED] for _ in range(users)])
    like_VN = random.random(item_VN.shape) < np.take_along_axis(probability_VI, item_VN, axis=1)
    user_VN = np.repeat(np.arange(users)[:, None], 2 * RATED, axis=1)
    parts = [
        Ratings(*(column_VN[:, part].ravel() for column_VN in (user_VN, item_VN, like_VN.astype(np.int8))))
        for part in (slice(0, RATED), slice(RATED, None))
    ]
    return Planted(x_ID, probability_VI, *parts)


def seen(ratings: Ratings) -> Ratings:
    return ratings.take(ratings.user_N < USERS)


def unseen(ratings: Ratings) -> Ratings:
    """The unseen users, counted from 0."""
    rest = ratings.take(ratings.user_N >= USERS)
    return rest._replace(user_N=rest.user_N - USERS)


@pytest.fixture(scope="module")
def bilinear(planted: Planted) -> Verifier:
    return fit_verifier(seen(planted.fit), planted.x_ID, BILINEAR)


@pytest.fixture(scope="module")
def ncf(planted: Planted) -> Verifier:
    return fit_verifier(seen(planted.fit), planted.x_ID, NCF)


@pytest.fixture(params=["bilinear", "ncf"])
def verifier(request: pytest.FixtureRequest) -> Verifier:
    return request.getfixturevalue(request.param)


def test_the_bilinear_form_equals_the_formula(bilinear: Verifier, planted: Planted) -> None:
    weight_TD = bilinear.network.items.weight.double().numpy()
    ma_DF, mb_D = weight_TD[:-1].T, weight_TD[-1]
    for user, item in ((0, 0), (7, 20), (59, 399)):
        theta_T = bilinear.theta_VT[user].double().numpy()
        x_D = planted.x_ID[item].astype(np.float64)
        logit = theta_T[:-1] @ (x_D @ ma_DF) + theta_T[-1] + x_D @ mb_D
        like = bilinear.like_probability(x_D[None], np.array([user]))
        assert like == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-5)


def test_the_ncf_equals_the_formula(ncf: Verifier, planted: Planted) -> None:
    assert isinstance(ncf.network, NcfVerifier)
    weights = {name: tensor.double().numpy() for name, tensor in ncf.network.state_dict().items()}
    for user, item in ((0, 0), (7, 20), (59, 399)):
        theta_F, other_F, bias = np.split(ncf.theta_VT[user].double().numpy(), [4, 8])
        w_F, v_F, popularity = np.split(
            weights["items.weight"] @ planted.x_ID[item].astype(np.float64), [4, 8]
        )
        hidden = np.concatenate([other_F, v_F])
        for layer in (0, 3):  # ReLU and dropout stand between
            hidden = weights[f"perceptron.{layer}.weight"] @ hidden + weights[f"perceptron.{layer}.bias"]
            hidden = np.maximum(hidden, 0)
        head = weights["head.weight"] @ np.concatenate([theta_F * w_F, hidden]) + weights["head.bias"]
        like = ncf.like_probability(planted.x_ID[[item]], np.array([user]))
        assert like == pytest.approx(1 / (1 + np.exp(-(head + bias + popularity))), rel=1e-5)


def test_it_recovers_planted_tastes(bilinear: Verifier, ncf: Verifier, planted: Planted) -> None:
    test = seen(planted.test)
    oracle = planted.oracle_auc(test)
    assert 0.8 < oracle < 0.95
    assert planted.auc_of(bilinear, test) > oracle - 0.03
    assert planted.auc_of(ncf, test) > oracle - 0.03


def test_without_factors_it_is_the_authors_control(bilinear: Verifier, planted: Planted) -> None:
    """The control ranks all items alike for every user, so it misses taste."""
    control = fit_verifier(seen(planted.fit), planted.x_ID, BILINEAR.model_copy(update={"num_factors": 0}))
    like_GI = control.like_matrix(planted.x_ID, np.arange(USERS))
    order_I = like_GI[0].argsort()
    assert (np.diff(like_GI[:, order_I], axis=1) >= -1e-6).all()
    test = seen(planted.test)
    assert planted.auc_of(control, test) < planted.auc_of(bilinear, test) - 0.05


def test_initial_weights_have_the_published_laws(planted: Planted) -> None:
    network, num_numbers = make_network(VerifierSettings(num_factors=500), embed_dim=200)
    assert isinstance(network, BilinearVerifier)
    assert num_numbers == 501
    assert float(network.items.weight.detach().std()) == pytest.approx(1e-5, rel=0.01)
    still = BILINEAR.model_copy(
        update={"learning_rate": 1e-9, "max_epochs": 1, "num_factors": 200, "weight_decay": 0.0}
    )
    theta_VT = fit_verifier(seen(planted.fit), planted.x_ID, still).theta_VT
    assert float(theta_VT.mean()) == pytest.approx(0, abs=0.03)
    assert float(theta_VT.std()) == pytest.approx(1, abs=0.03)


def test_the_loss_is_the_mean_over_users_of_their_means() -> None:
    random = np.random.default_rng(1)
    ratings = Ratings(np.array([0, 0, 0, 0, 0, 2, 3, 3]), random.integers(0, 5, 8), random.integers(0, 2, 8))
    network, theta_VT = BilinearVerifier(3, 2), torch.randn(4, 3)
    torch.nn.init.normal_(network.items.weight)
    x_ID = torch.randn(5, 3)
    loss = mean_loss(network, theta_VT, x_ID, examples_of(ratings, "cpu")).item()
    by_user: dict[int, list[float]] = {}
    for user, item, like in zip(*ratings, strict=True):
        number_T = network.items.weight.detach().double().numpy() @ x_ID[item].double().numpy()
        theta_T = theta_VT[user].double().numpy()
        logit = theta_T[:2] @ number_T[:2] + number_T[2] + theta_T[2]
        by_user.setdefault(int(user), []).append(np.log1p(np.exp(-logit if like else logit)))
    assert loss == pytest.approx(np.mean([np.mean(losses) for losses in by_user.values()]), rel=1e-5)


def test_users_count_alike_however_much_they_rate(planted: Planted) -> None:
    """Ten copies of one user's ratings change nothing."""
    ratings = seen(planted.fit)
    validation_N = validation_mask(len(ratings.user_N), 0.1, 0)
    copies = np.where(ratings.user_N == 3, 10, 1)
    settings = BILINEAR.model_copy(update={"max_epochs": 40})
    once = fit_verifier(ratings, planted.x_ID, settings, validation_N)
    many = fit_verifier(
        Ratings(*(np.repeat(column, copies) for column in ratings)),
        planted.x_ID,
        settings,
        np.repeat(validation_N, copies),
    )
    users = np.arange(USERS)
    like = [fitted.like_matrix(planted.x_ID[:50], users) for fitted in (once, many)]
    np.testing.assert_allclose(*like, atol=2e-3)
    assert like[0].std() > 0.1


def test_unseen_users_are_judged_from_their_history(verifier: Verifier, planted: Planted) -> None:
    before = {name: weight.clone() for name, weight in verifier.network.state_dict().items()}
    others = fit_users(verifier, unseen(planted.fit), planted.x_ID)
    test = planted.test.take(planted.test.user_N >= USERS)
    oracle = planted.oracle_auc(test)
    assert planted.auc_of(others, test, first_user=USERS) > oracle - 0.03
    for name, weight in others.network.state_dict().items():
        assert torch.equal(weight, before[name])


def test_an_unseen_user_depends_on_no_other(verifier: Verifier, planted: Planted) -> None:
    ratings = unseen(planted.fit)
    together = fit_users(verifier, ratings, planted.x_ID)
    single = ratings.take(ratings.user_N == 5)
    alone = fit_users(verifier, single._replace(user_N=single.user_N - 5), planted.x_ID)
    np.testing.assert_allclose(
        alone.like_matrix(planted.x_ID, np.array([0])),
        together.like_matrix(planted.x_ID, np.array([5])),
        atol=1e-3,
    )


def test_a_history_gives_the_most_probable_theta(bilinear: Verifier, planted: Planted) -> None:
    """Newton's method in double precision minimises the same sum."""
    ratings = unseen(planted.fit)
    others = fit_users(bilinear, ratings, planted.x_ID)
    trained_VT = bilinear.theta_VT.double().numpy()
    mean_T, deviation_T = trained_VT.mean(0), trained_VT.std(0, ddof=1)
    number_IT = planted.x_ID.astype(np.float64) @ bilinear.network.items.weight.double().numpy().T
    for user in (0, 11):
        rated = ratings.take(ratings.user_N == user)
        z_NT = np.c_[number_IT[rated.item_N, :-1], np.ones(len(rated.item_N))] * deviation_T
        offset_N = number_IT[rated.item_N, -1] + z_NT @ (mean_T / deviation_T)
        z_T = np.zeros(len(mean_T))
        for _ in range(30):
            like_N = 1 / (1 + np.exp(-(offset_N + z_NT @ z_T)))
            gradient_T = z_NT.T @ (like_N - rated.like_N) + z_T
            curvature_TT = (z_NT.T * (like_N * (1 - like_N))) @ z_NT + np.eye(len(z_T))
            z_T -= np.linalg.solve(curvature_TT, gradient_T)
        assert others.theta_VT[user].numpy() == pytest.approx(mean_T + deviation_T * z_T, abs=2e-3)


def test_a_user_with_few_ratings_is_close_to_the_average_one(bilinear: Verifier, planted: Planted) -> None:
    mean_T = bilinear.theta_VT.mean(0)
    deviation_T = bilinear.theta_VT.std(0)
    distance = []
    for count in (1, 10, RATED):
        ratings = unseen(planted.fit)
        others = fit_users(
            bilinear, ratings.take(np.arange(len(ratings.user_N)) % RATED < count), planted.x_ID
        )
        distance.append(float(((others.theta_VT - mean_T) / deviation_T).norm(dim=1).mean()))
    assert distance[0] < distance[1] < distance[2]
    assert distance[0] < 1


def test_both_calls_agree_whatever_the_batches(
    verifier: Verifier, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = np.array([3, 0, 41])
    like_GN = verifier.like_matrix(planted.x_ID[:20], users)
    assert like_GN.shape == (3, 20)
    for row_N, user in zip(like_GN, users, strict=True):
        single_N = verifier.like_probability(planted.x_ID[:20], np.full(20, user))
        np.testing.assert_allclose(row_N, single_N, rtol=1e-5)
    assert verifier.like_probability(planted.x_ID[:0], users[:0]).shape == (0,)
    monkeypatch.setattr("rebeca_ray.evaluation.verifier.PAIRS_AT_ONCE", 7)
    np.testing.assert_allclose(verifier.like_matrix(planted.x_ID[:20], users), like_GN, rtol=1e-5)
    single_N = verifier.like_probability(planted.x_ID[:20], np.full(20, 41))
    np.testing.assert_allclose(single_N, like_GN[2], rtol=1e-5)


def test_the_seed_decides_and_the_callers_generator_is_untouched(planted: Planted) -> None:
    settings = NCF.model_copy(update={"max_epochs": 3, "batch_size": 500})
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = fit_verifier(seen(planted.fit), planted.x_ID, settings)
    assert torch.equal(torch.rand(3), expected)
    again = fit_verifier(seen(planted.fit), planted.x_ID, settings)
    other = fit_verifier(seen(planted.fit), planted.x_ID, settings.model_copy(update={"seed": 43}))
    assert torch.equal(first.theta_VT, again.theta_VT)
    assert first.validation_loss == again.validation_loss
    assert not torch.equal(first.theta_VT, other.theta_VT)


def test_training_ends_after_its_patience_and_keeps_the_best_epoch(planted: Planted) -> None:
    """An epoch that falls short of the tolerance does not count as better."""
    settings = BILINEAR.model_copy(update={"early_stopping_tolerance": 1.0, "early_stopping_patience": 3})
    stopped = fit_verifier(seen(planted.fit), planted.x_ID, settings)
    first = fit_verifier(seen(planted.fit), planted.x_ID, settings.model_copy(update={"max_epochs": 1}))
    assert stopped.num_epochs == 1
    assert torch.equal(stopped.theta_VT, first.theta_VT)
    quick = BILINEAR.model_copy(update={"early_stopping_patience": 3, "learning_rate": 0.2})
    longer = fit_verifier(seen(planted.fit), planted.x_ID, quick)
    assert 3 < longer.num_epochs < 200
    assert longer.validation_loss < first.validation_loss
    # The weights are those of the best epoch, three epochs before the end.
    ratings = seen(planted.fit)
    held = ratings.take(validation_mask(len(ratings.user_N), quick.validation_share, quick.seed))
    like_N = longer.like_probability(planted.x_ID[held.item_N], held.user_N).astype(np.float64)
    loss_N = -np.log(np.where(held.like_N == 1, like_N, 1 - like_N))
    means = [loss_N[held.user_N == user].mean() for user in np.unique(held.user_N)]
    assert longer.validation_loss == pytest.approx(np.mean(means), rel=1e-5)


def test_the_learning_rate_decays_by_epoch_or_on_a_plateau() -> None:
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = schedule_of(optimizer, BILINEAR.model_copy(update={"learning_rate_decay": 0.9}))
    optimizer.step()
    schedule.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.81)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = schedule_of(optimizer, NCF)
    assert isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
    rates = []
    for _ in range(8):
        schedule.step(1.0)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [1.0] * 6 + [0.5] * 2


def test_the_grid_is_judged_by_validation(planted: Planted) -> None:
    """Without factors there is no taste, and a strong regularisation forgets it."""
    ratings = seen(planted.fit)
    grid = grid_of(
        BILINEAR.model_copy(update={"max_epochs": 80}), num_factors=[0, 4], weight_decay=[1e-3, 3e-2]
    )
    choice = choose_verifier(ratings, planted.x_ID, grid)
    assert [(point.settings.num_factors, point.settings.weight_decay) for point in choice.points] == [
        (0, 1e-3), (0, 3e-2), (4, 1e-3), (4, 3e-2),
    ]  # fmt: skip
    assert choice.verifier.settings == grid[2]
    assert choice.verifier.validation_loss == min(point.validation_loss for point in choice.points)
    alone = fit_verifier(ratings, planted.x_ID, grid[3])
    assert alone.validation_loss == choice.points[3].validation_loss
    with pytest.raises(InputError, match="grid: no settings to choose from"):
        choose_verifier(ratings, planted.x_ID, [])
    with pytest.raises(ValueError, match="less than or equal to 1"):
        grid_of(BILINEAR, num_factors=[4], weight_decay=[7.0])


def test_an_ncf_without_factors_is_refused() -> None:
    with pytest.raises(ValueError, match="num_factors is 0, but the form ncf needs factors"):
        VerifierSettings(kind="ncf", num_factors=0)


X = np.eye(4, dtype=np.float32)
GOOD = Ratings(np.array([0, 0, 1, 1]), np.array([0, 1, 2, 3]), np.array([0, 1, 0, 1]))


@pytest.mark.parametrize(
    ("ratings", "x_ID", "message"),
    [
        (GOOD._replace(user_N=np.array([0, 1])), X, r"\[2, 4, 4\] users, items and likes"),
        (Ratings(*np.zeros((3, 0), int)), X, r"\[0, 0, 0\] users, items and likes"),
        (GOOD._replace(user_N=np.array([0, 0, -1, 1])), X, "user -1; count users from 0"),
        (GOOD._replace(item_N=np.array([0, 1, 2, 4])), X, "items 0 to 4; expected rows of 4 embeddings"),
        (GOOD._replace(like_N=np.array([0, 1, 2, 1])), X, "like 2; expected 0 or 1"),
        (GOOD._replace(like_N=np.ones(4, int)), X, "3 likes among 3 ratings to fit; expected likes and"),
        (GOOD, X * np.nan, "NaN or infinite numbers"),
        (GOOD, X[0], r"shape \(4,\); expected rows"),
        (GOOD._replace(user_N=np.arange(4)), X, "no validation ratings of users with ratings to fit"),
    ],
)
def test_bad_ratings_are_refused(ratings: Ratings, x_ID: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_verifier(ratings, x_ID, BILINEAR, np.array([True, False, False, False])[: len(ratings.like_N)])


def test_unknown_users_and_other_embeddings_are_refused(bilinear: Verifier, planted: Planted) -> None:
    for user in (USERS, -1):
        with pytest.raises(
            InputError, match=f"user {user} has no ratings in it; expected users from 0 to 59"
        ):
            bilinear.like_probability(planted.x_ID[:1], np.array([user]))
    empty = replace(bilinear, num_ratings_V=np.where(np.arange(USERS) == 4, 0, 9))
    with pytest.raises(InputError, match="user 4 has no ratings in it"):
        empty.like_matrix(planted.x_ID[:1], np.arange(USERS))
    with pytest.raises(InputError, match="2 embeddings for 1 users"):
        bilinear.like_probability(planted.x_ID[:2], np.array([0]))
    with pytest.raises(InputError, match=r"shape \(4, 4\); expected rows of 12 numbers"):
        bilinear.like_matrix(X, np.array([0]))
    with pytest.raises(InputError, match="fitted to 1 user; others need the spread of at least two"):
        fit_users(replace(bilinear, num_ratings_V=np.eye(1, USERS, dtype=int)[0]), GOOD, X @ planted.x_ID[:4])


def test_a_loss_that_is_no_number_is_refused(planted: Planted) -> None:
    with pytest.raises(InputError, match="the validation loss is nan in every epoch; expected a number"):
        fit_verifier(seen(planted.fit), 1e38 * np.sign(planted.x_ID), NCF)
