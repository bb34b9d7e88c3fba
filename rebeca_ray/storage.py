"""Where data lives: one resolver for local paths and `s3://`, and writes that are never seen half-done.

S3 goes through s3fs; endpoint and credentials come from the usual AWS environment (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, …) or the instance's role, never from a config file.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import botocore.exceptions
import fsspec
import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet as pq
from aiohttp import ClientPayloadError
from botocore.exceptions import BotoCoreError, HTTPClientError
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from rebeca_ray.errors import StorageError, UserError, describe

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
PARQUET = pyarrow.dataset.ParquetFileFormat(
    default_fragment_scan_options=pyarrow.dataset.ParquetFragmentScanOptions(
        pre_buffer=True, page_checksum_verification=True
    )
)


def open_filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec filesystem of `uri`, and the path inside it.

    Raises UserError for a scheme other than local and `s3://`, and for an S3 server that cannot be reached.
    """
    scheme = uri.partition("://")[0] if "://" in uri else "file"
    if uri.startswith("s3:") and scheme != "s3":
        raise UserError(f"{uri}: is no address; give s3://bucket/prefix")
    if scheme not in ("file", "s3"):
        raise UserError(
            f"{uri}: storage {scheme!r} is not supported; give a local path or s3://bucket/prefix"
        )
    if scheme == "file":
        filesystem, path = fsspec.core.url_to_fs(uri)
        return filesystem, path
    filesystem, path = fsspec.core.url_to_fs(uri, config_kwargs=PATIENT)
    bucket = path.strip("/").split("/")[0]
    if not bucket:
        raise UserError(f"{uri}: names no bucket; give s3://bucket/prefix")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "the one of AWS"
    try:
        meet(endpoint, bucket)
    except (BotoCoreError, OSError, ValueError) as error:  # ValueError: no URL
        raise UserError(
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
def one_line(uri: str, done: str) -> Iterator[None]:
    """A UserError for a store that does not do, after all retries, what was to be `done` (written, listed, removed)."""
    try:
        yield
    except UNREACHABLE as error:
        raise StorageError(
            f"{uri}: cannot be {done} ({describe(error)}); check the path, its free space and the credentials"
        ) from None


def open_table(uri: str, what: str) -> tuple[list[str], pa.Schema]:
    """The Parquet files of `uri` (a file or a folder of files), sorted, and the schema of the first. Raises as `read_schemas`."""
    found = read_schemas(uri, what)
    return list(found), next(iter(found.values()))


def read_schemas(uri: str, what: str) -> dict[str, pa.Schema]:
    """The schema of every Parquet file of `uri` (a file or a folder of files), in the order of their names.

    Raises UserError, naming `what`, if there is nothing there, a file is not Parquet, has two columns of one name, or the
    files differ in their columns: a reader would take the first file's and drop the rest without a word.
    """
    filesystem, path = open_filesystem(uri)
    try:
        found = [path] if filesystem.isfile(path) else filesystem.find(path)
        files = sorted(str(name) for name in found if str(name).endswith(".parquet") or name == path)
        if not files:
            raise UserError(f"{what} {uri}: not found; give a Parquet file, or a folder that holds some")
        with ThreadPoolExecutor(16) as pool:  # on S3 each takes a round trip or two
            schemas = list(pool.map(lambda name: read_schema(filesystem, name, what, uri), files))
    except UNREACHABLE as error:
        raise unreadable(f"{what} {uri}", error) from None

    for name, schema in zip(files, schemas, strict=True):
        if len({*schema.names}) < len(schema.names):
            twice = next(column for column in schema.names if schema.names.count(column) > 1)
            raise UserError(
                f"{what} {uri}: {Path(name).name} has column {twice!r} more than once; rename or drop the others"
            )
        if odd := sorted({*schema.names} ^ {*schemas[0].names}):
            raise UserError(
                f"{what} {uri}: {Path(name).name} and {Path(files[0]).name} differ in their columns ({', '.join(odd[:3])}); "
                "write all files with the same"
            )
    return dict(zip(files, schemas, strict=True))


def read_schema(filesystem: AbstractFileSystem, path: str, what: str, uri: str) -> pa.Schema:
    try:
        with filesystem.open(path, "rb") as file:
            return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        raise UserError(
            f"{what} {uri}: {Path(path).name} is not a readable Parquet file; write it again"
        ) from None


def read_table(uri: str, what: str, columns: list[str] | None = None) -> pa.Table:
    """All of `uri` in memory. Raises UserError, naming `what`, for anything unreadable."""
    files, _ = open_table(uri, what)
    filesystem, _ = open_filesystem(uri)
    try:
        dataset = pyarrow.dataset.dataset(files, filesystem=arrow_filesystem(filesystem), format=PARQUET)
        return dataset.to_table(columns=columns)
    except (pa.ArrowException, *UNREACHABLE) as error:
        if not is_damage(error):
            raise unreadable(f"{what} {uri}", error) from None
        raise UserError(
            f"{what} {uri}: not readable as Parquet ({describe(error)}); write it again"
        ) from None


def write_table(
    table: pa.Table, uri: str, *, row_group_size: int, embed_column: str | None = None
) -> dict[str, Any]:
    """Write one Parquet file and return its `rows`, `bytes` and `sha256`, hashed while writing.

    The embedding column is stored byte-stream-split without a dictionary or statistics, everything with zstd and a checksum a page.
    Locally the file appears by one rename, so that a crash leaves no half-written file behind.
    """
    filesystem, path = open_filesystem(uri)
    plain = [field.name for field in table.schema if field.name not in (embed_column, "image", "thumbnail")]
    leaf = f"{embed_column}.list.element"
    sink = HashingSink(filesystem, path)
    with (
        sink,
        pq.ParquetWriter(
            pa.PythonFile(sink, mode="w"),
            table.schema,
            compression="zstd",
            use_dictionary=[name for name in plain if pa.types.is_string(table.schema.field(name).type)],
            use_byte_stream_split=[leaf] if embed_column else False,
            write_statistics=plain,
            write_page_checksum=True,
        ) as writer,
    ):
        writer.write_table(table, row_group_size=row_group_size)
    return {"rows": table.num_rows, **sink.record()}


class HashingSink:
    """A file opened for writing that hashes what passes and, locally, appears only when complete."""

    def __init__(self, filesystem: AbstractFileSystem, path: str) -> None:
        self.local = is_local(filesystem)
        self.path = path
        self.digest = hashlib.sha256()
        self.size = 0
        with one_line(path, "written"):
            if self.local:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.file = filesystem.open(f"{path}.partial" if self.local else path, "wb")

    closed = False

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        try:
            with one_line(self.path, "written"):
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
            with one_line(self.path, "written"):
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
        raise UserError(f"{uri}: not valid JSON; restore it from a backup or remove it") from None
    if not isinstance(found, dict):
        raise UserError(
            f"{uri}: holds a JSON {type(found).__name__}, expected an object; restore it from a backup or remove it"
        )
    return found


def write_json(value: dict[str, Any], uri: str) -> None:
    """Write an object so that a reader sees the old one or the new one, never a part."""
    filesystem, path = open_filesystem(uri)
    data = json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"
    with one_line(uri, "written"):
        if is_local(filesystem):
            replace_file(Path(path), data)
        else:
            filesystem.pipe_file(path, data)


def write_object(data: bytes, uri: str, *, content_type: str, cache_control: str) -> None:
    """Write a file as a web server is to send it; what it is to say of it is kept on S3 alone."""
    filesystem, path = open_filesystem(uri)
    with one_line(uri, "written"):
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


def describe_files(uri: str, what: str) -> str:
    """A digest of the Parquet files of `uri` by name, size and time of change."""
    files, _ = open_table(uri, what)
    filesystem, _ = open_filesystem(uri)
    found = [filesystem.info(name) for name in files]
    told = [
        [info["name"], info["size"], str(info.get("mtime") or info.get("LastModified"))] for info in found
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


def list_files(uri: str, suffix: str = "") -> list[str]:
    """The files below `uri` that end with `suffix`, sorted, as they are now; none if there is nothing."""
    filesystem, path = open_filesystem(uri)
    filesystem.invalidate_cache()
    with one_line(uri, "listed"):
        found = [str(name) for name in filesystem.find(path)]
    return sorted(
        f"{uri.rstrip('/')}{name.removeprefix(path.rstrip('/'))}" for name in found if name.endswith(suffix)
    )


def list_folders(uri: str) -> list[str]:
    """The names of the folders directly in `uri`, sorted."""
    filesystem, path = open_filesystem(uri)
    filesystem.invalidate_cache()
    with one_line(uri, "listed"):
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
    with one_line(uri, "removed"), suppress(FileNotFoundError):
        filesystem.rm(path, recursive=True)


def delete_files(uris: list[str]) -> None:
    """Remove some files of one store, on S3 a thousand a request; those that are not there are no error."""
    if not uris:
        return
    filesystem, _ = open_filesystem(uris[0])
    paths = [open_filesystem(uri)[1] for uri in uris]
    with one_line(uris[0], "removed"):
        if is_local(filesystem):
            for path in paths:
                Path(path).unlink(missing_ok=True)
        else:
            filesystem.rm(paths)


def unreadable(what: str, error: BaseException) -> UserError:
    """Of a store that fails a StorageError; of a place that cannot be read at all it is who gave it that must mend something."""
    kind = (
        UserError
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
