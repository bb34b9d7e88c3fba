"""Planning: any request in any batches; histories, cold-start users, and the choice among candidates."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rebeca_ray import identity
from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.catalog.read import open_snapshot
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import InteractionSettings, SelectionSettings
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.errors import UserError
from rebeca_ray.generation.decisions import Decisions
from rebeca_ray.generation.plan import request_histories
from rebeca_ray.generation.planning.planner import PlanUsers
from rebeca_ray.generation.planning.user_loader import read_bucket
from rebeca_ray.generation.request import check_request
from rebeca_ray.prior.checkpoint import load_prior, save_prior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.sampling import sample_liked
from rebeca_ray.prior.selector import Selector
from rebeca_ray.prior.users import UserVectors
from tests.conftest import (
    TINY_NETWORK,
    USERS,
    D,
    assembled,
    plan,
    prepare,
    run_of,
    untrained_prior,
    versions_of,
)

NOBODY = Decisions(pool=None, by_urgency=True, boundaries=[], planned_users=0, planned_items=0, shards=0)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    request_rows=st.lists(
        st.tuples(st.sampled_from(USERS), st.none() | st.integers(1, 5)),
        min_size=1,
        unique_by=lambda row: row[0],
    ),
    cut=st.integers(0, len(USERS)),
)
def test_any_request_is_planned_item_by_item_whatever_the_batches(
    config: GenerateConfig, request_rows: list[tuple[str, int | None]], cut: int
) -> None:
    """Every user gets their count, ranks without a gap, and the same items however the request is cut."""
    users, counts = (list(column) for column in zip(*request_rows, strict=True))
    request = pa.table({"user_id": users, "num_images": pa.array(counts, pa.int32())})
    whole = plan(config, request)
    expected = {user: count or config.num_images for user, count in request_rows}
    assert [(row["user_id"], row["rank"]) for row in whole.to_pylist()] == [
        (u, rank) for u in sorted(users) for rank in range(expected[u])
    ]
    assert len(set(whole["item_id"].to_pylist())) == whole.num_rows
    parts = [plan(config, part) for part in (request.slice(0, cut), request.slice(cut)) if part.num_rows]
    assert (
        pa.concat_tables(parts).sort_by([("user_id", "ascending"), ("rank", "ascending")])
        == whole.combine_chunks()
    )


def test_a_prior_that_is_replaced_while_planning_is_refused(config: GenerateConfig) -> None:
    with pytest.raises(UserError, match="was replaced while this run was planning; run again"):
        PlanUsers(config, {"prior": "another version", "decoder": "any"}, None, None, NOBODY)


def write_history_prior(folder: Path, user_encoder: str) -> str:
    """Write a prior with random weights that knows users by their history, or not at all."""
    settings = TINY_NETWORK.model_copy(update={"user_encoder": user_encoder, "max_history": 4})
    save_prior(
        replace(untrained_prior(settings), selector=Selector(D, num_factors=4)), str(folder / user_encoder)
    )
    return str(folder / user_encoder)


def write_histories(folder: Path, **ratings: list[tuple[int, float]]) -> InteractionSettings:
    rows = [
        (user.replace("_", "-"), f"real-{item}", rating)
        for user, rated in ratings.items()
        for item, rating in rated
    ]
    user, item, rating = zip(*rows, strict=True)
    columns = {"user_id": user, "item_id": item, "rating": pa.array(rating, pa.float32())}
    pq.write_table(pa.table(columns), folder / "interactions.parquet")
    return InteractionSettings(path=str(folder / "interactions.parquet"))


def plan_with_histories(config: GenerateConfig, users: list[str]) -> list[dict[str, Any]]:
    return plan(config, pa.table({"user_id": users}), request_histories(config, run_of(config))).to_pylist()


def test_users_with_ratings_are_served_and_others_get_the_population(
    config: GenerateConfig, tmp_path: Path
) -> None:
    interactions = write_histories(
        tmp_path, user_0=[(1, 5.0), (2, 1.0)], new_user=[(3, 4.0)], grumpy=[(4, 1.0), (5, 2.0)]
    )
    config = config.model_copy(
        update={"prior": write_history_prior(tmp_path, "history"), "interactions": interactions}
    )
    check_request(config, identify_decoder(config.decoder))
    rows = plan_with_histories(config, ["user-0", "stranger", "new-user", "grumpy"])
    assert [(row["user_id"], row["origin"]) for row in rows[::3]] == [
        ("grumpy", "new"), ("new-user", "new"), ("user-0", "new"), (POPULATION_USER, "population"),
    ]  # fmt: skip
    assert len(rows) == 12
    assert all(0 < row["like_probability"] < 1 for row in rows)
    before = {row["item_id"]: row["image_embeds"] for row in rows}

    changed = write_histories(
        tmp_path, user_0=[(1, 5.0), (2, 1.0)], new_user=[(3, 4.0), (6, 5.0)], grumpy=[(4, 1.0), (5, 2.0)]
    )
    again = plan_with_histories(
        config.model_copy(update={"interactions": changed}), ["user-0", "stranger", "new-user", "grumpy"]
    )
    same = [row["item_id"] in before for row in again]
    # A new rating brings new items; those of the others stay, embedding and all.
    assert same == [True] * 3 + [False] * 3 + [True] * 6
    assert all(
        before[row["item_id"]] == row["image_embeds"] for row, kept in zip(again, same, strict=True) if kept
    )


def test_a_prior_by_id_gives_cold_start_users_the_population(config: GenerateConfig) -> None:
    rows = plan(config, pa.table({"user_id": ["user-1", "stranger"]})).to_pylist()
    assert [(row["user_id"], row["origin"]) for row in rows[::3]] == [
        ("user-1", "new"),
        (POPULATION_USER, "population"),
    ]


def test_a_prior_without_users_plans_the_population_pool_alone(
    config: GenerateConfig, tmp_path: Path
) -> None:
    config = config.model_copy(update={"prior": write_history_prior(tmp_path, "none")})
    assert {row["origin"] for row in plan(config, pa.table({"user_id": ["user-1"]})).to_pylist()} == {
        "population"
    }


def test_a_history_prior_names_its_missing_inputs(config: GenerateConfig, tmp_path: Path) -> None:
    config = config.model_copy(update={"prior": write_history_prior(tmp_path, "history")})
    with pytest.raises(UserError, match="knows users by their history; set `interactions`"):
        check_request(config, identify_decoder(config.decoder))
    config = config.model_copy(
        update={"interactions": write_histories(tmp_path, user_0=[(1, 5.0)]), "items": None}
    )
    with pytest.raises(UserError, match="interactions: need `items` too"):
        check_request(config, identify_decoder(config.decoder))


def test_one_candidate_per_item_is_plain_sampling_and_more_allow_a_choice(config: GenerateConfig) -> None:
    users = pa.table({"user_id": USERS[:2]})
    plain, chosen = (
        plan(
            config.model_copy(update={"selection": SelectionSettings(candidates_per_item=count)}), users
        ).to_pylist()
        for count in (1, 4)
    )
    prior = load_prior(config.prior)
    sampler = config.sampler.resolve(prior.sampling, 100)
    settings = PlanUsers(
        config.model_copy(update={"selection": SelectionSettings(candidates_per_item=1)}),
        versions_of(config),
        None,
        None,
        NOBODY,
    ).settings
    digests = prior.users["history_digest"].to_pylist()  # type: ignore[index]
    keys = [
        identity.plan_key(
            prior=prior.fingerprint, settings=settings, user_id=user, history_digest=digest, generation=0
        )
        for user, digest in zip(USERS[:2], digests, strict=False)
    ]
    seeds = [identity.candidate_seed(key, number) for key in keys for number in range(3)]
    users = UserVectors(token_GUH=prior.user_tokens(np.array([0, 1]), None))
    x = sample_liked(prior, Diffusion.build(prior.diffusion), users, np.repeat([0, 1], 3), seeds, sampler)
    expected = prior.scaler.unscale(x).numpy().astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(np.array([row["image_embeds"] for row in plain]), expected)
    assert [row["rank"] for row in plain] == [0, 1, 2] * 2
    assert [row["rank"] for row in chosen] == [0, 1, 2] * 2


def test_items_of_the_population_pool_are_counted_separately(config: GenerateConfig) -> None:
    pq.write_table(pa.table({"user_id": ["user-1", "stranger"]}), config.request)
    prepared = prepare(config)
    counts = assembled(config, prepared).counts
    assert (counts.requested, counts.new, counts.population) == (6, 3, 3)
    items = open_snapshot(config.catalog, prepared.run.snapshot).items()
    assert [(row["user_id"], row["origin"]) for row in items.to_pylist()[::3]] == [
        (POPULATION_USER, "population"), ("stranger", "population"), ("user-1", "new"),
    ]  # fmt: skip


def test_a_history_means_the_same_in_any_batch(config: GenerateConfig, tmp_path: Path) -> None:
    interactions = write_histories(
        tmp_path, **{f"user_{number}": [(number, 5.0), (number + 7, 1.0)] for number in range(7)}
    )
    config = config.model_copy(
        update={"prior": write_history_prior(tmp_path, "history"), "interactions": interactions}
    )
    whole = plan_with_histories(config, USERS)
    parts = [row for user in reversed(USERS) for row in plan_with_histories(config, [user])]
    assert sorted(parts, key=lambda row: (row["user_id"], row["rank"])) == whole


@pytest.mark.parametrize(("hide", "known"), [(False, 10), (True, 5)])
def test_a_generator_can_be_kept_from_the_hold_out(
    config: GenerateConfig, tmp_path: Path, hide: bool, known: int
) -> None:
    """At night it knows all ratings. To judge its items by the hold-out, it must not have seen it."""
    ratings = {"user_id": ["a"] * 10, "item_id": [f"real-{number}" for number in range(10)]}
    pq.write_table(pa.table(ratings), tmp_path / "ratings.parquet")
    interactions = InteractionSettings(path=str(tmp_path / "ratings.parquet"), hold_out=0.5)
    config = config.model_copy(update={"interactions": interactions, "hide_hold_out": hide})
    histories = request_histories(config, run_of(config))
    assert histories is not None
    planner = PlanUsers(config, versions_of(config), histories, None, NOBODY)
    block, _ = read_bucket(histories.file(0), planner.users.training_only)
    assert block.counts_V.tolist() == [known]
