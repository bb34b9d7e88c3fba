"""A handful of interleavings of each pair of commands that share a catalog."""

import pytest

from tests.faults.interleaving import PAIRS, interleave, serial_digests
from tests.faults.world import Lab

NAMES = ("two nights", "night, gc", "publish, gc", "rollback, night", "reader, gc")


@pytest.mark.parametrize("name", NAMES)
def test_two_commands_at_once_leave_what_one_after_the_other_leaves(lab: Lab, name: str) -> None:
    pair = next(pair for pair in PAIRS if pair.name == name)
    digests = serial_digests(lab, pair)
    made = [interleave(lab, pair, seed, digests) for seed in range(3)]
    assert [one for one in made if one.problems] == []
    assert any(one.handovers for one in made)


def test_a_seed_makes_the_same_interleaving_again(lab: Lab) -> None:
    digests = serial_digests(lab, PAIRS[0])
    first, again = (interleave(lab, PAIRS[0], 5, digests) for _ in range(2))
    assert first == again
