"""A handful of seeded faults of each family: nothing is lost, doubled, half seen, stuck or left."""

import random

import pytest

from tests.faults.campaign import Campaign, summary
from tests.faults.decoder import POISON, STALLED
from tests.faults.disk import KINDS

SEED = 7


def check(campaign: Campaign, family: str, number: int) -> None:
    """Run some faults of a family; most of them must happen."""
    generator = random.Random(SEED)
    trials = []
    for _ in range(number):
        made = campaign.fault(family, generator)
        assert made
        trials.append(campaign.run(*made))
    assert [trial for trial in trials if trial.problems] == []
    assert sum(trial.happened for trial in trials) > number / 2


def test_no_failure_of_a_disk_and_no_kill_loses_doubles_or_shows_anything(campaign: Campaign) -> None:
    faults = [*campaign.disk_faults()]
    trials = [campaign.run(*fault) for fault in random.Random(SEED).sample(faults, 10)]
    assert [trial for trial in trials if trial.problems] == []
    figures = summary(trials)
    assert figures["faults"] == 10
    assert {*figures["by_kind"]} <= {*KINDS}
    assert {*figures["exit_codes"]} == {"-9", "0", "75"}


@pytest.mark.parametrize(("family", "number"), [("damage", 6), ("rival", 6), (POISON, 1), (STALLED, 1)])
def test_no_fault_of_a_family_loses_doubles_or_shows_anything(
    campaign: Campaign, family: str, number: int
) -> None:
    check(campaign, family, number)


def test_no_outage_of_a_store_loses_doubles_or_shows_anything(remote_campaign: Campaign) -> None:
    check(remote_campaign, "S3", 3)
