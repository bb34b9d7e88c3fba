"""Secrets that the tests know: none shows up in a log, a file, a metric, or a list of processes.

Meanwhile every server but Ray's, whose nodes other machines may join, listens on loopback alone.
"""

import threading
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from tests.certificates import make_chain
from tests.ops.cluster import Cluster

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
SECONDS_BETWEEN_LOOKS = 4


class Canaries:
    """The secrets of a production, by name, and the environment variables that hold them."""

    def __init__(self, folder: Path) -> None:
        chain = make_chain()
        self.certificate = folder / "chain.pem"
        self.certificate.write_text(chain.certificate)
        self.environment = {
            "REBECA_ERASURE_KEY": token_hex(32),
            "REBECA_GALLERY_TOKEN": token_hex(32),
            "SIGNING_KEY": chain.key,
        }
        # Of the key's PEM text, one line of its middle.
        self.needles = self.environment | {"SIGNING_KEY": chain.key.splitlines()[1]}

    def overrides(self) -> list[str]:
        """Return the overrides by which the nights sign their images."""
        return [
            "generate.decoder.provenance=c2pa",
            f"generate.decoder.c2pa.certificate={self.certificate}",
            "generate.decoder.c2pa.key=env:SIGNING_KEY",
        ]

    def shown_in(self, texts: list[tuple[str, bytes]]) -> list[tuple[str, str]]:
        """Return the name of each secret with each place that shows it."""
        return [
            (name, where)
            for name, needle in self.needles.items()
            for where, text in texts
            if needle.encode() in text
        ]


class Watch:
    """The command lines of all processes below this one, and the listening sockets of those beside Ray's."""

    def __init__(self, nodes: Cluster) -> None:
        self.nodes = nodes
        self.lines = set[str]()
        self.listening = dict[int, str]()
        self.metrics = ""
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self) -> None:
        while not self.ended.wait(SECONDS_BETWEEN_LOOKS):
            self.look()

    def look(self) -> None:
        of_ray = self.nodes.pids()
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                self.lines.add(" ".join(process.cmdline()))
                if process.pid in of_ray:
                    continue
                for socket in process.net_connections("inet"):
                    if socket.status == psutil.CONN_LISTEN:
                        self.listening.setdefault(socket.laddr.port, socket.laddr.ip)

    def stop(self) -> None:
        """Look a last time, and read the metrics of every server that still listens."""
        self.ended.set()
        self.thread.join(60)
        self.look()
        self.metrics = "".join(metrics_at(port) for port in self.listening)


def metrics_at(port: int) -> str:
    """Return the metrics of a server, or what it answers instead."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1) as answer:
            return str(answer.read(10**7), errors="replace")
    except Exception as error:  # of a server that has none, in words of its own
        return str(error)


def texts_below(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_file():
                yield str(path), path.read_bytes()


def texts_of_store(store: Any, paths: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield every object as it is; of Parquet also the footer's metadata and all rows."""
    for path in paths:
        data = store.cat_file(path)
        yield path, data
        if path.endswith(".parquet"):
            table = pq.read_table(pa.BufferReader(data))
            yield path, repr([table.schema.metadata, table.to_pylist()]).encode()
