"""A small HTTP server on 127.0.0.1 that keeps the JSON it receives, and answers as a test says."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Receiver(ThreadingHTTPServer):
    """Answers each POST with `status`. With `hangs` it answers nothing until the test ends."""

    daemon_threads = True

    def __init__(self, *, status: int, hangs: bool) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.hangs = status, hangs
        self.received: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.hangs:
            self.server.ended.wait(60)
            return
        self.server.received.append(json.loads(body))
        self.server.headers.append(dict(self.headers))
        self.send_response(self.server.status)
        if self.server.status == 302:
            self.send_header("Location", f"{self.server.url}/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def receiving(*, status: int = 200, hangs: bool = False) -> Iterator[Receiver]:
    """Serve inside the block."""
    receiver = Receiver(status=status, hangs=hangs)
    thread = threading.Thread(target=receiver.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.ended.set()
        receiver.shutdown()
        thread.join()
        receiver.server_close()
