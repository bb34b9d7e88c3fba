"""Records of finished work: JSON objects with a checksum, and the check of the files they name.

A damaged record counts as missing, so the work that it records is done again.
"""

import hashlib
import json
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from rebeca_ray.errors import DamagedFilesError, Failure, describe
from rebeca_ray.storage.filesystem import join, open_filesystem, unreadable
from rebeca_ray.storage.objects import JsonObject, encode_json, write_json
from rebeca_ray.storage.store import classify, failure_types

log = logging.getLogger(__name__)

CHECKSUM = "checksum"
THREADS = 16
BLOCK = 2**24  # bytes that are hashed at a time
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class FileRecord(Protocol):
    """The path of a written file, its size and its checksum."""

    @property
    def path(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class ListedFile:
    """A file as a file list names it."""

    path: str
    bytes: int
    sha256: str


def write_record(values: JsonObject, uri: str) -> None:
    """Write an object with its checksum. A reader sees the old one or the new one, never a part."""
    write_json({**values, CHECKSUM: checksum_of(values)}, uri)


def read_record(uri: str) -> JsonObject | None:
    """Return the object that `write_record` wrote; None, after a warning, for a damaged one.

    Returns None for a missing one too. Raises UserError for a store that does not answer.
    """
    filesystem, path = open_filesystem(uri)
    try:
        data = filesystem.cat_file(path)
    except MISSING:
        return None
    except failure_types() as error:
        raise unreadable(uri, error) from None
    try:
        values: JsonObject = json.loads(data)
        if values.pop(CHECKSUM) == checksum_of(values):
            return values
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
        pass  # not JSON, or not an object with a checksum
    log.warning(f"{uri}: is damaged; its work is done again")
    return None


def checksum_of(values: JsonObject) -> str:
    return hashlib.sha256(encode_json(values)).hexdigest()


def damage_of(root: str, file: FileRecord, *, hashed: bool = True) -> str | None:
    """Return the difference between a file below `root` and its record; None if there is none.

    Without `hashed`, only presence and size are compared. Raises UserError for a store that does not answer.
    """
    uri = join(root, file.path)
    filesystem, path = open_filesystem(uri)
    try:
        size = filesystem.info(path)["size"]
        if size != file.bytes:
            return f"has {size:,} bytes, expected {file.bytes:,}"
        if hashed and sha256_of(uri) != file.sha256:
            return "its sha256 is not the recorded one"
    except MISSING:
        return "is missing"
    except failure_types() as error:
        raise unreadable(uri, error) from None
    return None


def sha256_of(uri: str) -> str:
    """Return the checksum of a file, read block by block."""
    filesystem, path = open_filesystem(uri)
    digest = hashlib.sha256()
    with filesystem.open(path, "rb", block_size=BLOCK) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def damage_among(root: str, files: Iterable[FileRecord], *, hashed: bool = True) -> dict[str, str]:
    """Return the damage of some files below `root` by path."""

    def check(file: FileRecord) -> tuple[str, str | None]:
        return file.path, damage_of(root, file, hashed=hashed)

    with ThreadPoolExecutor(THREADS) as pool:
        return {path: reason for path, reason in pool.map(check, files) if reason}


def damaged_files(reasons: dict[str, str]) -> DamagedFilesError:
    """Return the error for files that are missing or damaged: the reasons by path."""
    path, reason = next(iter(reasons.items()))
    others = f" and {len(reasons) - 1} more files" if len(reasons) > 1 else ""
    message = f"{path}{others}: {reason}; expected the file as it was written; start again, it is redone"
    return DamagedFilesError(message, reasons)


def read_recorded(root: str, file: FileRecord, columns: list[str] | None = None) -> pa.Table:
    """Return a Parquet file below `root` after comparing it with its record.

    Raises DamagedFilesError for a file that differs, UserError for a store that does not answer.
    """
    uri = join(root, file.path)
    filesystem, path = open_filesystem(uri)
    try:
        data = filesystem.cat_file(path)
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise damaged_files({file.path: "its sha256 is not the recorded one"})
        return pq.read_table(pa.BufferReader(data), columns=columns)
    except MISSING:
        raise damaged_files({file.path: "is missing"}) from None
    except (pa.ArrowException, *failure_types()) as error:
        if classify(error) is Failure.DAMAGED:
            raise damaged_files({file.path: describe(error)}) from None
        raise unreadable(uri, error) from None


def read_columns(root: str, path: str, columns: list[str]) -> pa.Table:
    """Return columns of a Parquet file without reading the others, such as pixels.

    Raises DamagedFilesError for a damaged file, UserError for a store that does not answer.
    """
    uri = join(root, path)
    filesystem, inside = open_filesystem(uri)
    try:
        # Without a cache, so that exactly these columns are read.
        with filesystem.open(inside, "rb", cache_type="none") as file:
            return pq.read_table(file, columns=columns, page_checksum_verification=True)
    except MISSING:
        raise damaged_files({path: "is missing"}) from None
    except (pa.ArrowException, *failure_types()) as error:
        if classify(error) is Failure.DAMAGED:
            raise damaged_files({path: describe(error)}) from None
        raise unreadable(uri, error) from None


def listed(row: Any) -> ListedFile:
    """Return a row of `schemas.FILES` as a record."""
    return ListedFile(path=row["path"], bytes=row["bytes"], sha256=row["sha256"])
