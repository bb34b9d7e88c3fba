"""Who is drawn tonight: every reason by itself, rotation over the nights, the order of the units."""

import datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rebeca_ray.config.sections import RefreshSettings
from rebeca_ray.generation.decide import (
    CARRY,
    PLAN,
    RESCORE,
    Decisions,
    Tonight,
    cut,
    decide,
    draw_key,
    turn,
)

DATE = datetime.date(2026, 3, 1)


def tonight(**changes: Any) -> Tonight:
    told = {
        "date": DATE,
        "prior": "prior",
        "can_rescore": True,
        "made_with": "settings",
        "num_images": 3,
        "num_buckets": 1,
    }
    return Tonight(**{"refresh": RefreshSettings(), **told, **changes})


def row(**changes: Any) -> dict[str, Any]:
    told = {
        "user_id": "anna",
        "num_images": 3,
        "stranger": False,
        "history_digest": "digest",
        "made_with": "settings",
    }
    return {**told, **changes}


def last(**changes: Any) -> dict[str, Any]:
    told = {
        "num_items": 3,
        "num_failed": 0,
        "generation": 4,
        "prior": "prior",
        "planned_on": DATE - datetime.timedelta(days=1),
    }
    return {**row(), **told, **changes}


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        (row(), None, (PLAN, 0)),
        (row(), last(), (CARRY, 4)),
        (row(history_digest="rated something"), last(), (PLAN, 4)),
        (row(num_images=4), last(), (PLAN, 4)),
        (row(made_with="another decoder, or another prompt"), last(), (PLAN, 4)),
        (row(stranger=True), last(), (PLAN, 4)),
        (row(), last(num_failed=1, num_items=2), (PLAN, 4)),
        (row(), last(num_items=2), (CARRY, 4)),  # one was not fit to be shown
        (row(), last(num_items=0), (PLAN, 5)),  # none was: other ones are drawn
    ],
)
def test_a_user_is_drawn_for_a_reason(
    now: dict[str, Any], before: dict[str, Any] | None, expected: tuple[str, int]
) -> None:
    assert decide(now, before, tonight()) == expected


@pytest.mark.parametrize(("policy", "expected"), [("keep", CARRY), ("rescore", RESCORE), ("replace", PLAN)])
def test_what_a_new_prior_changes_is_a_policy(policy: str, expected: str) -> None:
    refresh = RefreshSettings.model_validate({"on_new_prior": policy})
    assert decide(row(), last(prior="older"), tonight(refresh=refresh)) == (expected, 4)
    assert decide(row(), last(), tonight(refresh=refresh)) == (CARRY, 4)
    if policy == "rescore":  # a prior without a selector judges nothing
        assert decide(row(), last(prior="older"), tonight(refresh=refresh, can_rescore=False)) == (CARRY, 4)


def test_rotation_takes_each_user_in_turn_and_a_missed_night_puts_it_off() -> None:
    users = [f"user-{number}" for number in range(2000)]
    dates = [DATE + datetime.timedelta(days=days) for days in range(21)]
    turns = np.array([[turn(user, date, 0.05) for date in dates] for user in users])
    assert (np.diff(turns, axis=1).sum(1) == 1).all()  # once in twenty nights
    share = np.diff(turns, axis=1).mean(0)
    assert share.min() > 0.03
    assert share.max() < 0.07
    rotating = tonight(refresh=RefreshSettings(rotation=0.05), date=dates[-1])
    assert all(decide(row(user_id=user), last(planned_on=dates[0]), rotating) == (PLAN, 5) for user in users)
    assert turn("anna", dates[0], 0.0) == turn("anna", dates[-1], 0.0)


@given(
    users=st.lists(
        st.tuples(st.sampled_from([0.0, 1.0, -2.5]), st.integers(0, 3), st.integers(1, 5)), max_size=40
    ),
    items_per_shard=st.integers(1, 30),
)
def test_units_hold_the_most_urgent_first_and_no_more_than_they_may(
    users: list[tuple[float, int, int]], items_per_shard: int
) -> None:
    rows = [
        {"user_id": f"user-{number}", "priority": priority, "activity": activity}
        for number, (priority, activity, _) in enumerate(users)
    ]
    keys, sizes = [draw_key(one, True) for one in rows], [size for _, _, size in users]
    boundaries = cut(
        np.array([(*key, size) for key, size in zip(keys, sizes, strict=True)]).reshape(-1, 4),
        items_per_shard,
    )
    decisions = Decisions(
        pool=None,
        by_urgency=True,
        boundaries=boundaries,
        planned_users=len(rows),
        planned_items=sum(sizes),
        units=len(boundaries) + 1,
    )
    units = [decisions.unit_of(one) for one in rows]
    order = sorted(range(len(rows)), key=lambda place: (-rows[place]["priority"], -rows[place]["activity"]))
    urgency = [(-rows[place]["priority"], -rows[place]["activity"]) for place in range(len(rows))]
    assert all(
        units[one] <= units[other] for one in order for other in order if urgency[one] < urgency[other]
    )
    for unit in set(units):
        assert (
            sum(size for size, own in zip(sizes, units, strict=True) if own == unit)
            <= items_per_shard + max(sizes) - 1
        )
    assert sorted(set(units)) == list(range(len(set(units))))
