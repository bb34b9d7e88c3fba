"""Single objects: JSON, bytes, and files that appear only when complete."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from fsspec.spec import AbstractFileSystem

from rebeca_ray.errors import InputError
from rebeca_ray.storage.filesystem import UNREACHABLE, is_local, open_filesystem, storage_errors, unreadable


class HashingSink:
    """A file opened for writing that hashes what passes and, locally, appears only when complete."""

    def __init__(self, filesystem: AbstractFileSystem, path: str) -> None:
        self.local = is_local(filesystem)
        self.path = path
        self.digest = hashlib.sha256()
        self.size = 0
        with storage_errors(path, "written"):
            if self.local:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.file = filesystem.open(f"{path}.partial" if self.local else path, "wb")

    closed = False

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        try:
            with storage_errors(self.path, "written"):
                self.file.write(data)
        except BaseException:  # of a writer that is not ours, nobody else would tidy up
            self.discard()
            raise
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        try:
            with storage_errors(self.path, "written"):
                self.file.close()  # on a full disk it is often this that fails
                if self.local:
                    Path(f"{self.path}.partial").replace(self.path)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Leave nothing behind, as far as the store lets us: what went wrong before is what is to be told."""
        self.closed = True
        with suppress(*UNREACHABLE):
            if self.local:
                self.file.close()
            else:
                self.file.discard()
                self.file.closed = True  # or it would be written when it is collected
        if self.local:
            Path(f"{self.path}.partial").unlink(missing_ok=True)

    def record(self) -> dict[str, Any]:
        """What a reader can check the file against."""
        return {"bytes": self.size, "sha256": self.digest.hexdigest()}

    def __enter__(self) -> "HashingSink":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        elif not self.closed:
            self.discard()


def read_json(uri: str) -> dict[str, Any] | None:
    """The object at `uri`, or None if there is none."""
    filesystem, path = open_filesystem(uri)
    try:
        found = json.loads(filesystem.cat_file(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UNREACHABLE as error:
        raise unreadable(f"{uri}", error) from None
    except (ValueError, RecursionError):
        raise InputError(f"{uri}: not valid JSON; restore it from a backup or remove it") from None
    if not isinstance(found, dict):
        raise InputError(
            f"{uri}: holds a JSON {type(found).__name__}, expected an object; restore it from a backup or remove it"
        )
    return found


def write_json(value: dict[str, Any], uri: str) -> None:
    """Write an object so that a reader sees the old one or the new one, never a part."""
    filesystem, path = open_filesystem(uri)
    data = json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"
    with storage_errors(uri, "written"):
        if is_local(filesystem):
            replace_file(Path(path), data)
        else:
            filesystem.pipe_file(path, data)


def write_object(data: bytes, uri: str, *, content_type: str, cache_control: str) -> None:
    """Write a file as a web server is to send it; what it is to say of it is kept on S3 alone."""
    filesystem, path = open_filesystem(uri)
    with storage_errors(uri, "written"):
        if is_local(filesystem):
            replace_file(Path(path), data)
        else:
            filesystem.pipe_file(path, data, ContentType=content_type, CacheControl=cache_control)


def replace_file(path: Path, data: bytes) -> None:
    """Write a local file beside its place, then move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{path}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):  # what went wrong before is what is to be told
            partial.unlink(missing_ok=True)
