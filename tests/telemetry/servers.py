"""Real servers: a Prometheus that scrapes every second, and a Triton with a tiny model."""

import json
import os
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from rebeca_ray.decoder.triton_server import find_server
from tests.seaweedfs import free_port

MODEL = """
import triton_python_backend_utils as backend

class TritonPythonModel:
    def execute(self, requests):
        inputs = [backend.get_input_tensor_by_name(request, "IN") for request in requests]
        return [
            backend.InferenceResponse([backend.Tensor.from_dlpack("OUT", tensor.to_dlpack())])
            for tensor in inputs
        ]
"""
CONFIG = """
name: "decoder"
backend: "python"
max_batch_size: 16
dynamic_batching { max_queue_delay_microseconds: 20000 }
input [ { name: "IN", data_type: TYPE_FP32, dims: [ 1 ] } ]
output [ { name: "OUT", data_type: TYPE_FP32, dims: [ 1 ] } ]
"""
Series = list[dict[str, Any]]


class Prometheus:
    """A running server. Its queries answer with series of labels and values."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/api/v1"
        self.since = time.time()

    def ask(self, path: str, **parameters: Any) -> Any:
        with urllib.request.urlopen(f"{self.url}/{path}?{urllib.parse.urlencode(parameters)}") as answer:
            return json.load(answer)["data"]

    def now(self, expression: str) -> Series:
        return list(self.ask("query", query=expression)["result"])

    def history(self, expression: str) -> Series:
        """Return the values since the start, second by second, up to the last scrape."""
        result = self.ask("query_range", query=expression, start=self.since, end=time.time() + 2, step="1s")[
            "result"
        ]
        return list(result)

    def wait_for(self, expression: str, seconds: float = 60) -> Series:
        end = time.monotonic() + seconds
        while not (series := self.now(expression)):
            assert time.monotonic() < end, f"no data: {expression}"
            time.sleep(0.2)
        return series


@contextmanager
def prometheus(
    folder: Path, ray_folder: Path, triton_port: int, rules: str, every: str = "1s"
) -> Iterator[Prometheus]:
    """Run a server that scrapes a Triton, and the Ray that keeps its sessions in `ray_folder`."""
    (folder / "rules.yaml").write_text(rules)
    discovery = f"{ray_folder}/prom_metrics_service_discovery.json"
    config = {
        "global": {"scrape_interval": every, "evaluation_interval": every},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [
            {
                "job_name": "ray",
                "file_sd_configs": [{"files": [discovery], "refresh_interval": "1s"}],
            },
            {"job_name": "triton", "static_configs": [{"targets": [f"127.0.0.1:{triton_port}"]}]},
        ],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    options = [f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    command = ["prometheus", *options, f"--web.listen-address=127.0.0.1:{port}"]
    with open(folder / "prometheus.log", "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/-/ready", process)
        yield Prometheus(port)
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def tiny_triton(folder: Path) -> Iterator[int]:
    """Run a server that is asked all the time; yield the port of its metrics."""
    version = folder / "models" / "decoder" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(MODEL)
    (version.parent / "config.pbtxt").write_text(CONFIG)
    binary, environment, options = find_server(folder)
    ports = {name: free_port() for name in ("http", "grpc", "metrics")}
    command = [binary, f"--model-repository={folder}/models", *options]
    command += [f"--{name}-port={port}" for name, port in ports.items()]
    command += [f"--{name}-address=127.0.0.1" for name in ports]
    with open(folder / "triton.log", "wb") as output:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output)
    done = threading.Event()
    try:
        wait_until_ready(f"http://127.0.0.1:{ports['http']}/v2/health/ready", process)
        url = f"http://127.0.0.1:{ports['http']}/v2/models/decoder/infer"
        threads = [threading.Thread(target=infer, args=(url, done)) for _ in range(2)]
        for thread in threads:
            thread.start()
        yield ports["metrics"]
        done.set()
        for thread in threads:
            thread.join()
    finally:
        done.set()
        process.terminate()
        process.wait(30)


def infer(url: str, done: threading.Event) -> None:
    tensor = {"name": "IN", "shape": [2, 1], "datatype": "FP32", "data": [1.0, 2.0]}
    body = json.dumps({"inputs": [tensor]}).encode()
    while not done.wait(0.3):
        with urllib.request.urlopen(urllib.request.Request(url, body)) as answer:
            assert json.load(answer)["outputs"][0]["data"] == [1.0, 2.0]


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    while True:
        assert process.poll() is None, f"{process.args} ended"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
