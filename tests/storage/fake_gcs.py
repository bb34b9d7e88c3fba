"""A small server with Google Cloud Storage's JSON API on 127.0.0.1, for gcsfs: objects with generations.

It keeps the one promise that compare-and-swap needs and gcp-storage-emulator does not: `ifGenerationMatch`.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


class Blob(NamedTuple):
    """One generation of an object."""

    data: bytes
    generation: int
    content_type: str
    cache_control: str | None


class FakeGcs(ThreadingHTTPServer):
    """Keeps objects by `bucket/key`. `lose_answers` uploads are stored, but answered by 503."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.Lock()
        self.blobs: dict[str, Blob] = {}
        self.uploads: dict[str, tuple[str, dict[str, Any], bytearray]] = {}
        self.generations = count(1)
        self.lose_answers = 0
        self.ignores_conditions = False
        self.forbidden = ""  # a prefix of `bucket/key` that may not be read

    def store(self, name: str, data: bytes, properties: dict[str, Any], expected: str | None) -> Blob | None:
        """Store an object if its generation is the `expected` one. Return None if it is not."""
        with self.lock:
            current = self.blobs.get(name)
            if expected is not None and int(expected) != (current.generation if current else 0):
                return None
            content_type = properties.get("contentType", "application/octet-stream")
            blob = Blob(data, next(self.generations), content_type, properties.get("cacheControl"))
            self.blobs[name] = blob
            return blob


class Handler(BaseHTTPRequestHandler):
    """The requests that gcsfs sends."""

    server: FakeGcs
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, query = self.address()
        one = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)", path)
        name = "/".join(map(unquote, one.groups())) if one else ""
        if one and self.server.forbidden and name.startswith(self.server.forbidden):
            self.answer(403, {"error": {"code": 403, "message": "no access"}})
        elif one and name not in self.server.blobs:
            self.answer(404, {"error": {"code": 404, "message": "No such object"}})
        elif one and query.get("alt") == "media":
            self.send_media(self.server.blobs[name].data)
        elif one:
            self.answer(200, metadata(name, self.server.blobs[name]))
        elif listing := re.fullmatch(r"/storage/v1/b/([^/]+)/o", path):
            self.answer(200, self.listed(listing[1], query.get("prefix", ""), query.get("delimiter")))
        else:
            self.answer(404, {"error": {"code": 404, "message": "No such page"}})

    def do_POST(self) -> None:
        path, query = self.address()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if upload := self.server.uploads.get(query.get("upload_id", "")):
            self.continue_upload(upload, body)
            return
        if copy := re.fullmatch(r"/storage/v1/b/(.+)/o/(.+)/rewriteTo/b/(.+)/o/(.+)", path):
            source, target = (f"{copy[first]}/{unquote(copy[first + 1])}" for first in (1, 3))
            blob = self.server.store(target, self.server.blobs[source].data, {}, None)
            self.answer(200, {"done": True, "resource": blob and metadata(target, blob)})
            return
        bucket = path.split("/")[5]
        if query["uploadType"] == "resumable":
            key = str(len(self.server.uploads) + 1)
            name = f"{bucket}/{query['name']}"
            self.server.uploads[key] = (name, json.loads(body), bytearray())
            self.answer(200, {}, Location=f"{self.server.url}{path}?uploadType=resumable&upload_id={key}")
            return
        properties: dict[str, Any] = {"contentType": self.headers["Content-Type"], "name": query.get("name")}
        if query["uploadType"] == "multipart":
            first, _, second = body.partition(b"\n--==0==\n")
            properties = json.loads(first.partition(b"\n\n")[2])
            head, _, data = second.partition(b"\n\n")
            properties["contentType"] = head.decode().partition(": ")[2]
            body = data.removesuffix(b"\n--==0==--")
        name = f"{bucket}/{properties['name']}"
        condition = None if self.server.ignores_conditions else query.get("ifGenerationMatch")
        self.finish_upload(name, self.server.store(name, body, properties, condition))

    def do_DELETE(self) -> None:
        path, query = self.address()
        self.server.uploads.pop(query.get("upload_id", ""), None)
        bucket, _, key = path.removeprefix("/storage/v1/b/").partition("/o/")
        gone = self.server.blobs.pop(f"{bucket}/{unquote(key)}", None)
        self.answer(204 if gone or "upload_id" in query else 404, None)

    def continue_upload(self, upload: tuple[str, dict[str, Any], bytearray], body: bytes) -> None:
        """Take one chunk. The chunk whose range tells the whole size is the last one."""
        name, properties, data = upload
        data += body
        if self.headers["Content-Range"].endswith("/*"):
            self.answer(308, None, Range=f"bytes=0-{len(data) - 1}")
        else:
            self.finish_upload(name, self.server.store(name, bytes(data), properties, None))

    def finish_upload(self, name: str, blob: Blob | None) -> None:
        """Answer an upload: by 412 if the generation was another one."""
        if blob is None:
            self.answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        elif self.server.lose_answers:
            self.server.lose_answers -= 1
            self.answer(503, {"error": {"code": 503, "message": "Backend Error"}})
        else:
            self.answer(200, metadata(name, blob))

    def listed(self, bucket: str, prefix: str, delimiter: str | None) -> dict[str, Any]:
        keys = [name.removeprefix(f"{bucket}/") for name in sorted(self.server.blobs)]
        keys = [key for key in keys if key.startswith(prefix) and f"{bucket}/{key}" in self.server.blobs]
        rest = {key: key.removeprefix(prefix) for key in keys}
        below = {key for key in keys if delimiter and delimiter in rest[key]}
        prefixes = sorted({f"{prefix}{rest[key].split('/')[0]}/" for key in below})
        names = [f"{bucket}/{key}" for key in keys if key not in below]
        return {"items": [metadata(name, self.server.blobs[name]) for name in names], "prefixes": prefixes}

    def send_media(self, data: bytes) -> None:
        """Answer the bytes, or the range of them that the client requests."""
        if bounds := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            data = data[int(bounds[1]) : int(bounds[2]) + 1 if bounds[2] else None]
        self.send(206 if bounds else 200, data)

    def address(self) -> tuple[str, dict[str, str]]:
        url = urlsplit(self.path)
        return url.path, {name: values[0] for name, values in parse_qs(url.query).items()}

    def answer(self, status: int, value: Any, **headers: str) -> None:
        body = b"" if value is None else json.dumps(value).encode()
        self.send(status, body, **{"Content-Type": "application/json", **headers})

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def metadata(name: str, blob: Blob) -> dict[str, Any]:
    """Return an object resource, as Google describes it."""
    bucket, _, key = name.partition("/")
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": key,
        "size": str(len(blob.data)),
        "generation": str(blob.generation),
        "contentType": blob.content_type,
        "cacheControl": blob.cache_control,
        "updated": "2026-01-05T00:00:00.000Z",
        "timeCreated": "2026-01-05T00:00:00.000Z",
    }


@contextmanager
def fake_gcs() -> Iterator[FakeGcs]:
    """Run the server inside the block. `server.url` belongs in STORAGE_EMULATOR_HOST."""
    server = FakeGcs()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
