"""Read and write single objects: JSON, and files that appear only when complete."""

import hashlib
import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

from fsspec.spec import AbstractFileSystem

from rebeca_ray.errors import InputError
from rebeca_ray.storage.filesystem import is_local, open_filesystem, storage_errors, unreadable
from rebeca_ray.storage.local import make_folder, partial_of, sync
from rebeca_ray.storage.store import failure_types, open_store

JsonObject = dict[str, Any]
LARGE = 2**16  # bytes of a write that is worth a thread


class FileDigest(TypedDict):
    """The size and checksum of a written file."""

    bytes: int
    sha256: str


class HashingSink:
    """Write a file and hash its bytes on the way. A local file appears only when complete.

    Large writes are hashed by a thread, while they are written and the next one is made.
    """

    def __init__(self, filesystem: AbstractFileSystem, path: str) -> None:
        self.local = is_local(filesystem)
        self.path = os.path.realpath(path) if self.local else path  # a link stays, its target is written
        self.digest = hashlib.sha256()
        self.hasher = ThreadPoolExecutor(max_workers=1)  # which starts with the first large write
        self.hashing: Future[None] | None = None
        self.size = 0
        with storage_errors(path):
            if self.local:
                make_folder(Path(self.path).parent)
                self.partial = partial_of(Path(self.path))
            self.file = filesystem.open(str(self.partial) if self.local else path, "wb")

    closed = False

    def write(self, data: bytes) -> int:
        self.wait_for_hash()
        if len(data) < LARGE:
            self.digest.update(data)
        else:
            self.hashing = self.hasher.submit(self.digest.update, data)
        self.size += len(data)
        try:
            with storage_errors(self.path):
                self.file.write(data)
        except BaseException:  # a foreign writer would leave the partial file behind
            self.discard()
            raise
        return len(data)

    def flush(self) -> None:
        pass

    def wait_for_hash(self) -> None:
        """Return once everything that was written is hashed."""
        if self.hashing:
            self.hashing.result()
            self.hashing = None

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.wait_for_hash()
        self.hasher.shutdown()
        try:
            with storage_errors(self.path):
                if self.local:
                    self.file.flush()
                    os.fsync(self.file.fileno())
                self.file.close()  # on a full disk, this often fails first
                if self.local:
                    self.partial.replace(self.path)
                    sync(Path(self.path).parent)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Leave nothing behind, as far as the store allows. Hides no earlier error by one of its own."""
        self.closed = True
        self.hasher.shutdown()
        with suppress(*failure_types()):
            if self.local:
                self.file.close()
            else:
                self.file.discard()
                self.file.closed = True  # or the garbage collector would write it
        if self.local:
            self.partial.unlink(missing_ok=True)

    def record(self) -> FileDigest:
        """Return the size and checksum, against which a reader can check the file."""
        return {"bytes": self.size, "sha256": self.digest.hexdigest()}

    def __enter__(self) -> "HashingSink":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        elif not self.closed:
            self.discard()


def read_json(uri: str) -> JsonObject | None:
    """Return the object at `uri`, or None if there is no file. Raises UserError for anything else."""
    filesystem, path = open_filesystem(uri)
    try:
        value = json.loads(filesystem.cat_file(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except failure_types() as error:
        raise unreadable(uri, error) from None
    except (ValueError, RecursionError):
        raise InputError(f"{uri}: not valid JSON; restore it from a backup or remove it") from None
    if not isinstance(value, dict):
        raise InputError(
            f"{uri}: holds a JSON {type(value).__name__}, expected an object; "
            "restore it from a backup or remove it"
        )
    return value


def write_json(value: JsonObject, uri: str) -> None:
    """Write an object, so that a reader sees the old one or the new one, never a part."""
    store = open_store(uri)
    with storage_errors(uri):
        store.put(encode_json(value))


def encode_json(value: JsonObject) -> bytes:
    """Return the one text of an object: indented, with sorted keys and a line break at the end."""
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"
