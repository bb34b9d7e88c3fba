"""How the processes of a test run share the work: the longest files first, a Ray for each process."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator

import pytest

LONGEST = [  # the names of test files, longest first
    *("test_local_prod.py", "test_triton_client.py", "test_resume.py", "test_train.py", "test_weights.py"),
    *("test_faults.py", "test_tuning.py", "test_exports.py", "test_sdxl.py", "test_pipeline.py"),
    *(
        "test_campaign.py",
        "test_prometheus.py",
        "test_acceptance.py",
        "test_damage.py",
        "test_nodes.py",
    ),
    *("test_pages.py", "test_browser.py"),
    *("test_commands.py", "test_suspects.py", "test_ray_start.py", "test_readers.py", "test_lease.py"),
]


def pytest_configure(config: pytest.Config) -> None:
    """Give each test process a Ray of its own, and let it wait for no disk.

    With one folder, the first process starts a Ray and the others join it: they wait for each other's CPUs,
    and die with the process that started it.
    """
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short, for the sockets' paths
    os.environ["RAY_TMPDIR"] = folder
    os.fsync = lambda _: None  # a night in process has sixty, of milliseconds each
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that all test processes end at about the same time."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def ray_local(s3_server: dict[str, str]) -> Iterator[str]:
    """Start one local Ray for the whole test run; yield its address. Its workers reach the S3 server."""
    import ray

    from rebeca_ray.ray_runtime import start_ray

    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(s3_server)
    # Else its agent looks at all processes every five seconds, in a tenth of a core.
    os.environ["REPORTER_UPDATE_INTERVAL_MS"] = "60000"
    start_ray()
    del os.environ["REPORTER_UPDATE_INTERVAL_MS"]
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module", autouse=True)
def all_cpus_are_free_again(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the file of tests that leaves work on the one Ray, not a later one that waits for its CPUs."""
    yield
    tests = [item for item in request.session.items if item.path == request.node.path]
    if not any("ray_local" in getattr(item, "fixturenames", ()) for item in tests):
        return  # others have a Ray of their own, or none
    import ray

    if not ray.is_initialized():
        return
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources().get("CPU", 0):
        if time.monotonic() > deadline:
            from ray.util.state import list_actors, list_placement_groups

            gcs = ray.get_runtime_context().gcs_address  # another process has a Ray of its own
            alive = [actor for actor in list_actors(gcs, detail=True) if actor.state != "DEAD"]
            raise AssertionError(f"still on the one Ray: {alive} {list_placement_groups(gcs)}")
        time.sleep(0.2)
