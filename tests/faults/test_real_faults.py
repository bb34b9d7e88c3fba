"""A handful of the real campaign's cases: real processes, a real S3 server, a cluster kept between them."""

from collections.abc import Iterator

import pytest

from tests.faults.real_campaign import Case
from tests.faults.real_kinds import DRIVER_KILLED
from tests.faults.real_world import World, real_world


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch, real_world() as world:
        patch.setenv("RAY_ADDRESS", "")
        yield world


@pytest.mark.parametrize("main", [DRIVER_KILLED, "raylet killed"])
def test_a_night_under_faults_ends_as_an_undisturbed_one(world: World, main: str) -> None:
    case = Case(world, 0, 0, ("S3 reply cut", "S3 503 slow down"), main=main)
    records = case.run()
    assert main in [record.kind for record in records]
    assert case.problems == []
    assert case.codes[-1] == 0
