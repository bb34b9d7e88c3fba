"""Every storage operation of this process below a folder, one after the other, and a disk that fails at one.

`os` and `open` are replaced for the time of a block, and so are the two ways in which Iceberg writes. Pools
of threads work in the caller's thread, so that operation number n of a command is the same in every run.
"""

import builtins
import errno
import io
import os
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from unittest.mock import patch

from pyiceberg.io.pyarrow import PyArrowFile
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

KILLED = -9  # an exit code
CHANGES = ("replace", "unlink", "remove", "rmdir", "mkdir")
READS = ("listdir", "scandir")
NEEDS_SPACE = ("mkdir", "create", "commit")  # besides the content of a file
KINDS = (
    *("killed before", "killed after", "killed in a write"),
    *("error before", "error after", "error in a write", "disk full"),
)


class Killed(BaseException):
    """Ends a command as a kill does: nothing of it runs any more."""


class Operation(NamedTuple):
    """A storage operation: its name, `open r` or `open w` for files, and its path."""

    name: str
    path: str
    succeeded: bool = False

    @property
    def is_change(self) -> bool:
        return self.name not in (*READS, "open r")


class Watcher(Protocol):
    """Sees every operation. An exception of `before` prevents it; one of `after` comes once it is done."""

    def before(self, operation: Operation) -> None: ...

    def after(self, operation: Operation) -> None: ...

    def tear(self, operation: Operation) -> BaseException | None:
        """Return the error of the first write to a file that is opened, after half of it; None for none."""
        ...


class TornFile(io.FileIO):
    """A file that takes half of the first write."""

    def __init__(self, path: str, error: BaseException) -> None:
        super().__init__(path, "w")
        self.error = error

    def write(self, data: Any) -> int:
        super().write(bytes(data)[: len(data) // 2])
        raise self.error


@contextmanager
def watched(root: str, watcher: Watcher) -> Iterator[None]:
    """Show every operation on a path below `root` to the watcher."""
    real_open = io.open

    def full_path(path: Any, dir_fd: int | None = None) -> str:
        """Return a path in full: `shutil.rmtree` gives one below an open folder, or that folder's number."""
        if isinstance(path, int):
            return os.readlink(f"/proc/self/fd/{path}")
        return str(path) if dir_fd is None else f"{os.readlink(f'/proc/self/fd/{dir_fd}')}/{path}"

    def around(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watch(path: Any = ".", *arguments: Any, **options: Any) -> Any:
            where = full_path(path, options.get("dir_fd"))
            if not where.startswith(root):
                return call(path, *arguments, **options)
            operation = Operation(name, where)
            watcher.before(operation)
            result = call(path, *arguments, **options)
            watcher.after(operation)
            return result

        return watch

    def open_watched(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if isinstance(file, int) or not str(file).startswith(root):
            return real_open(file, mode, *arguments, **options)
        operation = Operation("open w" if {*mode} & {*"wax+"} else "open r", str(file))
        watcher.before(operation)
        if operation.is_change and "b" in mode and (error := watcher.tear(operation)):
            return io.BufferedWriter(TornFile(str(file), error))
        opened = real_open(file, mode, *arguments, **options)
        watcher.after(operation)
        return opened

    def submit_here(_: ThreadPoolExecutor, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments, **options))
        except BaseException as error:
            future.set_exception(error)
        return future

    def create_watched(file: Any, overwrite: bool = False) -> Any:
        return around("create", lambda _: create(file, overwrite))(file.location.removeprefix("file://"))

    def commit_watched(session: Session) -> None:
        return around("commit", lambda _: commit(session))(f"{root}/{session.get_bind().url.database}")

    create, commit = PyArrowFile.create, Session.commit
    calls = {name: around(name, getattr(os, name)) for name in (*CHANGES, *READS)}
    with (
        patch.multiple(os, **calls),
        patch.object(PyArrowFile, "create", create_watched),
        patch.object(Session, "commit", commit_watched),
        patch.object(io, "open", open_watched),
        patch.object(builtins, "open", open_watched),
        patch.object(ThreadPoolExecutor, "submit", submit_here),
    ):
        yield


class Counter:
    """Counts the operations of a command, and keeps their names."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def before(self, operation: Operation) -> None:
        self.operations.append(operation)

    def after(self, operation: Operation) -> None:
        self.operations[-1] = operation._replace(succeeded=True)

    def tear(self, operation: Operation) -> BaseException | None:
        return None


def fits(kind: str, operation: Operation) -> bool:
    """Return whether a kind of failure makes a difference at an operation."""
    if kind.endswith("in a write"):
        return operation.name == "open w" and not operation.path.endswith(".lock")
    if kind == "disk full":
        return operation.is_change
    if kind.endswith("after"):
        return operation.is_change and operation.succeeded
    return True


class FailingDisk:
    """Fails at operation number `at` (from 0). After a kill all later ones fail, too; a full disk stays full.

    `look` is called after every change: a reader may look at the disk.
    """

    def __init__(self, kind: str, at: int, look: Callable[[], None] = lambda: None) -> None:
        self.kind, self.at, self.look = kind, at, look
        self.count = -1
        self.happened = self.dead = self.full = self.looking = False

    def error(self, operation: Operation) -> BaseException:
        if self.kind.startswith("killed"):
            self.dead = True
            return Killed()
        number = errno.ENOSPC if self.kind == "disk full" else errno.EIO
        text = os.strerror(number)
        if operation.name == "commit":
            cause = sqlite3.OperationalError(text)
            cause.sqlite_errorname = "SQLITE_FULL" if number == errno.ENOSPC else "SQLITE_IOERR_WRITE"
            return OperationalError("COMMIT", {}, cause)
        return OSError(number, text, operation.path)

    def fails(self, operation: Operation, moment: str) -> bool:
        """Return whether the failure happens now, at a moment of an operation."""
        if self.count != self.at or self.happened or not self.kind.endswith(moment):
            return False
        self.happened = True
        return True

    def before(self, operation: Operation) -> None:
        if self.looking:
            return
        if self.dead:
            raise Killed
        self.count += 1
        if self.fails(operation, "disk full"):
            self.full = True
        if self.fails(operation, "before") or (self.full and operation.name in NEEDS_SPACE):
            raise self.error(operation)

    def after(self, operation: Operation) -> None:
        if self.looking:
            return
        if operation.is_change:
            self.looking = True
            self.look()
            self.looking = False
        if self.fails(operation, "after"):
            raise self.error(operation)

    def tear(self, operation: Operation) -> BaseException | None:
        if not self.looking and (self.full or self.fails(operation, "in a write")):
            return self.error(operation)
        return None


@dataclass
class DiskFault:
    """A disk that fails, or a kill, at one operation of the first attempt."""

    kind: str
    at: int
    happened: bool = False
    stall_minutes: float | None = None
    recovers: bool = True

    @property
    def codes(self) -> tuple[int, ...]:
        return (KILLED,) if self.kind.startswith("killed") else (75,)

    @contextmanager
    def around(self, lab: Any, command: Any, world: Any, reader: Any) -> Iterator[None]:
        disk = FailingDisk(self.kind, self.at, reader.look)
        with watched(world.root, disk):
            yield
        self.happened = disk.happened

    def between(self, world: Any) -> None:
        pass
