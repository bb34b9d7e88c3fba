"""Reading a published snapshot: pointer, manifest, file list, files; no prefix is ever listed."""

import math
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from rebeca_ray import schemas
from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.errors import UserError
from rebeca_ray.identity import bucket_of
from rebeca_ray.schemas import SCHEMA_VERSION
from rebeca_ray.storage import arrow_filesystem, join, open_filesystem, read_json, read_table


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One published snapshot, pinned: what is published later does not change what it reads."""

    root: str
    path: str  # its folder, below the root
    manifest: dict[str, Any]
    files: pa.Table  # schemas.FILES

    def paths(self, table: str, buckets: set[int] | None = None) -> list[str]:
        """The files of a table, of all buckets or of some, in the order of their number, below the root."""
        chosen = self.files.filter(pc.equal(self.files["table"], table)).sort_by("file")
        if buckets is not None:
            chosen = chosen.filter(pc.is_in(chosen["bucket"], value_set=pa.array(sorted(buckets), pa.int32())))
        return list(chosen["path"].to_pylist())

    def table(
        self, name: str, columns: list[str] | None = None, filter: pc.Expression | None = None, buckets: set[int] | None = None
    ) -> pa.Table:
        """Rows of one of the snapshot's tables in memory."""
        filesystem, root = open_filesystem(self.root)
        files = [join(root, path) for path in self.paths(name, buckets)]
        if not files:  # of errors and changes, when everything was carried over
            empty = schemas.table(name, self.manifest["embed_dim"]).empty_table()
            return empty if columns is None else empty.select(columns)
        dataset = pyarrow.dataset.dataset(files, filesystem=arrow_filesystem(filesystem), format="parquet")
        return dataset.to_table(columns=columns, filter=filter)

    def bucket(self, name: str, bucket: int, num_buckets: int, columns: list[str] | None = None) -> pa.Table | None:
        """Rows of the users of one of `num_buckets` buckets; None if the snapshot has no such table.

        Other files are read only where the snapshot was cut into another number of buckets.
        """
        own = self.files.filter(pc.equal(self.files["table"], name))
        if own.num_rows == 0:
            return None
        same = self.manifest["num_buckets"] == num_buckets
        step = math.gcd(self.manifest["num_buckets"], num_buckets)  # both are the same hash, modulo
        own = own.filter(pa.array([other % step == bucket % step for other in own["bucket"].to_pylist()], pa.bool_()))
        read = None if columns is None else [*dict.fromkeys([*columns, "user_id"])]
        tables = []
        for path in own["path"].to_pylist():
            table = read_table(join(self.root, path), "catalog", read)
            if not same:
                table = table.filter(
                    pa.array([bucket_of(user, num_buckets) == bucket for user in table["user_id"].to_pylist()], pa.bool_())
                )
            tables.append(table)
        if not tables:
            return None
        table = pa.concat_tables(tables)
        return table if columns is None else table.select(columns)

    def items(self, columns: list[str] | None = None, user_ids: list[str] | None = None) -> pa.Table:
        """Items, of all users or of some, sorted by user and rank; without pixels.

        Raises TypeError for a single name in place of the list, which would be taken for a list of letters.
        """
        if isinstance(user_ids, str):
            raise TypeError(f"user_ids is the string {user_ids!r}; give a list of users, [{user_ids!r}]")
        if user_ids is None:
            return self.table("items", columns)
        num_buckets = self.manifest["num_buckets"]
        buckets = {bucket_of(user, num_buckets) for user in user_ids}
        return self.table("items", columns, pc.field("user_id").isin(user_ids), buckets)

    def images(self, items: pa.Table) -> list[bytes]:
        """The encoded images of rows of `items`, in their order; reads only the row groups that hold them."""
        filesystem, root = open_filesystem(self.root)
        images = self.files.filter(pc.equal(self.files["table"], "images"))
        path_of = dict(zip(images["file"].to_pylist(), images["path"].to_pylist(), strict=True))
        wanted: dict[int, dict[int, list[int]]] = {}
        for place, (file, row) in enumerate(zip(items["image_file"].to_pylist(), items["image_row"].to_pylist(), strict=True)):
            wanted.setdefault(file, {}).setdefault(row, []).append(place)
        found: list[bytes] = [b""] * items.num_rows
        for file, rows in wanted.items():
            with filesystem.open(join(root, path_of[file]), "rb") as handle:
                parquet = pq.ParquetFile(handle)
                start = 0
                for group in range(parquet.num_row_groups):
                    stop = start + parquet.metadata.row_group(group).num_rows
                    inside = [row for row in rows if start <= row < stop]
                    if inside:
                        column = parquet.read_row_group(group, columns=["image"])["image"]
                        for row in inside:
                            image = column[row - start]["bytes"].as_py()
                            for place in rows[row]:
                                found[place] = image
                    start = stop
        return found


def published(root: str) -> Snapshot | None:
    """The snapshot `latest.json` points to, or None before the first publication."""
    pointer, _ = read_pointer(root)
    return open_snapshot(root, pointer.snapshot) if pointer.snapshot else None


def read_catalog(root: str) -> Snapshot:
    """The published snapshot of the catalog at `root`. Raises UserError if there is none."""
    snapshot = published(root)
    if snapshot is None:
        raise UserError(f"catalog {root}: nothing is published there (no latest.json); run `rebeca generate`, or give another root")
    return snapshot


def open_snapshot(root: str, path: str) -> Snapshot:
    """One snapshot by its folder below the root. Raises UserError if it is gone or newer than this version reads."""
    manifest = read_json(join(root, path, "manifest.json"))
    if manifest is None:
        raise UserError(f"catalog {root}: snapshot {path} has no manifest.json; it was removed or never finished")
    if manifest["schema_version"] > SCHEMA_VERSION:
        raise UserError(
            f"catalog {root}: schema version {manifest['schema_version']}, this version reads {SCHEMA_VERSION}; upgrade rebeca-ray"
        )
    return Snapshot(root=root, path=path, manifest=manifest, files=read_table(join(root, manifest["files"]["path"]), "catalog"))
