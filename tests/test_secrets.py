"""A night of commands with known secrets: they show up nowhere, and every server stays on loopback.

Ray, Triton, the gallery and an S3 store run as a person runs them. The secrets are in the environment.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import yaml

from rebeca_ray.config.decoder import DecoderSettings, TritonSettings
from tests.certificates import make_chain, signed_by
from tests.conftest import NO_GATE, generate_config
from tests.seaweedfs import free_port

COMMAND = (sys.executable, "-m", "rebeca_ray.cli.commands")
BUCKET = "rebeca/secrets"
PORTS = {"--http-port": free_port(), "--grpc-port": free_port(), "--metrics-port": free_port()}


class Watch:
    """The command lines and the listening sockets of the processes below this one, as long as it runs."""

    def __init__(self) -> None:
        self.lines = set[str]()
        self.listening = dict[int, str]()
        self.metrics = ""
        self.ended = threading.Event()

    def look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                self.lines.add(" ".join(process.cmdline()))
                for socket in process.net_connections("inet"):
                    if socket.status == psutil.CONN_LISTEN and socket.laddr.port not in self.listening:
                        self.listening[socket.laddr.port] = socket.laddr.ip
                        self.metrics += metrics_at(socket.laddr.port)

    @contextmanager
    def during(self) -> Iterator[None]:
        def run() -> None:
            while not self.ended.wait(0.3):
                self.look()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            self.ended.set()
            thread.join()


def metrics_at(port: int) -> str:
    """Return the metrics of a server, or what it answers instead."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1) as answer:
            return str(answer.read(10**7), errors="replace")
    except Exception as error:  # of a server that has none, in words of its own
        return str(error)


@contextmanager
def server(log: Path, environment: dict[str, str], ready: str, *arguments: str) -> Iterator[None]:
    """Run a command that serves until it is stopped; enter once its log holds a text."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            for _ in range(2400):
                if ready in log.read_text():
                    break
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            assert ready in log.read_text(), log.read_text()
            yield
        finally:
            process.terminate()
            process.wait(30)


def texts_below(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_file():
                yield str(path), path.read_bytes()


def texts_of_catalog(filesystem: s3fs.S3FileSystem) -> Iterator[tuple[str, bytes]]:
    """Yield every object as it is; of Parquet also the footer's metadata and all rows."""
    for path in filesystem.find(BUCKET):
        data = filesystem.cat_file(path)
        yield path, data
        if path.endswith(".parquet"):
            table = pq.read_table(pa.BufferReader(data))
            yield path, repr([table.schema.metadata, table.to_pylist()]).encode()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="rs", dir="/tmp") as folder:
        yield Path(folder)


def test_a_night_shows_no_secret_and_listens_on_loopback_alone(
    tmp_path: Path, short_folder: Path, s3_server: dict[str, str], tiny_decoder: DecoderSettings
) -> None:
    pytest.importorskip("c2pa")
    chain = make_chain()
    (tmp_path / "home" / ".ray").mkdir(parents=True)
    secrets = {name: token_hex(32) for name in ("REBECA_ERASURE_KEY", "REBECA_GALLERY_TOKEN")}
    secrets |= {"AWS_SECRET_ACCESS_KEY": s3_server["AWS_SECRET_ACCESS_KEY"], "SIGNING_KEY": chain.key}
    ray_token = token_hex(32)
    (tmp_path / "home" / ".ray" / "auth_token").write_text(ray_token)
    needles = {name: value.strip().splitlines()[1 if "\n" in value else 0] for name, value in secrets.items()}
    needles["Ray's token"] = ray_token
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    environment |= s3_server | secrets | {"HOME": str(tmp_path / "home"), "RAY_TMPDIR": str(short_folder)}
    environment["RAY_ADDRESS"] = "local"

    signed = signed_by(tiny_decoder, tmp_path, chain)
    section = signed.c2pa.model_copy(update={"key": "env:SIGNING_KEY"})
    triton = TritonSettings(url=f"127.0.0.1:{PORTS['--grpc-port']}", deadline_seconds=60, ready_seconds=60)
    decoder = signed.model_copy(update={"c2pa": section, "backend": "triton", "triton": triton})
    catalog, path = f"s3://{BUCKET}", str(tmp_path / "night.yaml")
    config = generate_config(tmp_path, decoder).model_copy(update={"catalog": catalog, "gate": NO_GATE})
    Path(path).write_text(yaml.safe_dump(config.model_dump(mode="json")))

    watch, logs = Watch(), tmp_path / "logs"
    logs.mkdir()
    ports = [text for name, port in PORTS.items() for text in (name, str(port))]
    with (
        watch.during(),
        server(logs / "triton", environment, "ready: grpc", "serve", "--config", path, *ports),
    ):
        with (logs / "generate").open("w") as output:
            night = subprocess.run(
                [*COMMAND, "--log-level", "debug", "generate", "--config", path],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        assert night.returncode == 0, (logs / "generate").read_text()
        with server(logs / "gallery", environment, "Ctrl-C", "gallery", catalog, "--bind", "127.0.0.1:0"):
            time.sleep(1)

    filesystem = s3fs.S3FileSystem(
        key=s3_server["AWS_ACCESS_KEY_ID"],
        secret=s3_server["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=s3_server["AWS_ENDPOINT_URL"],
    )
    latest = json.loads(filesystem.cat_file(f"{BUCKET}/latest.json"))
    texts = [*texts_below(logs), *texts_below(short_folder), *texts_of_catalog(filesystem)]
    texts += [("process list", "\n".join(watch.lines).encode()), ("metrics", watch.metrics.encode())]
    shown = [
        (name, where) for name, needle in needles.items() for where, text in texts if needle.encode() in text
    ]
    assert shown == []

    # The search sees what is no secret in each of these.
    seen = [where for where, text in texts if str(latest["run_id"]).encode() in text]
    assert any(where.endswith(".parquet") for where in seen)
    assert any(where.startswith(str(short_folder)) for where, _ in texts)
    assert path in "\n".join(watch.lines)
    assert "ray::" in "\n".join(watch.lines)
    assert "nv_inference_count" in watch.metrics
    assert set(PORTS.values()) <= set(watch.listening)
    assert {*watch.listening.values()} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
