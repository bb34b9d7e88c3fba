"""Serve every object store behind HTTP: exact reads for Arrow, and a quick check of the endpoint."""

from functools import cache
from urllib.error import HTTPError
from urllib.request import urlopen

import pyarrow as pa
import pyarrow.fs
from fsspec.spec import AbstractFileSystem

PROBE_SECONDS = 5


class ExactHandler(pyarrow.fs.FSSpecHandler):  # type: ignore[misc]
    """Read the requested bytes alone. fsspec would read 5 MB ahead of every read, through unused columns."""

    def open_input_file(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(self.fs.open(path, mode="rb", cache_type="none"), mode="r")


def exact_filesystem(filesystem: AbstractFileSystem) -> pyarrow.fs.FileSystem:
    """Return the same filesystem for pyarrow and Ray Data, without read-ahead."""
    return pyarrow.fs.PyFileSystem(ExactHandler(filesystem))


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
