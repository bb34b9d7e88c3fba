"""A real Prometheus that scrapes Ray's nodes and Triton."""

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.seaweedfs import free_port

BINARY = shutil.which("prometheus")


class Prometheus:
    """The address of a server, and its answers."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of an instant query."""
        address = f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with urllib.request.urlopen(address, timeout=10) as reply:
            result: list[dict[str, Any]] = json.load(reply)["data"]["result"]
        return result


@contextmanager
def prometheus(folder: Path, ray_folder: str, triton_metrics: int) -> Iterator[Prometheus]:
    """Run Prometheus on 127.0.0.1 until the end of the block; Ray writes the file of its addresses."""
    assert BINARY, "prometheus is not installed: apt-get install prometheus"
    jobs = [
        {
            "job_name": "ray",
            "file_sd_configs": [
                {"files": [f"{ray_folder}/prom_metrics_service_discovery.json"], "refresh_interval": "5s"}
            ],
        },
        {"job_name": "triton", "static_configs": [{"targets": [f"127.0.0.1:{triton_metrics}"]}]},
    ]
    settings = {"global": {"scrape_interval": "2s"}, "scrape_configs": jobs}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings))
    port = free_port()
    options = [
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen([BINARY, *options], stdout=log, stderr=log)
    try:
        server = Prometheus(port)
        while True:
            try:
                server.query("up")
                break
            except OSError:
                assert process.poll() is None, (folder / "prometheus.log").read_text()[-2000:]
                time.sleep(0.2)
        yield server
    finally:
        process.kill()
        process.wait()
