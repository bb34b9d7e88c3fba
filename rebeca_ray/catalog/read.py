"""Read a published snapshot: pointer, manifest, file list, files. No prefix is ever listed.

A snapshot is pinned: it never changes, whatever is published after it. It can be read until it is collected.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from rebeca_ray import schemas
from rebeca_ray.catalog.file_list import read_file_list
from rebeca_ray.catalog.manifest import Manifest, read_manifest
from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.catalog.read_errors import check_columns, explained, sorted_users
from rebeca_ray.catalog.row_groups import EncodedImage, complete, read_users
from rebeca_ray.catalog.user_files import File, UserFiles
from rebeca_ray.config.fields import absolute
from rebeca_ray.errors import InputError
from rebeca_ray.identity import bucket_of
from rebeca_ray.inline import Images, figures_html
from rebeca_ray.storage.filesystem import exists, join
from rebeca_ray.storage.parquet import PARQUET
from rebeca_ray.storage.store import failure_types, open_store

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    import ray.data

THREADS = 16


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One published snapshot.

    Every method raises InputError for a snapshot that was collected meanwhile, and for a file that is missing
    or damaged. Lazy reads (`dataset`, `to_ray`) then raise what their library raises.
    """

    root: str
    path: str  # its folder, below the root
    manifest: Manifest
    files: pa.Table  # schemas.FILES

    @property
    def run_id(self) -> str:
        """The run that made the snapshot."""
        return self.manifest.run_id

    @property
    def num_buckets(self) -> int:
        return self.manifest.num_buckets

    def refresh(self) -> Snapshot:
        """Return the snapshot that is published now: this very one if nothing was published since.

        Reads `latest.json` alone. A snapshot from which somebody was erased is opened again.
        """
        pointer, _ = read_pointer(self.root)
        if pointer.snapshot == self.path and pointer.rewritten <= self.manifest.files.fencing_token:
            return self
        if pointer.snapshot is None:
            raise nothing_published(self.root)
        return open_snapshot(self.root, pointer.snapshot)

    def for_user(self, user_id: str, columns: list[str] | None = None) -> pa.Table:
        """Return a user's items by `rank`, best first; no rows for an unknown user.

        The rank weighs like probability against diversity. Reads one or two row groups of one file: with
        2,000 items per group, about 100 kB without `image_embeds`. `for_user("")` returns the population
        pool, which all cold-start users share.
        """
        return self.items(columns, [user_id])

    def items(self, columns: list[str] | None = None, user_ids: Sequence[str] | None = None) -> pa.Table:
        """Return items without pixels, of all users or of some.

        Items of some users are sorted by user and rank. Items of all users are sorted so within each bucket.
        """
        return self.table("items", columns, user_ids)

    def table(
        self, name: str = "items", columns: list[str] | None = None, user_ids: Sequence[str] | None = None
    ) -> pa.Table:
        """Return rows of one table in memory: `items`, `images`, `users`, `errors` or `changes`.

        Raises InputError for an unknown table or column, and for `user_ids` with `images`, which has no
        users.
        """
        columns = check_columns(self, name, columns)
        if user_ids is None:
            return self.read_files(name, self.paths(name), columns)
        users = sorted_users(name, user_ids)
        order = [column for column in ("user_id", "rank") if column in self.schema(name).names]
        read = None if columns is None else [*dict.fromkeys([*columns, *order])]
        candidates = self.user_files.files_with(name, users)

        def rows(file: File, users_of_file: list[str]) -> pa.Table:
            stored = self.stored_names(name, read)
            with explained(self, file.path):
                table = read_users(self.root, file.path, file.bytes, users_of_file, stored)
                return self.renamed(name, complete(table, self.stored_schema(name), stored))

        if len(candidates) > 1:
            with ThreadPoolExecutor(THREADS) as pool:
                tables = list(pool.map(rows, *zip(*candidates, strict=True)))
        else:
            tables = [rows(file, users_of_file) for file, users_of_file in candidates]
        empty = self.schema(name).empty_table()
        table = pa.concat_tables(tables) if tables else empty if read is None else empty.select(read)
        table = table.sort_by([(column, "ascending") for column in order])
        return table if columns is None else table.select(columns)

    def to_pandas(
        self, name: str = "items", columns: list[str] | None = None, user_ids: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """Return rows of one table as a pandas DataFrame. Integer columns without nulls stay integers."""
        return self.table(name, columns, user_ids).to_pandas()

    def to_polars(
        self, name: str = "items", columns: list[str] | None = None, user_ids: Sequence[str] | None = None
    ) -> pl.DataFrame:
        """Return rows of one table as a Polars DataFrame. Raises InputError where Polars is not installed."""
        try:
            import polars as pl
        except ImportError:
            raise InputError("to_polars: Polars is not installed; pip install 'rebeca-ray[polars]'") from None
        frame = pl.from_arrow(self.table(name, columns, user_ids))
        assert isinstance(frame, pl.DataFrame)
        return frame

    def dataset(self, name: str = "items", user_ids: Sequence[str] | None = None) -> pyarrow.dataset.Dataset:
        """Return a table as a lazy pyarrow dataset. `user_ids` skips whole files.

        Columns have the names that the files have; only those of `users` differ in version 3.
        """
        check_columns(self, name, None)
        if user_ids is None:
            return self.dataset_of(name, self.paths(name))
        users = sorted_users(name, user_ids)
        dataset = self.dataset_of(name, [file.path for file, _ in self.user_files.files_with(name, users)])
        return dataset.filter(pc.field("user_id").isin(pa.array(users, pa.string())))

    def dataset_of(self, name: str, paths: list[str]) -> pyarrow.dataset.Dataset:
        """Return some files of a table as a dataset. Columns that are younger than a file are null there."""
        store = open_store(self.root)
        scan = store.scan_filesystem()
        # Arrow would believe an answer of the store that is cut off, and call an intact file damaged.
        files = self.files.filter(pc.is_in(self.files["path"], value_set=pa.array(paths, pa.string())))
        sizes = dict(zip(files["path"].to_pylist(), files["bytes"].to_pylist(), strict=True))
        fragments = [
            PARQUET.make_fragment(join(store.path, path), scan, file_size=sizes[path]) for path in paths
        ]
        return pyarrow.dataset.FileSystemDataset(fragments, self.stored_schema(name), PARQUET, scan)

    def read_files(self, name: str, paths: list[str], columns: list[str] | None) -> pa.Table:
        """Return all rows of some files of a table. Raises InputError naming the file that cannot be read."""
        stored = self.stored_names(name, columns)
        try:
            return self.renamed(name, self.dataset_of(name, paths).to_table(columns=stored))
        except (pa.ArrowException, *failure_types()):
            # Arrow does not say which file failed: read them one by one, so that the error names it.
            with explained(self):
                if not exists(join(self.root, self.path, "manifest.json")):
                    raise FileNotFoundError(self.path) from None
            for path in paths:
                with explained(self, path):
                    self.dataset_of(name, [path]).to_table(columns=stored)
            with explained(self):
                raise

    def to_ray(
        self, name: str = "items", columns: list[str] | None = None, user_ids: Sequence[str] | None = None
    ) -> ray.data.Dataset:
        """Return a table as a Ray Dataset, read in parallel file by file. `user_ids` skips whole files."""
        import ray.data

        columns = check_columns(self, name, columns)
        users = None if user_ids is None else sorted_users(name, user_ids)
        paths = (
            self.paths(name)
            if users is None
            else [file.path for file, _ in self.user_files.files_with(name, users)]
        )
        if not paths or self.stored_schema(name) != self.schema(name):
            return ray.data.from_arrow(self.table(name, columns, users))
        store = open_store(self.root)
        files, schema = [join(store.path, path) for path in paths], self.schema(name)
        scan = store.scan_filesystem()
        rows = ray.data.read_parquet(files, filesystem=scan, partitioning=None, schema=schema)
        names = columns or self.schema(name).names
        if users is None:
            return rows.select_columns(names)
        rows = rows.select_columns([*dict.fromkeys([*names, "user_id"])])
        return rows.map_batches(
            lambda batch: batch.filter(pc.is_in(batch["user_id"], pa.array(users))).select(names),
            batch_format="pyarrow",
        )

    def uris(self, name: str = "items") -> list[str]:
        """Return the addresses of a table's files, for any other reader; see infra/docs/catalog-format.md."""
        check_columns(self, name, None)
        return [join(self.root, path) for path in self.paths(name)]

    def images(self, items: pa.Table) -> list[bytes]:
        """Return the encoded images of rows of `items`, in their order.

        Reads only the row groups that hold them.

        `items` needs the columns `image_file` and `image_row`. With `item_id` too, items of another snapshot
        raise InputError.
        """
        return [image["bytes"] for image in self.named_images(items)]

    def named_images(self, items: pa.Table) -> list[EncodedImage]:
        """Return images as `images` does, each with its `bytes` and its `path`.

        The path's suffix is the encoding.
        """
        from rebeca_ray.catalog.images import read_images

        return read_images(self, items)

    def show(self, user_ids: Sequence[str] | None = None) -> Images:
        """Return items of users with their images, which a notebook shows; without users, the first items.

        `rr.read_catalog("s3://bucket/catalog").show(["ann", "ben"])` is a grid of at most 60 images.

        Those of more items are left out. `images` returns the images of any rows of `items`.
        """
        from rebeca_ray.catalog.images import show_items

        return show_items(self, user_ids)

    def __repr__(self) -> str:
        return f"Snapshot of run {self.run_id} in {self.root}"

    def _repr_html_(self) -> str:
        return figures_html(repr(self), self.manifest.counts.model_dump()) + self.show()._repr_html_()

    def changed_users(self, since: str) -> list[str]:
        """Return the users with other items than in the snapshot of run `since`, sorted.

        Users who left are among them. A copy of the catalog that replaces the items of these users equals a
        reload in all but `origin`, which says of every item whether it is of this night. Raises InputError if
        this snapshot does not follow that one, or one in between is gone.
        """
        changed: set[str] = set()
        for snapshot in self.back_to(since):
            changed.update(snapshot.table("changes", ["user_id"])["user_id"].unique().to_pylist())
        return sorted(changed)

    def back_to(self, since: str) -> list[Snapshot]:
        """Return this snapshot and those before it, up to run `since`, which is left out.

        Raises InputError if one of them is gone.
        """
        snapshots, snapshot = [], self
        while snapshot.run_id != since:
            before = snapshot.manifest.previous_path
            if before is None or not exists(join(self.root, before, "manifest.json")):
                raise InputError(
                    f"catalog {self.root}: run {self.run_id} does not follow run {since!r}, "
                    "or a snapshot in between was collected (`rebeca catalog list` shows what there is); "
                    "load this one as a whole"
                )
            snapshots.append(snapshot)
            snapshot = open_snapshot(self.root, before)
        return snapshots

    def paths(self, name: str, buckets: set[int] | None = None) -> list[str]:
        """Return the files of a table by number, of all buckets or of some, below the root."""
        chosen = self.files.filter(pc.equal(self.files["table"], name)).sort_by("file")
        if buckets is not None:
            numbers = pa.array(sorted(buckets), pa.int32())
            chosen = chosen.filter(pc.is_in(chosen["bucket"], value_set=numbers))
        return list(chosen["path"].to_pylist())

    def only(self, *names: str) -> Snapshot:
        """Return this snapshot with the files of some tables alone: it is cheaper to send to a Ray task."""
        chosen = pc.is_in(self.files["table"], value_set=pa.array(names, pa.string()))
        return replace(self, files=self.files.filter(chosen).combine_chunks())

    def bucket_files(self, name: str, bucket: int, num_buckets: int) -> pa.Table:
        """Return the rows of `schemas.FILES` that may hold users of one of `num_buckets` buckets."""
        files = self.files.filter(pc.equal(self.files["table"], name))
        step = math.gcd(self.num_buckets, num_buckets)  # both are the same hash, modulo
        return files.filter(pa.array(files["bucket"].to_numpy() % step == bucket % step))

    def bucket(
        self,
        name: str,
        bucket: int,
        num_buckets: int,
        columns: list[str] | None = None,
        *,
        without: Collection[str] = (),
    ) -> pa.Table:
        """Return rows of the users of one of `num_buckets` buckets, but for those in the files `without`.

        Reads files of other buckets only where the snapshot was cut into another number of buckets.
        """
        paths = self.bucket_files(name, bucket, num_buckets)["path"].to_pylist()
        read = None if columns is None else [*dict.fromkeys([*columns, "user_id"])]
        table = self.read_files(name, [path for path in paths if path not in without], read)
        if self.num_buckets != num_buckets:
            inside = [bucket_of(user, num_buckets) == bucket for user in table["user_id"].to_pylist()]
            table = table.filter(pa.array(inside, pa.bool_()))
        return table if columns is None else table.select(columns)

    def schema(self, name: str) -> pa.Schema:
        """Return the columns of a table, under the names of the current version."""
        return schemas.table(name, self.manifest.embed_dim)

    def stored_schema(self, name: str) -> pa.Schema:
        """Return the columns of a table under the names in this snapshot's files."""
        return schemas.table(name, self.manifest.embed_dim, self.manifest.schema_version)

    def stored_names(self, name: str, columns: list[str] | None) -> list[str] | None:
        """Return the names in this snapshot's files of some current columns."""
        names = dict(zip(self.schema(name).names, self.stored_schema(name).names, strict=True))
        return None if columns is None else [names[column] for column in columns]

    def renamed(self, name: str, table: pa.Table) -> pa.Table:
        """Return a table as its files have it under the current column names."""
        names = dict(zip(self.stored_schema(name).names, self.schema(name).names, strict=True))
        return table.rename_columns([names[column] for column in table.column_names])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out everything derived from the file list: it is large, and a Ray task needs little of it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def user_files(self) -> UserFiles:
        """The files of every table with users, to find those of some users."""
        return UserFiles.of(self.files, self.num_buckets)

    @cached_property
    def image_files(self) -> dict[int, tuple[str, int]]:
        """Path and size of the image files by their number."""
        images = self.files.filter(pc.equal(self.files["table"], "images"))
        locations = zip(images["path"].to_pylist(), images["bytes"].to_pylist(), strict=True)
        return dict(zip(images["file"].to_pylist(), locations, strict=True))


def published(root: str) -> Snapshot | None:
    """Return the snapshot that `latest.json` points to, or None before the first publication."""
    root = str(root or "")  # a Path is accepted too
    if not root:
        raise InputError("catalog: its root is empty; give a path, or s3://bucket/prefix")
    pointer, _ = read_pointer(root)
    return open_snapshot(root, pointer.snapshot) if pointer.snapshot else None


def read_catalog(root: str) -> Snapshot:
    """Return the published snapshot of the catalog at `root`, a local path or `s3://bucket/prefix`.

    Raises InputError if there is none.
    """
    snapshot = published(root)
    if snapshot is None:
        raise nothing_published(root)
    return snapshot


def nothing_published(root: str) -> InputError:
    return InputError(
        f"catalog {root}: nothing is published there; give another root, wait for the first run to end, "
        "or publish one of the snapshots that `rebeca catalog list` shows"
    )


def open_snapshot(root: str, path: str) -> Snapshot:
    """Return one snapshot by its folder below the root. Raises InputError as `read_manifest` does."""
    manifest = read_manifest(root, path)
    try:
        files = read_file_list(root, path, manifest.files)
    except InputError:
        before, manifest = manifest, read_manifest(root, path)
        if manifest.files == before.files:
            raise
        files = read_file_list(root, path, manifest.files)  # somebody was erased in between
    return Snapshot(root=absolute(root).rstrip("/"), path=path, manifest=manifest, files=files)
