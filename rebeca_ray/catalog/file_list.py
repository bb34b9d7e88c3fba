"""The list of a snapshot's files: write it, check it, or read all lists of a damaged snapshot."""

import hashlib
import re

import pyarrow as pa
import pyarrow.parquet as pq

from rebeca_ray import schemas
from rebeca_ray.catalog.layout import inside
from rebeca_ray.catalog.manifest import REPAIR, FileList, FileRow
from rebeca_ray.errors import Failure, InputError, StorageError, describe
from rebeca_ray.storage.filesystem import join, list_files, open_filesystem
from rebeca_ray.storage.parquet import read_table, write_table
from rebeca_ray.storage.store import classify, failure_types


def write_file_list(root: str, path: str, fencing_token: int, rows: list[FileRow]) -> FileList:
    """Write the file list of the snapshot in a folder below the root; return its entry in the manifest."""
    file = f"{path}/files-{fencing_token:06d}.parquet"
    table = pa.Table.from_pylist(rows, schema=schemas.FILES)
    return FileList(path=file, **write_table(table, join(root, file), row_group_size=10_000))


def read_file_list(root: str, path: str, files: FileList) -> pa.Table:
    """Return the file list (`schemas.FILES`) after comparing it with the checksum in the manifest.

    Raises InputError for a list that is missing or damaged, or that names a file outside the catalog.
    """
    try:
        filesystem, base = open_filesystem(root)
        data = filesystem.cat_file(join(base, files.path))
        if hashlib.sha256(data).hexdigest() == files.sha256:
            # One thread: a short command may end before pyarrow's threads do.
            table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
            return checked(table)
        reason = "its sha256 is not the manifest's"
    except (pa.ArrowException, *failure_types()) as error:
        reason = describe(error)
        if classify(error) not in (Failure.DAMAGED, Failure.MISSING):
            raise StorageError(
                f"catalog {root}: {files.path} cannot be read ({reason}); "
                "check the network and the credentials"
            ) from None
    except ValueError as error:
        reason = str(error)
    raise InputError(
        f"catalog {root}: the file list of snapshot {path} is missing or damaged ({reason}); "
        f"{REPAIR.format(path=path)}"
    )


def checked(files: pa.Table) -> pa.Table:
    """Return a file list. Raises ValueError for other columns, and for a file outside the catalog."""
    for field in schemas.FILES:
        kind = files.schema.field(field.name).type if field.name in files.column_names else "missing"
        if kind != field.type or (not field.nullable and files[field.name].null_count):
            raise ValueError(f"its column {field.name} is {kind} or has nulls, expected {field.type}")
    for path in files["path"].to_pylist():
        inside(path)
    return files


def read_all_lists(root: str, path: str) -> set[str]:
    """Return the files that a snapshot without a readable manifest may need: those in any list of its folder.

    Raises InputError if it has no list, or a damaged one.
    """
    lists = [uri for uri in list_files(join(root, path)) if re.search(r"/files-\d+\.parquet$", uri)]
    if not lists:
        raise InputError(f"catalog {root}: snapshot {path} has no file list; {REPAIR.format(path=path)}")
    return {file for uri in lists for file in read_table(uri, "file list", ["path"])["path"].to_pylist()}
