"""One night of the real campaign: its driver and its workers are killed, and replies of S3 are cut."""

from tests.faults.real.case import Case
from tests.faults.real.kinds import DRIVER_KILLED
from tests.faults.real.world import real_world

SEED = 20  # strikes before, in and after rendering


def test_a_night_under_real_faults_ends_as_an_undisturbed_one() -> None:
    with real_world(num_buckets=1) as world:  # few Ray tasks, each of which may wait for a worker to start
        case = Case(world, 0, SEED, ("worker killed", "S3 reply cut"), main=DRIVER_KILLED)
        records = case.run()
    assert {record.kind for record in records} == {DRIVER_KILLED, "worker killed", "S3 reply cut"}
    assert case.problems == []
    assert case.codes[0] == -9
    assert case.codes[-1] == 0
