"""A Ray cluster of a head and a worker, each a `ray start` with a token, and submitters of its jobs."""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.seaweedfs import free_port

BIN, REPO = Path(sys.executable).parent, Path(__file__).parents[2]
START_SECONDS, JOB_SECONDS = 120, 400
# A submitter has no torch and no rebeca_ray: their imports fail, whatever this environment holds.
THIN_CLIENT = """
import site, sys
site.main()
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in (
            "rebeca_ray", "torch", "diffusers", "transformers", "pyarrow", "pandas", "s3fs", "open_clip"
        ):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from ray.scripts.scripts import main
main()
"""


@dataclass(frozen=True)
class Ended:
    """A job that ended: the exit code of its entrypoint, -1 if it has none, and its log."""

    code: int
    log: str


@dataclass
class Submission:
    """A running `ray job submit`, which ends with its job."""

    process: "subprocess.Popen[str]"

    def end(self) -> Ended:
        log, _ = self.process.communicate(timeout=JOB_SECONDS)
        if self.process.returncode == 0:
            return Ended(0, log)
        failed = re.search(r"entrypoint command failed with exit code (-?\d+)", log)
        return Ended(int(failed[1]) if failed else -1, log)


@dataclass
class Cluster:
    """The head's ports and environment, and the processes of both nodes."""

    folder: str
    port: int
    environment: dict[str, str]
    processes: "dict[str, subprocess.Popen[bytes]]" = field(default_factory=dict)

    def start(self, name: str, *options: str) -> None:
        """Run `ray start` with some options, in the foreground of a process of its own."""
        ports = [
            f"--{option}={free_port()}" for option in ("dashboard-agent-listen-port", "metrics-export-port")
        ]
        self.processes[name] = subprocess.Popen(
            [BIN / "ray", "start", "--block", "--node-ip-address=127.0.0.1", *ports, *options],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def start_head(self, dashboard: int) -> None:
        self.start(
            "head",
            "--head",
            f"--port={self.port}",
            f"--temp-dir={self.folder}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={free_port()}",
            "--num-cpus=0",
            "--disable-usage-stats",
        )

    def start_worker(self) -> None:
        folder = f"{self.folder}-worker"  # two nodes in one folder would remove files of each other
        self.start(
            "worker",
            f"--address=127.0.0.1:{self.port}",
            f"--temp-dir={folder}",
            "--num-cpus=2",
            '--resources={"decoder_slot": 1}',
        )

    def pids(self) -> set[int]:
        """Return the ids of all processes of the nodes, those of jobs among them."""
        pids = set[int]()
        for process in list(self.processes.values()):
            with suppress(psutil.NoSuchProcess):
                pids |= {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        return pids | {process.pid for process in self.processes.values()}

    def kill_node(self, name: str) -> None:
        """Kill a node with all its processes, as a lost machine."""
        process = self.processes.pop(name)
        # On SIGTERM it would wait half a minute for its processes.
        for started in [process, *psutil.Process(process.pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                started.kill()
        process.wait(60)

    def kill_driver(self, job: str) -> None:
        """Kill the process that runs a job's script."""
        for process in psutil.Process(self.processes["head"].pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if any(part.endswith(job) for part in process.cmdline()) and "python" in process.name():
                    process.kill()

    def wait_for_dashboard(self) -> None:
        """Wait until it lists jobs, as it does before it takes one."""
        token = Path(self.environment["HOME"], ".ray", "auth_token").read_text().strip()
        address = f"{self.environment['RAY_API_SERVER_ADDRESS']}/api/jobs/"
        listing = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(listing, timeout=10):
                    return
            except OSError:
                assert time.monotonic() < until, "no dashboard"
                time.sleep(0.2)

    def submit(self, *entrypoint: str, environment: dict[str, str] | None = None) -> Submission:
        """Submit a job from a Python that can import nothing but `ray[default]` and its dependencies."""
        command = [sys.executable, "-S", "-c", THIN_CLIENT, "job", "submit", "--working-dir", "."]
        process = subprocess.Popen(
            [*command, "--", *entrypoint],
            cwd=REPO,
            env=environment or self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return Submission(process)


@contextmanager
def cluster(home: Path, more: dict[str, str]) -> Iterator[Cluster]:
    """Start a head without CPUs and a worker with two, both with a new token. Stop them at the end."""
    port, dashboard = free_port(), free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= more | {
        "RAY_worker_niceness": "0",
        "REPORTER_UPDATE_INTERVAL_MS": "20000",  # by default each node's agent takes a tenth of a core
        "RAY_AUTH_MODE": "token",
        "HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep),
    }
    generate = [BIN / "ray", "get-auth-token", "--generate"]
    subprocess.run(generate, env=environment, check=True, capture_output=True)
    (home / ".ray" / "auth_token").chmod(0o600)
    nodes = Cluster(f"/tmp/rebeca-{port}", port, environment)
    environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    try:
        nodes.start_head(dashboard)
        nodes.wait_for_dashboard()
        nodes.start_worker()
        yield nodes
    finally:
        for name in list(nodes.processes):
            nodes.kill_node(name)
        for folder in (nodes.folder, f"{nodes.folder}-worker"):
            shutil.rmtree(folder, ignore_errors=True)
