"""The local disk, and network file systems mounted as one.

A write goes to a file beside the target and is then renamed. Compare-and-swap takes a lock file.
"""

import fcntl
import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from errno import EBUSY, EDQUOT, EHOSTUNREACH, EINVAL, ENETUNREACH, ENOSPC, EREMOTEIO, EROFS, ESTALE
from pathlib import Path
from typing import IO, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.fs
from fsspec.spec import AbstractFileSystem

from rebeca_ray.errors import Failure, InputError

LOCK_SECONDS = 30  # a change takes milliseconds


class LocalStore:
    """A path on a local disk."""

    schemes: ClassVar[tuple[str, ...]] = ("file", "local")
    example: ClassVar[str] = "file:///absolute/path"

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.filesystem: AbstractFileSystem
        self.path: str
        # fsspec.core.url_to_fs would take `::` in a path for a chain of file systems.
        self.filesystem = fsspec.filesystem("file")
        self.path = os.path.abspath(uri.partition("://")[2] if "://" in uri else uri)

    def read_versioned(self) -> tuple[bytes, str] | None:
        """Return the file and a digest of its content, or None if there is no file."""
        try:
            data = Path(self.path).read_bytes()
        except FileNotFoundError:
            return None
        return data, hashlib.sha256(data).hexdigest()

    def compare_and_swap(self, data: bytes, version: str | None) -> bool:
        with locked(Path(self.path)):
            current = self.read_versioned()
            if (current and current[1]) != version:
                return False
            self.put(data)
        return True

    def put(self, data: bytes, *, content_type: str | None = None, cache_control: str | None = None) -> None:
        """Write the file beside its target, then rename it. A disk keeps no headers."""
        path = Path(os.path.realpath(self.path))  # a link stays, and its target is written
        make_folder(path.parent)
        partial = partial_of(path)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync(path.parent)
        finally:
            with suppress(OSError):  # or it would hide the first error
                partial.unlink(missing_ok=True)

    def remove(self, paths: list[str]) -> None:
        for path in paths:
            Path(path).unlink(missing_ok=True)

    def abort_uploads(self, before: datetime) -> int:
        return 0

    def scan_filesystem(self) -> pyarrow.fs.FileSystem:
        return pyarrow.fs.LocalFileSystem()

    def probe(self) -> None:
        """Do nothing: a disk has no server."""

    @staticmethod
    def classify(error: BaseException) -> Failure | None:
        """Return why the operating system or Arrow raised `error`.

        Arrow raises an OSError without a number for a broken file. The operating system sets a number.
        """
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            return Failure.MISSING
        number = getattr(error, "errno", None)
        if isinstance(error, PermissionError) or number == EROFS:
            return Failure.DENIED
        if number in (ENOSPC, EDQUOT):
            return Failure.FULL
        # s3fs translates the answers of a server that is broken or busy to the first two numbers.
        if number in (EREMOTEIO, EBUSY, ESTALE, EHOSTUNREACH, ENETUNREACH):
            return Failure.UNREACHABLE
        if isinstance(error, ConnectionError | TimeoutError):
            return Failure.UNREACHABLE
        if isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None):
            return Failure.DAMAGED
        return Failure.FAILED if isinstance(error, OSError) else None

    @staticmethod
    def failure_types() -> tuple[type[Exception], ...]:
        return (OSError,)

    @staticmethod
    def iceberg_properties() -> dict[str, str]:
        return {}


def lock_file(path: Path) -> Path:
    """Return the file that guards changes of `path`."""
    return path.with_name(f".{path.stem}.lock")


def partial_of(path: Path) -> Path:
    """Return the name of a file until it is complete. No two processes, of any machine, share one."""
    return Path(f"{path}.partial-{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(4)}")


PARTIAL = re.compile(r"\.partial-.+-\d+-[0-9a-f]{8}$")


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, so that they outlast a crash of the machine."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


def files_below(path: str, *, links: bool = True) -> list[str]:
    """Return all files at or below a path; none for a missing one. Without `links`, none behind a link.

    A folder that several links reach, or one that leads back up, is listed once. Raises the OSError of a
    folder that cannot be listed. fsspec would leave that folder out.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    if os.path.isfile(path):
        return [path]
    files, seen = list[str](), {os.path.realpath(path)}
    for folder, inner, names in os.walk(path, onerror=fail, followlinks=links):
        files += [os.path.join(folder, name) for name in names]
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(inner)}
        inner[:] = [name for name, target in real.items() if target not in seen]
        seen.update(real.values())
    return files


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk: a crash may otherwise undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != EINVAL:  # a file system mounted over a network may not sync folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file beside `path`. Raises InputError if another process keeps it for LOCK_SECONDS."""
    make_folder(path.parent)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        with lock_file(path).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"{lock.name}: another process has held it for {LOCK_SECONDS} s; end that process"
                    ) from None
                time.sleep(0.02)
                continue
            if is_still(lock_file(path), lock):
                yield
                return


def is_still(path: Path, file: IO[str]) -> bool:
    """Return whether an open file is the one at `path`: its last holder may have removed it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def remove_with_lock(path: Path) -> None:
    """Remove a file that compare-and-swap changes, and its lock file."""
    with locked(path):
        path.unlink(missing_ok=True)
        lock_file(path).unlink()
