"""Where data lives: one resolver for local paths and `s3://`, and writes that are never seen half-done.

S3 goes through s3fs; endpoint and credentials come from the usual AWS environment (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, …) or the instance's role, never from a config file.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import botocore.exceptions
import fsspec
import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
from aiohttp import ClientPayloadError
from botocore.exceptions import BotoCoreError, HTTPClientError
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from rebeca_ray.errors import InputError, StorageError, UserError, describe

PATIENT: dict[str, Any] = {
    "connect_timeout": 5,
    "read_timeout": 30,
    "max_pool_connections": 64,
}  # 10 by default, for all threads together
PATIENT["retries"] = {"mode": "standard", "total_max_attempts": 10}
HASTY: dict[str, Any] = {
    "connect_timeout": 3,
    "read_timeout": 10,
    "retries": {"mode": "standard", "total_max_attempts": 3},
}
# What a file system raises. BotoCoreError: no credentials, no such endpoint; ClientPayloadError: every answer was cut in its middle.
UNREACHABLE = (OSError, BotoCoreError, ClientPayloadError)


def open_filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec filesystem of `uri`, and the path inside it.

    Raises UserError for a scheme other than local and `s3://`, and for an S3 server that cannot be reached.
    """
    scheme = uri.partition("://")[0] if "://" in uri else "file"
    if uri.startswith("s3:") and scheme != "s3":
        raise InputError(f"{uri}: is no address; give s3://bucket/prefix")
    if scheme not in ("file", "s3"):
        raise InputError(
            f"{uri}: storage {scheme!r} is not supported; give a local path or s3://bucket/prefix"
        )
    if scheme == "file":
        filesystem, path = fsspec.core.url_to_fs(uri)
        return filesystem, path
    filesystem, path = fsspec.core.url_to_fs(uri, config_kwargs=PATIENT)
    bucket = path.strip("/").split("/")[0]
    if not bucket:
        raise InputError(f"{uri}: names no bucket; give s3://bucket/prefix")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "the one of AWS"
    try:
        meet(endpoint, bucket)
    except (BotoCoreError, OSError, ValueError) as error:  # ValueError: no URL
        raise InputError(
            f"{uri}: its server cannot be reached ({describe(error)}); look at AWS_ENDPOINT_URL ({endpoint}) and the network"
        ) from None
    return filesystem, path


@cache
def meet(endpoint: str, bucket: str) -> None:
    """Raise whatever keeps us from an S3 server, soon: once it was met, it is waited for through every hiccup."""
    hasty = fsspec.get_filesystem_class("s3")(config_kwargs=HASTY, skip_instance_cache=True)
    hasty.retries = 1
    try:
        hasty.call_s3("head_bucket", Bucket=bucket)
    except (botocore.exceptions.ConnectionError, HTTPClientError):
        raise
    except (OSError, BotoCoreError):  # it answered, or was not asked: what is wanted of it next will tell
        pass


def is_local(filesystem: AbstractFileSystem) -> bool:
    return isinstance(filesystem, LocalFileSystem)


def arrow_filesystem(filesystem: AbstractFileSystem) -> pyarrow.fs.FileSystem:
    """The same filesystem for pyarrow and Ray Data."""
    if is_local(filesystem):
        return pyarrow.fs.LocalFileSystem()
    return pyarrow.fs.PyFileSystem(ExactHandler(filesystem))


class ExactHandler(pyarrow.fs.FSSpecHandler):  # type: ignore[misc]
    """Reads what it is asked for. fsspec would read 5 MB ahead of every read, through columns that nobody wants."""

    def open_input_file(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(self.fs.open(path, mode="rb", cache_type="none"), mode="r")


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` below it."""
    return "/".join([uri.rstrip("/"), *parts])


@contextmanager
def storage_errors(uri: str, done: str) -> Iterator[None]:
    """A UserError for a store that does not do, after all retries, what was to be `done` (written, listed, removed)."""
    try:
        yield
    except UNREACHABLE as error:
        raise StorageError(
            f"{uri}: cannot be {done} ({describe(error)}); check the path, its free space and the credentials"
        ) from None


def list_files(uri: str, suffix: str = "") -> list[str]:
    """The files below `uri` that end with `suffix`, sorted, as they are now; none if there is nothing."""
    filesystem, path = open_filesystem(uri)
    filesystem.invalidate_cache()
    with storage_errors(uri, "listed"):
        found = [str(name) for name in filesystem.find(path)]
    return sorted(
        f"{uri.rstrip('/')}{name.removeprefix(path.rstrip('/'))}" for name in found if name.endswith(suffix)
    )


def list_folders(uri: str) -> list[str]:
    """The names of the folders directly in `uri`, sorted."""
    filesystem, path = open_filesystem(uri)
    filesystem.invalidate_cache()
    with storage_errors(uri, "listed"):
        found = filesystem.ls(path, detail=True) if filesystem.exists(path) else []
    return sorted(
        str(entry["name"]).rstrip("/").rsplit("/", 1)[-1] for entry in found if entry["type"] == "directory"
    )


def exists(uri: str) -> bool:
    filesystem, path = open_filesystem(uri)
    filesystem.invalidate_cache()
    return bool(filesystem.exists(path))


def delete(uri: str) -> None:
    """Remove a file, or a folder with all in it; what is not there is no error."""
    filesystem, path = open_filesystem(uri)
    filesystem.invalidate_cache()
    with storage_errors(uri, "removed"), suppress(FileNotFoundError):
        filesystem.rm(path, recursive=True)


def delete_files(uris: list[str]) -> None:
    """Remove some files of one store, on S3 a thousand a request; those that are not there are no error."""
    if not uris:
        return
    filesystem, _ = open_filesystem(uris[0])
    paths = [open_filesystem(uri)[1] for uri in uris]
    with storage_errors(uris[0], "removed"):
        if is_local(filesystem):
            for path in paths:
                Path(path).unlink(missing_ok=True)
        else:
            filesystem.rm(paths)


def unreadable(what: str, error: BaseException) -> UserError:
    """Of a store that fails a StorageError; of a place that cannot be read at all it is who gave it that must mend something."""
    kind = (
        InputError
        if isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError | IsADirectoryError)
        else StorageError
    )
    return kind(f"{what}: cannot be read ({describe(error)}); check the path and the credentials")


def is_damage(error: BaseException) -> bool:
    """Whether what kept a file from being read lies in the file: an error of Arrow's, which where it is an OSError has no number.

    What S3 answers Arrow's own client has none either, but says where it comes from.
    """
    plain = type(error) is OSError and error.errno is None and "AWS Error" not in str(error)
    return plain or isinstance(error, pa.ArrowException)
