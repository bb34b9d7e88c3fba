"""The files of a table: which names below a folder are data, and the columns in the names of its folders.

uri -> one listing -> `InputFile`s; `name=value` folders below the uri -> columns
"""

import hashlib
import json
import posixpath
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from fsspec.spec import AbstractFileSystem

from rebeca_ray.errors import InputError
from rebeca_ray.storage.filesystem import is_local, open_filesystem, unreadable
from rebeca_ray.storage.local import files_below
from rebeca_ray.storage.store import failure_types

THREADS = 16  # on S3 a footer takes a round trip or two
MAGIC = b"PAR1"  # at both ends of a Parquet file
# Such a name promises Parquet, so a file of that name is never passed over.
PARQUET_NAME = re.compile(r"\.(parquet|parq|pq)(\.(gz|gzip|zst|bz2|xz|lz4|snappy|zip))?$", re.IGNORECASE)
CSV_NAME = re.compile(r"\.csv(\.gz)?$", re.IGNORECASE)
PARTIAL_NAME = re.compile(r"\.partial(-\S+)?$")  # left by a writer of ours that was killed
NULL_FOLDER = "__HIVE_DEFAULT_PARTITION__"  # the name of null, as Spark and Hive write it
# The file of a log that tells which rows of the files beside it are still valid.
LOGS = {
    "Delta": re.compile(r"(^|/)_delta_log/[^/]+\.(json|parquet|crc)$"),
    "Iceberg": re.compile(r"(^|/)metadata/([^/]+\.metadata\.json|version-hint\.text)$"),
    "Hudi": re.compile(r"(^|/)\.hoodie/"),
}
LOG_FOLDERS = ("_delta_log", "metadata", ".hoodie")
MAX_EXAMPLES = 3


class InputFile(NamedTuple):
    """A file as the listing shows it."""

    path: str
    size: int
    changed: str  # the time of the last change, as the file system gives it
    version: str  # differs after every change, even within one second on S3


def list_data(uri: str, what: str, *, csv: bool = False) -> tuple[InputFile, ...]:
    """Return the data files of `uri` in the order of their paths: Parquet, with `csv` also CSV.

    Names that begin with `_` or `.` are no data. A file without a name of Parquet is data if its content is
    Parquet. Raises InputError, naming `what`, if there is no data, and if there is both Parquet and CSV.
    """
    filesystem, path = open_filesystem(uri)
    filesystem.invalidate_cache()
    try:
        infos = list_all(filesystem, path)
        base = base_of(uri)
        refuse_log(uri, what, [below(base, name) for name in infos])
        visible = [
            listed(filesystem, name, info) for name, info in infos.items() if is_visible(below(base, name))
        ]
        tables = [file for file in visible if CSV_NAME.search(file.path)]
        with ThreadPoolExecutor(THREADS) as pool:
            is_data = pool.map(lambda file: is_parquet(uri, file), visible)
            parquet = [file for file, yes in zip(visible, is_data, strict=True) if yes]
    except failure_types() as error:
        raise unreadable(f"{what} {uri}", error) from None
    if csv and parquet and tables:
        raise InputError(
            f"{what} {uri}: holds Parquet files and CSV files ({Path(parquet[0].path).name}, "
            f"{Path(tables[0].path).name}); keep one kind"
        )
    if chosen := sorted(parquet or (tables if csv else [])):
        return tuple(chosen)
    kind = "Parquet or CSV" if csv else "Parquet"
    others = [Path(file.path).name for file in visible][:MAX_EXAMPLES]
    state = f"holds no {kind} file ({', '.join(others)})" if others else "not found"
    raise InputError(f"{what} {uri}: {state}; give a {kind} file, or a folder that holds some")


def list_named(what: str, uri: str, files: tuple[str, ...]) -> tuple[InputFile, ...]:
    """Return the files at some addresses, in the order of their paths, by one listing of their common folder.

    Raises InputError, naming `what` and `uri`, if one of them is missing.
    """
    filesystem, _ = open_filesystem(files[0])
    filesystem.invalidate_cache()
    paths = [base_of(file) for file in files]
    try:
        infos = list_all(filesystem, posixpath.commonpath(map(posixpath.dirname, paths)))
    except failure_types() as error:
        raise unreadable(f"{what} {uri}", error) from None
    if missing := [path for path in paths if path not in infos]:
        raise InputError(f"{what} {uri}: file {missing[0]} is missing; restore it, or write the table again")
    return tuple(sorted(listed(filesystem, path, infos[path]) for path in paths))


