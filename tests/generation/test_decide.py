"""Decisions: each reason to plan a user, rotation over the nights, the order of the shards."""

import datetime
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rebeca_ray.catalog.layout import Run
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import LayoutSettings, RefreshSettings, SamplerSettings
from rebeca_ray.generation import request
from rebeca_ray.generation.context import Models, RunContext
from rebeca_ray.generation.decide import KEYS_PER_BUCKET, cut, decide_action, keys_and_sizes, thinned, turn
from rebeca_ray.generation.decisions import (
    Action,
    Decision,
    Decisions,
    PublishedUser,
    decisions_table,
    render_keys,
    shards_of,
)
from rebeca_ray.generation.planning.keys import settings_of_key
from tests.conftest import decide, run_of

DATE = datetime.date(2026, 3, 1)
YESTERDAY = DATE - datetime.timedelta(days=1)
CONFIG = {
    "prior": "/prior",
    "decoder": {"model": "owner/decoder"},
    "request": "/request",
    "catalog": "/catalog",
}


def tonight(*, date: datetime.date = DATE, can_rescore: bool = True, **refresh: Any) -> RunContext:
    """The context of a run; nothing that it names exists."""
    return RunContext(
        config=GenerateConfig.model_validate({**CONFIG, "num_images": 3, "refresh": refresh}),
        run=Run(root="/catalog", run_date=date.isoformat(), run_id="run", fencing_token=1),
        models=Models(
            versions={"prior": "prior", "decoder": "decoder", "code": "1.0"},
            decoder_weights={},
            safety_checker="none",
            embed_dim=16,
            clip_fingerprint=None,
            can_rescore=can_rescore,
            user_encoder="id",
        ),
        previous=None,
        requested=3,
        began_at=datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC),
    )


def decision(**changes: Any) -> Decision:
    """The decision on a user before it has an action."""
    values: dict[str, Any] = {
        "user_id": "anna",
        "action": Action.POOL,
        "num_images": 3,
        "prompt": "",
        "negative_prompt": "",
        "bucket": 0,
        "histories_bucket": 0,
        "cold_start": False,
        "history_digest": "digest",
        "generation": 0,
        "settings_digest": "settings",
        "priority": 0.0,
        "activity": 0,
    }
    return Decision(**{**values, **changes})


def last(**changes: Any) -> PublishedUser:
    """The row of the same user in the previous snapshot."""
    values: dict[str, Any] = {
        "user_id": "anna",
        "num_images": 3,
        "num_items": 3,
        "num_failed": 0,
        "cold_start": False,
        "stale": False,
        "history_digest": "digest",
        "generation": 4,
        "prior": "prior",
        "settings_digest": "settings",
        "planned_on": YESTERDAY,
        "planned_by": "yesterday",
    }
    return PublishedUser(**{**values, **changes})


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        (decision(), None, (Action.PLAN, 0)),
        (decision(), last(), (Action.CARRY, 4)),
        (decision(history_digest="rated something"), last(), (Action.PLAN, 4)),
        (decision(num_images=4), last(), (Action.PLAN, 4)),
        (decision(settings_digest="another decoder, or another prompt"), last(), (Action.PLAN, 4)),
        (decision(cold_start=True), last(), (Action.PLAN, 4)),
        (decision(), last(num_failed=1, num_items=2), (Action.PLAN, 4)),
        (decision(), last(num_items=2), (Action.CARRY, 4)),  # one was not fit to be shown
        (decision(), last(num_items=0), (Action.PLAN, 5)),  # none was: other items are planned
    ],
)
def test_a_user_is_planned_for_a_reason(
    now: Decision, before: PublishedUser | None, expected: tuple[Action, int]
) -> None:
    assert decide_action(now, before, tonight()) == expected


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("keep", Action.CARRY), ("rescore", Action.RESCORE), ("replace", Action.PLAN)],
)
def test_a_policy_decides_what_a_new_prior_changes(policy: str, expected: Action) -> None:
    context = tonight(on_new_prior=policy)
    assert decide_action(decision(), last(prior="older"), context) == (expected, 4)
    assert decide_action(decision(), last(), context) == (Action.CARRY, 4)
    if policy == "rescore":  # a prior without a selector judges nothing
        context = tonight(on_new_prior=policy, can_rescore=False)
        assert decide_action(decision(), last(prior="older"), context) == (Action.CARRY, 4)


