"""A proxy on 127.0.0.1 in front of a real S3 server. It injects faults by plan."""

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import pytest
from s3fs import S3FileSystem

Fault = Literal["", "slow down", "error", "lost", "cut", "late", "gone"]
FAULTS: tuple[Fault, ...] = ("slow down", "error", "lost", "cut", "late", "gone")
LATE = 0.1  # seconds
CODES = {"slow down": (503, "SlowDown"), "error": (500, "InternalError"), "lost": (500, "InternalError")}


def seeded(seed: int, share: float) -> Iterator[Fault]:
    """Yield an endless plan: a `share` of the requests fails, at most three of them in a row."""
    generator = random.Random(seed)
    consecutive = 0
    while True:
        consecutive = consecutive + 1 if consecutive < 3 and generator.random() < share else 0
        yield generator.choice(FAULTS) if consecutive else ""


class Request(NamedTuple):
    """A request, and the fault that it met."""

    method: str
    path: str
    fault: Fault


class FaultyS3(ThreadingHTTPServer):
    """Forward requests to `endpoint`, with one fault of the plan per request. After the plan there are none.

    slow down, error: the proxy answers 503 or 500, and the server never gets the request.
    lost: the server handles the request, and the proxy answers 500.
    cut: the server handles the request, and its answer ends in the middle.
    late: the answer is delayed. gone: the proxy closes the connection without an answer.
    """

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.server = str(urlsplit(endpoint).netloc)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.Lock()
        self.misbehave([])

    def misbehave(self, plan: Iterable[Fault], only: str = "") -> None:
        """Start a new plan and forget earlier requests. Only a `METHOD /path` with `only` in it fails."""
        with self.lock:
            self.plan, self.only = iter(plan), only
            self.requests: list[Request] = []

    def next_fault(self, method: str, path: str) -> Fault:
        with self.lock:
            fault = next(self.plan, "") if self.only in f"{method} {path}" else ""
            self.requests.append(Request(method, path, fault))
            return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore the error of a client that closed its connection."""


class Handler(BaseHTTPRequestHandler):
    """Handle one connection. The faults cut and gone close it."""

    protocol_version = "HTTP/1.1"
    server: FaultyS3

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.next_fault(self.command, self.path)
        if fault == "gone":
            self.close_connection = True
            return
        if fault in ("slow down", "error"):
            self.refuse(fault)
            return
        server = HTTPConnection(self.server.server, timeout=30)
        try:
            # The signature covers the headers as the client sent them, and its Host names this proxy.
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    server.putheader(name, value)
            server.endheaders(body)
            answer = server.getresponse()
            body = answer.read()
        finally:
            server.close()
        if fault == "late":
            time.sleep(LATE)
        if fault == "lost":
            self.refuse(fault)
        else:
            self.answer(answer, body, cut=fault == "cut")

    def answer(self, answer: HTTPResponse, body: bytes, *, cut: bool) -> None:
        length = answer.headers["Content-Length"] if self.command == "HEAD" else str(len(body))
        lines = [f"HTTP/1.1 {answer.status} {answer.reason}"]
        lines += [
            f"{name}: {value}"
            for name, value in answer.headers.items()
            if name.lower() not in ("content-length", "transfer-encoding")
        ]
        head = "\r\n".join([*lines, f"Content-Length: {length or 0}", "", ""]).encode()
        if not cut:
            self.wfile.write(head + body)
            return
        self.wfile.write(head + body[: len(body) // 2] if body else head[: len(head) // 2])
        self.close_connection = True

    def refuse(self, fault: str) -> None:
        status, code = CODES[fault]
        body = (
            b""
            if self.command == "HEAD"
            else f"<Error><Code>{code}</Code><Message>{code}, by plan</Message></Error>".encode()
        )
        headers = f"Content-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        self.wfile.write(f"HTTP/1.1 {status} {code}\r\n{headers}".encode() + body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on

    def log_message(self, format: str, *values: object) -> None:
        """Log nothing: the tests read `requests`."""


@contextmanager
def faulty_s3(endpoint: str) -> Iterator[FaultyS3]:
    """Run the proxy. It injects no fault before the first `misbehave`."""
    with FaultyS3(endpoint) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


@contextmanager
def impatient_proxy(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """Put a faulty proxy before an S3 server. botocore retries without a delay."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(S3FileSystem, "_cache", {})
    at_once = asyncio.sleep
    monkeypatch.setattr("aiobotocore.endpoint.asyncio", SimpleNamespace(sleep=lambda seconds: at_once(0)))
    with faulty_s3(server["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def proxy(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """Yield a faulty proxy before the S3 server."""
    with impatient_proxy(s3_server, monkeypatch) as proxy:
        yield proxy


def forever(fault: Fault) -> Iterator[Fault]:
    """Return the plan of a permanent outage."""
    return itertools.repeat(fault)