def list_all(filesystem: AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
    """Return all files at or below `path` by name."""
    if filesystem.isfile(path):
        return {path: filesystem.info(path)}
    if is_local(filesystem):
        infos = {}
        for name in files_below(path):
            with suppress(FileNotFoundError):  # a writer renamed it meanwhile, or a link leads nowhere
                infos[name] = filesystem.info(name)
    else:
        infos = filesystem.find(path, detail=True)
    # An object store may hold an empty object that stands for a folder, also for this one.
    folder = str(filesystem._strip_protocol(path)).rstrip("/")
    return {
        str(name): info
        for name, info in infos.items()
        if info.get("type") != "directory" and not str(name).endswith("/") and str(name) != folder
    }


def listed(filesystem: AbstractFileSystem, path: str, info: dict[str, Any]) -> InputFile:
    """Return a file of a listing. Its version is its ETag or generation, and locally the time of change."""
    # S3 and local disks name the first two; adlfs names the third. gcsfs has both `mtime` and `generation`.
    changed = str(info.get("mtime") or info.get("LastModified") or info.get("last_modified"))
    tag = info.get("ETag") or info.get("etag") or info.get("generation")
    # `stat` follows symbolic links. The time of a link itself does not change with its target.
    version = str(Path(path).stat().st_mtime_ns) if is_local(filesystem) else str(tag)
    return InputFile(path, info["size"], changed, version)


def digest_of(listing: Iterable[InputFile]) -> str:
    """Return a digest of files by name, size and time of change."""
    record = [[file.path, file.size, file.changed] for file in listing]
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()[:32]


def base_of(uri: str) -> str:
    """Return the path of `uri` as the paths of a listing begin with it."""
    filesystem, path = open_filesystem(uri)
    return str(filesystem._strip_protocol(path)).rstrip("/")


def below(base: str, path: str) -> str:
    """Return the part of a file's path below the folder `base`, empty for the file `base` itself."""
    return path.removeprefix(base).lstrip("/")


def is_visible(path: str) -> bool:
    """Return whether a path below the uri may be data. As in Spark, `_name=value` is a folder of data."""
    return not PARTIAL_NAME.search(path) and not any(
        part.startswith(".") or (part.startswith("_") and "=" not in part) for part in path.split("/")
    )


def is_parquet(uri: str, file: InputFile) -> bool:
    """Return whether a file is Parquet by its name, or else by its content."""
    if PARQUET_NAME.search(file.path):
        return True
    if file.path == base_of(uri):  # somebody named this very file
        return not CSV_NAME.search(file.path)
    return file.size >= 2 * len(MAGIC) and not CSV_NAME.search(file.path) and begins_as_parquet(uri, file)


@lru_cache(maxsize=100_000)
def begins_as_parquet(uri: str, file: InputFile) -> bool:
    filesystem, _ = open_filesystem(uri)
    return bool(filesystem.cat_file(file.path, 0, len(MAGIC)) == MAGIC)


def folder_columns(base: str, path: str) -> list[tuple[str, str | None]]:
    """Return the columns that the folders between `base` and a file name, with their value in this file.

    `rating=3/dt=2026-01-05/part.parquet` has two. Folders above the uri name none.
    """
    pairs = (folder.partition("=") for folder in below(base, path).split("/")[:-1])
    return [
        (unquote(name), None if value == NULL_FOLDER else unquote(value))
        for name, equals, value in pairs
        if equals
    ]


def refuse_log(uri: str, what: str, names: Iterable[str]) -> None:
    """Raise InputError if a log is among `names`: it tells which rows of the files beside it are valid."""
    for kind, log in LOGS.items():
        if any(log.search(name) for name in names):
            raise InputError(
                f"{what} {uri}: is a {kind} table, or a part of one, and its log tells which rows are valid; "
                "export it as plain Parquet, and give that folder"
            )


@lru_cache(maxsize=100)
def logs_above(uri: str) -> tuple[str, ...]:
    """Return the files of logs beside a file, beside a folder `name=value`, and beside a folder `data`."""
    filesystem, _ = open_filesystem(uri)
    path, names = base_of(uri), list[str]()
    is_part = filesystem.isfile(path)
    while "/" in path and (is_part or "=" in Path(path).name or Path(path).name == "data"):
        path, is_part = path.rsplit("/", 1)[0], False
        for folder in LOG_FOLDERS:
            with suppress(*failure_types()):  # a folder that is missing, or that we may not list
                names += [below(path, str(name)) for name in filesystem.find(f"{path}/{folder}", maxdepth=1)]
    return tuple(names)
