"""Serve every object store behind HTTP: exact reads for Arrow, and a quick check of the endpoint."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pyarrow as pa
import pyarrow.fs
from fsspec.asyn import sync_wrapper
from fsspec.spec import AbstractFileSystem

PROBE_SECONDS = 5
THREADS = 16
DEADLINE_SECONDS = 120  # of a request with all its retries


class ExactHandler(pyarrow.fs.FSSpecHandler):  # type: ignore[misc]
    """Read the requested bytes alone, and take every path as it is.

    fsspec would read 5 MB ahead of every read, through unused columns. It would remove and copy all objects
    that a path with `*`, `?` or `[` matches.
    """

    def open_input_file(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(self.fs.open(path, mode="rb", cache_type="none"), mode="r")

    def delete_dir(self, path: str) -> None:
        remove_each(self.fs, self.fs.find(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool) -> None:
        self.delete_dir(path)

    def delete_file(self, path: str) -> None:
        self.fs.rm_file(path)

    def move(self, src: str, dest: str) -> None:
        self.fs.cp_file(src, dest)
        self.fs.rm_file(src)

    def copy_file(self, src: str, dest: str) -> None:
        self.fs.cp_file(src, dest)


def exact_filesystem(filesystem: AbstractFileSystem) -> pyarrow.fs.FileSystem:
    """Return the same filesystem for pyarrow and Ray Data, without read-ahead."""
    return pyarrow.fs.PyFileSystem(ExactHandler(filesystem))


def remove_each(filesystem: AbstractFileSystem, paths: list[str]) -> None:
    """Remove objects one by one, by their exact paths. A missing one is no error."""

    def remove(path: str) -> None:
        with suppress(FileNotFoundError):
            filesystem.rm_file(path)

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(remove, paths):  # raises the first error
            pass


def set_deadline(filesystem: AbstractFileSystem, method: str) -> None:
    """Let a client's `method`, through which all its requests go, raise ConnectionError after the deadline.

    The clients retry a silent server for up to half an hour.
    """
    request = getattr(filesystem, method)
    if hasattr(request, "unbounded"):  # fsspec keeps one client for all callers
        return

    async def bounded(*arguments: Any, **options: Any) -> Any:
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                return await request(*arguments, **options)
        except TimeoutError:  # the client would retry this one
            raise ConnectionError(f"no answer within {DEADLINE_SECONDS:g} s") from None

    bounded.unbounded = request  # type: ignore[attr-defined]
    setattr(filesystem, method, bounded)
    if hasattr(filesystem, method.removeprefix("_")):  # its form for callers outside the event loop
        setattr(filesystem, method.removeprefix("_"), sync_wrapper(bounded, obj=filesystem))


@cache
def check_endpoint(url: str) -> None:
    """Raise OSError (or ValueError for a malformed `url`) unless a server answers. Any answer will do.

    Only success is cached. After it, calls use the patient retries of the store's own client.
    """
    try:
        urlopen(url, timeout=PROBE_SECONDS).close()
    except HTTPError:  # the server answered; the next call shows whether it accepts us
        return


def bucket_of_path(path: str) -> str:
    """Return the bucket (or container) of a path inside a filesystem; empty if the path has none."""
    return path.strip("/").split("/")[0]
