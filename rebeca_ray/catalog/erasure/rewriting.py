"""Rewrite the files of snapshots without some users: new files, then a new file list, then the manifest.

Old files stay until `sweep`. A reader therefore sees a snapshot as it was, or without the users.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.catalog.erasure.traces import (
    ERASED,
    ImageRows,
    Trace,
    damaged_file,
    pool_locations,
)
from rebeca_ray.catalog.file_list import write_file_list
from rebeca_ray.catalog.lease import Lease
from rebeca_ray.catalog.manifest import FileRow, manifest_version, write_manifest
from rebeca_ray.errors import DamagedFilesError
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.parquet import write_table
from rebeca_ray.storage.records import listed, read_recorded

ITEM_ROW_GROUP, IMAGE_ROW_GROUP = 2000, 100
REASON = "erased"  # the error of an erased row of an image file


@dataclass(kw_only=True)
class Rewriting:
    """The new files of one erasure, by the paths of the old ones. None: nothing is left of a file.

    Several snapshots may list a file. It is written once.
    """

    lease: Lease
    users: list[str]
    replaced: dict[str, FileRow | None] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def root(self) -> str:
        return self.lease.root.rstrip("/")

    def new_path(self, path: str) -> str:
        """Return a new name in the folder of a file."""
        folder = path.rpartition("/")[0]
        return f"{folder}/part-{self.lease.fencing_token:06d}-{next(self.numbers):04d}.parquet"

    def read(self, row: FileRow) -> pa.Table:
        try:
            return read_recorded(self.root, listed(row))
        except DamagedFilesError as error:
            raise damaged_file(self.root, error) from None

    def replace_table(self, row: FileRow) -> None:
        """Write a file of users' rows without those of the users to erase."""
        table = self.read(row)
        kept = table.filter(
            pc.invert(pc.is_in(table["user_id"], value_set=pa.array(self.users, pa.string())))
        )
        if not kept.num_rows:  # some readers stumble over a file without rows
            self.replaced[row["path"]] = None
            return
        path = self.new_path(row["path"])
        written = write_table(
            kept,
            join(self.root, path),
            row_group_size=ITEM_ROW_GROUP,
            embed_column="image_embeds" if row["table"] == "items" else None,
        )
        ends = pc.min_max(kept["user_id"]).as_py()
        new: FileRow = {
            **row,
            "path": path,
            **written,
            "min_user_id": ends["min"],
            "max_user_id": ends["max"],
        }
        self.replaced[row["path"]] = new

    def replace_images(self, images: ImageRows) -> None:
        """Write an image file with empty rows for those to erase, so that all others keep their number."""
        row = images.file
        if images.erased is None:
            self.replaced[row["path"]] = None
            return
        path = self.new_path(row["path"])
        table = with_empty_rows(self.read(row), images.erased)
        written = write_table(table, join(self.root, path), row_group_size=IMAGE_ROW_GROUP)
        self.replaced[row["path"]] = {**row, "path": path, **written}

    def replace_manifest(self, trace: Trace) -> bool:
        """Write file list and manifest of a snapshot, if its files changed. Return whether they did."""
        snapshot = trace.snapshot
        before: list[FileRow] = snapshot.files.to_pylist()
        lost = trace.lost_rows(pool_locations(snapshot))
        rows: list[FileRow] = []
        for row in before:
            new = self.replaced.get(row["path"], row)
            if new is None:
                continue
            if row["table"] == "images":
                live = row.get("live_rows")
                new = {**new, "live_rows": None if live is None else live - lost[row["file"]]}
            rows.append({**new, "table": row["table"], "bucket": row["bucket"], "file": row["file"]})
        if rows == before:
            return False
        manifest = snapshot.manifest
        files = write_file_list(self.root, snapshot.path, self.lease.fencing_token, rows)
        manifest = manifest.model_copy(
            update={
                "counts": trace.counts,
                "bytes": sum(row["bytes"] for row in rows),
                "bytes_written": sum(
                    row["bytes"] for row in rows if f"run_id={manifest.run_id}/" in row["path"]
                ),
                "files": files,
            }
        )
        version = manifest_version(join(self.root, snapshot.path, "manifest.json"))
        self.lease.check()
        write_manifest(manifest, self.root, version)
        return True


def with_empty_rows(images: pa.Table, erased: np.ndarray) -> pa.Table:
    """Return images without the content of some rows: no item, no image, no seed, an error."""
    rows = pa.array(np.arange(images.num_rows), mask=erased)
    emptied = images.take(rows)
    columns = {
        "item_id": pc.fill_null(emptied["item_id"], ERASED),
        "seed": pc.fill_null(emptied["seed"], 0),
        "error": pc.if_else(pa.array(erased), REASON, emptied["error"]),
    }
    return pa.table([columns.get(name, emptied[name]) for name in images.column_names], schema=images.schema)
