"""A Ray cluster with Ray's autoscaler: it adds a node to this machine when work waits for its resources."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)

from rebeca_ray.ray_start import listens
from tests.seaweedfs import free_port

TOKEN = {"RAY_AUTH_MODE": "token"}  # of `ray start` and of its drivers
COMMANDS = ("setup_commands", "head_setup_commands", "worker_setup_commands")
START_SECONDS = 180  # of a head, on a busy machine
MEMORY = 100 * 2**20  # bytes of a node's object store


class AutoscalingCluster:
    """A head without decoder slots; see `autoscaling_cluster`."""

    def __init__(self, address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.address, self.process, self.log = address, process, log

    def wait_until_it_answers(self) -> None:
        until = time.monotonic() + START_SECONDS
        while not listens(self.address):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.2)

    def added_nodes(self) -> list[psutil.Process]:
        """Return the raylets of the nodes that the autoscaler has added and that are alive, oldest first."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        monitors = [process for process in processes if "monitor.py" in command_of(process)]
        nodes = [child for monitor in monitors for child in monitor.children()]
        return [node for node in nodes if "raylet" in node.name() and node.status() != psutil.STATUS_ZOMBIE]

    def stop(self) -> None:
        # On SIGTERM it would wait half a minute for its processes.
        for started in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            with suppress(psutil.NoSuchProcess):
                started.send_signal(signal.SIGKILL)
        self.process.wait(60)


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@contextmanager
def autoscaling_cluster(
    folder: Path, head: dict[str, float], worker: dict[str, float], max_workers: int
) -> Iterator[AutoscalingCluster]:
    """Start a head; the autoscaler adds up to `max_workers` nodes of one kind while work waits for them.

    `ray.cluster_utils.AutoscalingCluster` would stop every other Ray of this machine first.
    """
    port = free_port()
    config = {
        "cluster_name": "nodes",
        "provider": {
            "type": "external",  # Ray's wheel lacks the defaults of `fake_multinode`
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__qualname__}",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": head, "node_config": {}},
            "worker": {"resources": {**worker, "object_store_memory": MEMORY}, "node_config": {}},
        },
        "max_workers": max_workers,
        **{name: [] for name in ("cluster_synced_files", *COMMANDS)},
        **{name: {} for name in ("docker", "file_mounts")},
    }
    (folder / "autoscaler.json").write_text(json.dumps(config))
    environment = TOKEN | {
        **{name: value for name, value in os.environ.items() if name != "RAY_OVERRIDE_RESOURCES"},
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    with (folder / "ray-start.log").open("wb") as output:
        process = subprocess.Popen(
            [
                Path(sys.executable).parent / "ray",
                "start",
                "--head",
                "--block",
                "--node-ip-address=127.0.0.1",
                f"--port={port}",
                f"--dashboard-port={free_port()}",
                f"--ray-client-server-port={free_port()}",
                "--include-dashboard=false",
                f"--num-cpus={head['CPU']:g}",
                f"--object-store-memory={MEMORY}",
                f"--autoscaling-config={folder / 'autoscaler.json'}",
            ],
            env=environment,
            stdout=output,
            stderr=output,
        )
    cluster = AutoscalingCluster(f"127.0.0.1:{port}", process, folder / "ray-start.log")
    try:
        cluster.wait_until_it_answers()
        with patch.dict(os.environ, TOKEN):
            yield cluster
    finally:
        cluster.stop()
