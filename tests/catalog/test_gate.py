"""The quality gate: items that please anybody as much as their own user stop a run before it is rendered."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rebeca_ray import schemas
from rebeca_ray.catalog.gate import MAX_ITEMS_A_USER, check_plan, plan_test, read_sample
from rebeca_ray.catalog.layout import Run
from rebeca_ray.checkpoint import TrainedPrior
from rebeca_ray.config import GateSettings
from rebeca_ray.errors import QualityGateError
from rebeca_ray.selector import Selector
from tests.conftest import TINY_NETWORK, D, untrained_prior

NUM_FACTORS = 4


@pytest.fixture
def prior() -> TrainedPrior:
    torch.manual_seed(0)
    return replace(untrained_prior(TINY_NETWORK), selector=Selector(D, NUM_FACTORS))


def write_plan(folder: Path, prior: TrainedPrior, *, users: int, own: bool, items: int = 3, origin: str = "new") -> Run:
    """A plan whose items are what the selector says their user likes best, or what another user likes; two files."""
    assert prior.selector is not None
    random = np.random.default_rng(0)
    factors = random.standard_normal((users, NUM_FACTORS + 1)).astype(np.float32)
    with torch.no_grad():
        liked = (torch.from_numpy(factors[:, :-1]) @ prior.selector.factors.weight).numpy()  # up the gradient of the logit
    whose = np.arange(users) if own else np.roll(np.arange(users), 7)
    embeds = np.repeat(liked[whose], items, axis=0) * 5
    owner = np.repeat(np.arange(users), items)
    schema = schemas.plan(D)
    columns = {
        "item_id": [f"item-{number}" for number in range(users * items)],
        "user_id": [f"user-{number:04d}" for number in owner],
        "rank": np.tile(np.arange(items), users).astype(np.int16),
        "image_embeds": pa.FixedSizeListArray.from_arrays(pa.array(embeds.astype(np.float32).ravel()), type=schemas.image_embeds(D)),
        "like_probability": np.zeros(users * items, np.float32),
        "user_factors": list(factors[owner]),
        "nearest_item_id": pa.nulls(users * items, pa.string()),
        "nearest_similarity": pa.nulls(users * items, pa.float32()),
        "origin": [origin] * (users * items),
        "prompt": [""] * (users * items),
    }
    table = pa.table([pa.array(columns[name], schema.field(name).type) for name in schema.names], schema=schema)
    run = Run(root=str(folder), run_date="2026-01-01", run_id="run", epoch=1)
    Path(run.plan).mkdir(parents=True)
    half = table.num_rows // 2
    pq.write_table(table.slice(0, half), f"{run.plan}/a.parquet")
    pq.write_table(table.slice(half), f"{run.plan}/b.parquet")
    return run


def test_personal_items_pass_with_their_figures(tmp_path: Path, prior: TrainedPrior) -> None:
    test = check_plan(write_plan(tmp_path, prior, users=30, own=True), prior, GateSettings())
    assert test is not None
    assert test.num_users == 30
    assert test.p_value == 1 / 10_001  # no permutation comes near
    assert test.effect > 0.05
    assert test.figures()["z_at_210_users"] == round(test.z * (209 / 29) ** 0.5, 2)


def test_items_of_others_stop_the_run_and_null_lets_it_go_on(tmp_path: Path, prior: TrainedPrior) -> None:
    run = write_plan(tmp_path, prior, users=30, own=False)
    with pytest.raises(
        QualityGateError, match=r"please their own users no more than others.*30 users.*gate\.max_p_value is 0\.01"
    ) as error:
        check_plan(run, prior, GateSettings())
    assert error.value.exit_code == 4
    test = check_plan(run, prior, GateSettings(max_p_value=None))
    assert test is not None
    assert test.p_value > 0.01


def test_few_users_are_told_of_but_stop_nothing(tmp_path: Path, prior: TrainedPrior) -> None:
    test = check_plan(write_plan(tmp_path, prior, users=19, own=False), prior, GateSettings())
    assert test is not None
    assert test.num_users == 19


def test_the_population_and_a_prior_without_selector_are_not_tested(tmp_path: Path, prior: TrainedPrior) -> None:
    run = write_plan(tmp_path, prior, users=30, own=False, origin="population")
    assert check_plan(run, prior, GateSettings()) is None
    assert check_plan(write_plan(tmp_path / "b", prior, users=30, own=False), replace(prior, selector=None), GateSettings()) is None


def test_a_large_plan_is_sampled(tmp_path: Path, prior: TrainedPrior) -> None:
    sample = read_sample(write_plan(tmp_path, prior, users=2500, own=True, items=12).plan)
    users, counts = np.unique(sample["user_id"].to_numpy(zero_copy_only=False), return_counts=True)
    assert len(users) == 2000
    assert counts.max() == MAX_ITEMS_A_USER


def test_the_matrix_is_what_each_user_says_of_each_users_items(tmp_path: Path, prior: TrainedPrior) -> None:
    assert prior.selector is not None
    sample = read_sample(write_plan(tmp_path, prior, users=5, own=True).plan)
    test = plan_test(sample, prior)
    assert test is not None
    embeds = prior.scaler.scale(torch.from_numpy(np.stack(sample["image_embeds"].to_numpy(zero_copy_only=False))))
    factors = torch.from_numpy(np.stack(sample["user_factors"].to_numpy(zero_copy_only=False)))
    assert test.own == pytest.approx(float(prior.selector.like_probability(embeds, factors).mean()), rel=1e-5)