def test_rotation_takes_each_user_in_turn_and_a_missed_night_delays_it() -> None:
    users = [f"user-{number}" for number in range(2000)]
    dates = [DATE + datetime.timedelta(days=days) for days in range(21)]
    turns = np.array([[turn(user, date, RefreshSettings(rotation=0.05)) for date in dates] for user in users])
    assert (np.diff(turns, axis=1).sum(1) == 1).all()  # once in twenty nights
    share = np.diff(turns, axis=1).mean(0)
    assert share.min() > 0.03
    assert share.max() < 0.07
    context = tonight(rotation=0.05, date=dates[-1])
    assert all(
        decide_action(decision(user_id=user), last(user_id=user, planned_on=dates[0]), context)
        == (Action.PLAN, 5)
        for user in users
    )
    never = RefreshSettings(rotation=0.0)
    assert turn("anna", dates[0], never) == turn("anna", dates[-1], never)


@given(
    users=st.lists(
        st.tuples(st.sampled_from([0.0, 1.0, -2.5]), st.integers(0, 3), st.integers(1, 5)), max_size=40
    ),
    items_per_shard=st.integers(1, 30),
)
def test_shards_hold_the_most_urgent_users_first_and_no_more_items_than_allowed(
    users: list[tuple[float, int, int]], items_per_shard: int
) -> None:
    rows = [
        decision(user_id=f"user-{number}", priority=priority, activity=activity, num_images=size)
        for number, (priority, activity, size) in enumerate(users)
    ]
    sizes = [row.num_images for row in rows]
    boundaries = cut(keys_and_sizes(rows, by_urgency=True), items_per_shard)
    decisions = Decisions(
        pool=None,
        by_urgency=True,
        boundaries=boundaries,
        planned_users=len(rows),
        planned_items=sum(sizes),
        shards=len(boundaries) + 1,
    )
    assert Decisions.from_dict(asdict(decisions)) == decisions
    shards = shards_of(render_keys(decisions_table(rows), by_urgency=True), boundaries).tolist()
    urgency = [(-row.priority, -row.activity) for row in rows]
    assert all(
        shards[one] <= shards[other]
        for one in range(len(rows))
        for other in range(len(rows))
        if urgency[one] < urgency[other]
    )
    for shard in set(shards):
        size_of_shard = sum(size for size, other in zip(sizes, shards, strict=True) if other == shard)
        assert size_of_shard <= items_per_shard + max(sizes) - 1
    assert sorted(set(shards)) == list(range(len(set(shards))))


def test_the_keys_of_large_buckets_are_thinned_and_cut_into_even_shards() -> None:
    """Of two buckets with 1,000 users each; a row stands for at most four users of two items."""
    users = [
        decision(user_id=f"user-{number}", bucket=number % 2, priority=float(number % 3), num_images=2)
        for number in range(2000)
    ]
    for by_urgency in (False, True):
        parts = [keys_and_sizes(users[bucket::2], by_urgency) for bucket in range(2)]
        few_G4 = np.concatenate([thinned(part) for part in parts])
        assert few_G4.shape == (2 * KEYS_PER_BUCKET, 4)
        assert few_G4[:, 3].sum() == 4000
        boundaries = cut(few_G4, 1000)
        sizes = 2 * np.bincount(shards_of(render_keys(decisions_table(users), by_urgency), boundaries))
        assert len(sizes) == 4
        assert np.abs(sizes - 1000).max() <= 3 * 8
    np.testing.assert_array_equal(thinned(parts[0][:5]), parts[0][:5])


def test_a_request_that_is_split_in_pieces_gives_the_same_decisions(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.model_copy(update={"layout": LayoutSettings(num_buckets=2)})
    whole = decide(config, run_of(config))
    monkeypatch.setattr(request, "ROWS_PER_BATCH", 1)
    monkeypatch.setattr(request, "ROWS_AT_ONCE", 2)
    assert decide(config, run_of(config)) == whole
    assert whole.planned_users == 5


def test_hidden_ratings_make_other_items_and_visible_ones_none() -> None:
    """A night that shows the hold-out again must not keep the items that were made without it."""
    sampler = SamplerSettings()

    def digests(**changes: Any) -> tuple[str, str]:
        context = tonight()
        values = {**CONFIG, "items": "/items", "interactions": {"path": "/ratings", "test": 0.1}, **changes}
        config = GenerateConfig.model_validate(values)
        return replace(context, config=config).settings_digest, settings_of_key(config, sampler)

    shown, hidden = digests(), digests(hide_hold_out=True)
    assert digests(interactions={"path": "/ratings"}) == shown
    assert digests(interactions=None) == shown
    less = digests(hide_hold_out=True, interactions={"path": "/ratings"})
    for part in range(2):
        assert len({shown[part], hidden[part], less[part]}) == 3
