"""One of the real campaign's cases: real processes, a real S3 server, a cluster that loses a node."""

from collections.abc import Iterator

import pytest

from tests.faults.real_campaign import Case
from tests.faults.real_world import World, real_world


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch, real_world() as world:
        patch.setenv("RAY_ADDRESS", "")
        yield world


def test_a_night_under_faults_ends_as_an_undisturbed_one(world: World) -> None:
    case = Case(world, 0, 0, ("S3 reply cut", "S3 503 slow down"), main="raylet killed")
    records = case.run()
    assert "raylet killed" in [record.kind for record in records]
    assert case.problems == []
    assert case.codes[-1] == 0
