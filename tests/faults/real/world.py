"""The world of the real campaign: an S3 server behind a proxy, a Ray cluster, Triton, and two nights.

All of it is kept between cases. A case gets a copy of the catalog after the first night.
"""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pyarrow.compute as pc
import s3fs

from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.config.decoder import DecoderSettings, TritonSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import LayoutSettings, LimitSettings
from rebeca_ray.decoder.triton_server import triton_server
from rebeca_ray.generation import render
from rebeca_ray.generation.pipeline import generate_catalog
from tests.conftest import NO_GATE, USERS, D, generate_config
from tests.faults.real.checks import fingerprint
from tests.faulty_s3 import faulty_s3
from tests.generation.light_render import PlainDecoder
from tests.generation.test_nights import change_digest, request_for
from tests.seaweedfs import free_port, server_command, start_server
from tests.tiny_decoder import write_tiny_decoder

IMAGES_PER_FILE = 4
NODE = {"num_cpus": 2, "object_store_memory": 100 * 2**20, "node_ip_address": "127.0.0.1"}
DISK_BYTES = 16 * 2**20


class World:
    """Servers, cluster and inputs of the campaign; see `real_world`."""

    def __init__(self, folder: Path, stack: ExitStack, num_buckets: int) -> None:
        self.folder, self.stack, self.num_buckets = folder, stack, num_buckets
        self.orders = folder / "decoder"  # beside the model, where the render actors read their orders
        (folder / "s3").mkdir()
        self.command, self.environment = server_command(folder / "s3")
        self.start_s3()
        os.environ.update(self.environment)
        self.direct = s3fs.S3FileSystem(
            key=self.environment["AWS_ACCESS_KEY_ID"],
            secret=self.environment["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            use_listings_cache=False,
        )
        self.proxy = stack.enter_context(faulty_s3(self.environment["AWS_ENDPOINT_URL"]))
        (folder / "decoder").mkdir()
        self.first_night, self.tonight = self.nights(write_tiny_decoder(folder / "decoder", D))
        self.nodes: list[Any] = []

    def start_s3(self) -> None:
        self.s3 = start_server(self.command, self.environment, self.folder / "s3")

    def stop_s3(self) -> None:
        self.s3.kill()
        self.s3.wait()

    def nights(self, decoder: DecoderSettings) -> tuple[GenerateConfig, GenerateConfig]:
        """Publish the first night; return the configs of both. Tonight has new, changed and absent users."""
        config = generate_config(self.folder, decoder).model_copy(
            update={
                "gate": NO_GATE,
                "num_images": 8,
                "layout": LayoutSettings(num_buckets=self.num_buckets, images_per_file=IMAGES_PER_FILE),
                "limits": LimitSettings(lease_seconds=4, stall_minutes=2),
            }
        )
        first = request_for(config, USERS[:4])
        with patch.object(render, "build_decoder", lambda _: PlainDecoder()):
            generate_catalog(
                first.model_copy(update={"catalog": str(self.folder / "first")}), in_process=True
            )
        change_digest(config, USERS[0])
        change_digest(config, USERS[1])
        return first, request_for(config, [*USERS[:3], *USERS[4:]], 1)

    @cached_property
    def expected(self) -> str:
        """The hash of the undisturbed run, in this process."""
        with patch.object(render, "build_decoder", lambda _: PlainDecoder()):
            return self.undisturbed(self.tonight)

    @cached_property
    def expected_of_triton(self) -> str:
        """The same hash with the images of the tiny decoder."""
        return self.undisturbed(self.tonight)

    def undisturbed(self, config: GenerateConfig) -> str:
        root = self.folder / f"expected-{time.monotonic_ns()}"
        copy_tree(self.folder / "first", root)
        generate_catalog(config.model_copy(update={"catalog": str(root)}), in_process=True)
        self.new_items = (
            read_catalog(str(root)).items().filter(pc.field("origin") == "new")["item_id"].to_pylist()
        )
        return fingerprint(read_catalog(str(root)))

    def prepare(self, name: str, *, on_disk: bool = False) -> str:
        """Copy the catalog of the first night for a case; return its root."""
        for order in ("stalled", "poison", "seconds"):
            (self.orders / order).unlink(missing_ok=True)
        for drawn in self.orders.glob("drawn-*"):
            drawn.unlink()
        (self.orders / "seconds").write_text("0.3")
        if on_disk:
            root = self.disk / name
            copy_tree(self.folder / "first", root)
            return str(root)
        for path in (self.folder / "first").rglob("*"):
            if path.is_file():
                key = path.relative_to(self.folder / "first")
                self.direct.pipe_file(f"rebeca/{name}/{key}", path.read_bytes())
        return f"s3://rebeca/{name}"

    @cached_property
    def disk(self) -> Path:
        """A small disk of its own, which can be filled."""
        disk = self.folder / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", disk], check=True)
        self.stack.callback(subprocess.run, ["umount", "-l", disk], check=False)
        return disk

    @cached_property
    def cluster(self) -> Any:
        """A head without CPUs and one node with two. The driver joins the head."""
        from ray.cluster_utils import Cluster

        # Its dashboard's usual port may be that of another Ray on this machine.
        head = {**NODE, "num_cpus": 0, "include_dashboard": False, "dashboard_port": None}
        cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        self.stack.callback(cluster.shutdown)
        self.nodes.append(patiently(lambda: cluster.add_node(**NODE, resources={"decoder_slot": 1})))
        return cluster

    def add_node(self) -> None:
        self.nodes.append(patiently(lambda: self.cluster.add_node(**NODE, resources={"decoder_slot": 1})))

    def remove_node(self, *, kill: bool) -> None:
        """Remove the oldest node, in order or by a kill of its raylet."""
        node = self.nodes.pop(0)
        if kill:
            os.kill(raylet(node), signal.SIGKILL)
        self.cluster.remove_node(node, allow_graceful=not kill)

    def settle(self) -> None:
        """Bring the cluster back to one node, and the servers back to work."""
        self.proxy.misbehave([])
        if self.s3.poll() is not None:
            self.start_s3()
        for node in [node for node in self.nodes if not psutil.pid_exists(raylet(node))]:
            self.nodes.remove(node)  # it died with one of its parts
            self.cluster.remove_node(node, allow_graceful=False)
        if not self.nodes:
            self.add_node()
        while len(self.nodes) > 1:
            self.remove_node(kill=False)

    def workers(self, *names: str) -> list[psutil.Process]:
        """Return workers with one of some names in their titles. Agents are none: they end their node."""
        workers = []
        for node in self.nodes:
            for process in psutil.Process(raylet(node)).children():
                try:
                    title = " ".join(process.cmdline())
                except psutil.NoSuchProcess:
                    continue
                is_worker = title.startswith("ray::") and "Agent" not in title
                if is_worker and any(name in title for name in names):
                    workers.append(process)
        return workers

    @cached_property
    def triton_settings(self) -> TritonSettings:
        return TritonSettings(url=f"127.0.0.1:{free_port()}", deadline_seconds=20, ready_seconds=90)

    def start_triton(self) -> None:
        """Start Triton with the tiny decoder at the address that the config names."""
        ports = {"http_port": free_port(), "metrics_port": free_port()}
        port = int(self.triton_settings.url.partition(":")[2])
        server = triton_server(self.tonight.decoder, **ports, grpc_port=port, instances=1)
        self.triton = self.stack.enter_context(server)

    def drawn(self) -> list[str]:
        """Return the items that render actors drew in this case, with repetitions."""
        return [item for file in self.orders.glob("drawn-*") for item in file.read_text().splitlines()]


def patiently(start: Callable[[], Any]) -> Any:
    """Start a part of Ray, again if a busy machine needs more than Ray's 30 s."""
    for _ in range(3):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return start()


def raylet(node: Any) -> int:
    process = node.all_processes["raylet"][0].process
    process.poll()  # a dead one is no zombie then
    return int(process.pid)


def copy_tree(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)


@contextmanager
def real_world(num_buckets: int = 2) -> Iterator[World]:
    """Start the S3 server and the proxy, and prepare the nights. The cluster and Triton start when needed."""
    from rebeca_ray.ray_runtime import RAY_ENVIRONMENT
    from rebeca_ray.ray_start import protect_token, stay_on_loopback

    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ))
        stack.enter_context(patch.object(s3fs.S3FileSystem, "_cache", {}))  # of clients of other servers
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rf", dir="/tmp"))
        (Path(folder) / "ray").mkdir()
        os.environ.update(RAY_ENVIRONMENT | {"RAY_TMPDIR": f"{folder}/ray"})
        os.environ["PYTHONPATH"] = (
            f"{Path(__file__).parents[3]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        )
        protect_token()
        stay_on_loopback(True)
        world = World(Path(folder), stack, num_buckets)
        try:
            yield world
        finally:
            world.stop_s3()
