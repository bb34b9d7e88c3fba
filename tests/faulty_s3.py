"""An S3 server that misbehaves by plan: a proxy on 127.0.0.1 before the real one."""

import itertools
import random
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

Fault = Literal["", "slow down", "error", "lost", "cut", "late", "gone"]
FAULTS: tuple[Fault, ...] = ("slow down", "error", "lost", "cut", "late", "gone")
LATE = 0.1  # seconds
CODES = {"slow down": (503, "SlowDown"), "error": (500, "InternalError"), "lost": (500, "InternalError")}


def seeded(seed: int, share: float) -> Iterator[Fault]:
    """An endless plan in which `share` of the requests fail, never more than three in a row."""
    chosen = random.Random(seed)
    row = 0
    while True:
        row = row + 1 if row < 3 and chosen.random() < share else 0
        yield chosen.choice(FAULTS) if row else ""


class Request(NamedTuple):
    """A request as it came in, and what was done to it."""

    method: str
    path: str
    fault: Fault


class FaultyS3(ThreadingHTTPServer):
    """Passes requests on to `endpoint`, but for what `plan` does to them, one fault a request; after the plan's end, none.

    slow down, error: an answer 503 or 500 in place of the server's, which hears nothing. lost: the server did it, but the answer is 500.
    cut: the server did it, but the answer ends in its middle. late: the answer comes late. gone: the connection is closed unanswered.
    """

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.server = str(urlsplit(endpoint).netloc)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.Lock()
        self.misbehave([])

    def misbehave(self, plan: Iterable[Fault], only: str = "") -> None:
        """Follow this plan from here on, of the requests whose `METHOD /path` holds `only`; forgets the requests so far."""
        with self.lock:
            self.plan, self.only = iter(plan), only
            self.requests: list[Request] = []

    def next_fault(self, method: str, path: str) -> Fault:
        with self.lock:
            fault = next(self.plan, "") if self.only in f"{method} {path}" else ""
            self.requests.append(Request(method, path, fault))
            return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is no news here."""


class Handler(BaseHTTPRequestHandler):
    """One connection; a fault that needs one closes it."""

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
            # The signature is of the headers as they came, the name of this proxy among them.
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    server.putheader(name, value)
            server.endheaders(body)
            answer = server.getresponse()
            found = answer.read()
        finally:
            server.close()
        if fault == "late":
            time.sleep(LATE)
        if fault == "lost":
            self.refuse(fault)
        else:
            self.answer(answer, found, cut=fault == "cut")

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
        head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        self.wfile.write(head.encode() + body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on

    def log_message(self, format: str, *values: object) -> None:
        """Nothing: the tests read `requests`."""


@contextmanager
def faulty_s3(endpoint: str) -> Iterator[FaultyS3]:
    """The proxy at work, behaving until it is told not to."""
    with FaultyS3(endpoint) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


def forever(fault: Fault) -> Iterator[Fault]:
    """A plan for a store that stays down."""
    return itertools.repeat(fault)
