"""Reading a published snapshot: pointer, manifest, file list, files; no prefix is ever listed.

A snapshot is pinned: it never changes, whatever is published after it. It can be read until it is collected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from rebeca_ray import schemas
from rebeca_ray.catalog.manifest import read_file_list, read_manifest
from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.catalog.row_groups import complete, read_users
from rebeca_ray.config.fields import absolute
from rebeca_ray.errors import Failure, InputError, StorageError, UserError, describe, did_you_mean
from rebeca_ray.identity import bucket_of
from rebeca_ray.storage.filesystem import exists, join
from rebeca_ray.storage.parquet import PARQUET
from rebeca_ray.storage.store import classify, failure_types, open_store

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    import ray.data

THREADS = 16
TABLES = ("items", "images", "users", "errors", "changes")
SURROGATE = re.compile("[\ud800-\udfff]")


class File(NamedTuple):
    """One file of a table: its path below the root, its size, and the users it goes from and to (None: it has no rows)."""

    path: str
    bytes: int
    first_user: str | None
    last_user: str | None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One published snapshot.

    Every method raises UserError for a snapshot that was collected meanwhile, and for a file that is missing or damaged; what is read
    lazily (`dataset`, `to_ray`) then raises what its library does.
    """

    root: str
    path: str  # its folder, below the root
    manifest: dict[str, Any]
    files: pa.Table  # schemas.FILES

    @property
    def run_id(self) -> str:
        """The run that made it."""
        return str(self.manifest["run_id"])

    def refresh(self) -> Snapshot:
        """The snapshot that is published now: this very one if nothing was published since. Asks for `latest.json` alone."""
        pointer, _ = read_pointer(self.root)
        if pointer.snapshot == self.path:
            return self
        if pointer.snapshot is None:
            raise nothing_published(self.root)
        return open_snapshot(self.root, pointer.snapshot)

    def for_user(self, user_id: str, columns: list[str] | None = None) -> pa.Table:
        """A user's items by `rank`, which weighs how much they are liked and how much they differ; none for a user who is not there.

        Reads one or two row groups of one file: with some 2,000 items a group, about 100 kB without `image_embeds`. `for_user("")` are
        the items that all users without a history share, if there are such users.
        """
        return self.items(columns, [user_id])

    def items(self, columns: list[str] | None = None, user_ids: Sequence[str] | None = None) -> pa.Table:
        """Items, of all users or of some, without pixels. Of some: sorted by user and rank; of all: sorted so within a bucket."""
        return self.table("items", columns, user_ids)

    def table(
        self, name: str = "items", columns: list[str] | None = None, user_ids: Sequence[str] | None = None
    ) -> pa.Table:
        """Rows of one of the snapshot's tables in memory: `items`, `images`, `users`, `errors` or `changes`.

        Raises UserError for an unknown table or column, and for users of `images`, which has none.
        """
        columns = self.checked(name, columns)
        if user_ids is None:
            return self.read_files(name, self.paths(name), columns)
        users = self.sorted_users(name, user_ids)
        order = [column for column in ("user_id", "rank") if column in self.schema(name).names]
        read = None if columns is None else [*dict.fromkeys([*columns, *order])]
        wanted = self.files_with(name, users)

        def rows(file: File, own: list[str]) -> pa.Table:
            with self.explained(file.path):
                return complete(
                    read_users(self.root, file.path, file.bytes, own, read), self.schema(name), read
                )

        if len(wanted) > 1:
            with ThreadPoolExecutor(THREADS) as pool:
                tables = list(pool.map(rows, *zip(*wanted, strict=True)))
        else:
            tables = [rows(file, own) for file, own in wanted]
        empty = self.schema(name).empty_table()
        found = pa.concat_tables(tables) if tables else empty if read is None else empty.select(read)
        found = found.sort_by([(column, "ascending") for column in order])
        return found if columns is None else found.select(columns)

    def to_pandas(
        self, name: str = "items", columns: list[str] | None = None, user_ids: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """The same as a pandas DataFrame; integers stay integers where nothing is missing."""
        return self.table(name, columns, user_ids).to_pandas()

    def to_polars(
        self, name: str = "items", columns: list[str] | None = None, user_ids: Sequence[str] | None = None
    ) -> pl.DataFrame:
        """The same as a Polars DataFrame. Raises UserError where Polars is not installed."""
        try:
            import polars as pl
        except ImportError:
            raise InputError("to_polars: Polars is not installed; pip install 'rebeca-ray[polars]'") from None
        found = pl.from_arrow(self.table(name, columns, user_ids))
        assert isinstance(found, pl.DataFrame)
        return found

    def dataset(self, name: str = "items", user_ids: Sequence[str] | None = None) -> pyarrow.dataset.Dataset:
        """A table as a pyarrow dataset, of which columns and rows are selected when it is read. `user_ids` leaves out whole files."""
        self.checked(name, None)
        if user_ids is None:
            return self.dataset_of(name, self.paths(name))
        users = self.sorted_users(name, user_ids)
        dataset = self.dataset_of(name, [file.path for file, _ in self.files_with(name, users)])
        return dataset.filter(pc.field("user_id").isin(pa.array(users, pa.string())))

    def dataset_of(self, name: str, paths: list[str]) -> pyarrow.dataset.Dataset:
        """Some files of a table. A column that came after one of them was written is null there."""
        store = open_store(self.root)
        files = [join(store.path, path) for path in paths]
        return pyarrow.dataset.dataset(
            files, schema=self.schema(name), filesystem=store.scan_filesystem(), format=PARQUET
        )

    def read_files(self, name: str, paths: list[str], columns: list[str] | None) -> pa.Table:
        """All rows of some files of a table. If one cannot be read, it is looked for and named."""
        try:
            return self.dataset_of(name, paths).to_table(columns=columns)
        except (pa.ArrowException, *failure_types()):
            with self.explained():
                if not exists(join(self.root, self.path, "manifest.json")):
                    raise FileNotFoundError(self.path) from None
            for path in paths:
                with self.explained(path):
                    self.dataset_of(name, [path]).to_table(columns=columns)
            with self.explained():
                raise

    def to_ray(
        self, name: str = "items", columns: list[str] | None = None, user_ids: Sequence[str] | None = None
    ) -> ray.data.Dataset:
        """A table as a Ray Dataset, which reads it in parallel, file by file; of users those files that they may be in."""
        import ray.data

        columns = self.checked(name, columns)
        users = None if user_ids is None else self.sorted_users(name, user_ids)
        paths = self.paths(name) if users is None else [file.path for file, _ in self.files_with(name, users)]
        if not paths:
            return ray.data.from_arrow(self.table(name, columns, users))
        store = open_store(self.root)
        files = [join(store.path, path) for path in paths]
        found = ray.data.read_parquet(
            files, filesystem=store.scan_filesystem(), partitioning=None, schema=self.schema(name)
        )
        names = columns or self.schema(name).names
        if users is None:
            return found.select_columns(names)
        found = found.select_columns([*dict.fromkeys([*names, "user_id"])])
        return found.map_batches(
            lambda rows: rows.filter(pc.is_in(rows["user_id"], pa.array(users))).select(names),
            batch_format="pyarrow",
        )

    def uris(self, name: str = "items") -> list[str]:
        """Where a table's files are, for any other reader; see infra/catalog-format.md."""
        self.checked(name, None)
        return [join(self.root, path) for path in self.paths(name)]

    def images(self, items: pa.Table) -> list[bytes]:
        """The encoded images of rows of `items`, in their order; reads only the row groups that hold them.

        `items` needs the columns `image_file` and `image_row`. Raises UserError for items of another snapshot, if they have `item_id` too.
        """
        return [image["bytes"] for image in self.named_images(items)]

    def named_images(self, items: pa.Table) -> list[dict[str, Any]]:
        """The same, each with its `bytes` and its `path`: a file name whose ending says how it is encoded."""
        from rebeca_ray.catalog.images import read_images

        return read_images(self, items)

    def changed_users(self, since: str, bucket: int | None = None) -> list[str]:
        """Users, of all buckets or of one, whose items are not what they were in the snapshot of run `since`; sorted.

        Those who left are among them. Who keeps a copy of the catalog replaces the items of these users, and has what a reload would
        give: all but `origin`, which says of every item whether it is of this night. Raises UserError if this snapshot does not follow
        that one, or one in between is gone.
        """
        changed: set[str] = set()
        for snapshot in self.back_to(since):
            if bucket is None:
                changes = snapshot.table("changes", ["user_id"])
            else:
                changes = snapshot.bucket("changes", bucket, self.manifest["num_buckets"], ["user_id"])
            changed.update(changes["user_id"].unique().to_pylist())
        return sorted(changed)

    def back_to(self, since: str) -> list[Snapshot]:
        """This snapshot and those before it, without the one of run `since`. Raises UserError if one of them is gone."""
        found, snapshot = [], self
        while snapshot.run_id != since:
            before = snapshot.manifest["previous_path"]
            if before is None or not exists(join(self.root, before, "manifest.json")):
                raise InputError(
                    f"catalog {self.root}: run {self.run_id} does not follow run {since!r}, or a snapshot in between was collected "
                    "(`rebeca catalog list` shows what there is); load this one as a whole"
                )
            found.append(snapshot)
            snapshot = open_snapshot(self.root, before)
        return found

    def paths(self, name: str, buckets: set[int] | None = None) -> list[str]:
        """The files of a table, of all buckets or of some, in the order of their number, below the root."""
        chosen = self.files.filter(pc.equal(self.files["table"], name)).sort_by("file")
        if buckets is not None:
            chosen = chosen.filter(
                pc.is_in(chosen["bucket"], value_set=pa.array(sorted(buckets), pa.int32()))
            )
        return list(chosen["path"].to_pylist())

    def bucket(self, name: str, bucket: int, num_buckets: int, columns: list[str] | None = None) -> pa.Table:
        """Rows of the users of one of `num_buckets` buckets.

        Other files are read only where the snapshot was cut into another number of buckets.
        """
        own = self.files.filter(pc.equal(self.files["table"], name))
        same = self.manifest["num_buckets"] == num_buckets
        step = math.gcd(self.manifest["num_buckets"], num_buckets)  # both are the same hash, modulo
        own = own.filter(
            pa.array([other % step == bucket % step for other in own["bucket"].to_pylist()], pa.bool_())
        )
        read = None if columns is None else [*dict.fromkeys([*columns, "user_id"])]
        table = self.read_files(name, own["path"].to_pylist(), read)
        if not same:
            table = table.filter(
                pa.array(
                    [bucket_of(user, num_buckets) == bucket for user in table["user_id"].to_pylist()],
                    pa.bool_(),
                )
            )
        return table if columns is None else table.select(columns)

    def schema(self, name: str) -> pa.Schema:
        """The columns of a table in this snapshot."""
        return schemas.table(name, self.manifest["embed_dim"])

    def __getstate__(self) -> dict[str, Any]:
        """Without what is derived from the file list: it is large, and a Ray task asks for little of it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def image_files(self) -> dict[int, tuple[str, int]]:
        """Path and size of the image files by their number."""
        images = self.files.filter(pc.equal(self.files["table"], "images"))
        places = zip(images["path"].to_pylist(), images["bytes"].to_pylist(), strict=True)
        return dict(zip(images["file"].to_pylist(), places, strict=True))

    @cached_property
    def files_of_buckets(self) -> dict[tuple[str, int], list[File]]:
        """The files of every table with users, by bucket."""
        found: dict[tuple[str, int], list[File]] = {}
        for row in self.files.filter(pc.not_equal(self.files["table"], "images")).to_pylist():
            file = File(row["path"], row["bytes"], row["min_user_id"], row["max_user_id"])
            found.setdefault((row["table"], row["bucket"]), []).append(file)
        return found

    def files_with(self, name: str, users: list[str]) -> list[tuple[File, list[str]]]:
        """The files in which any of some users may be, each with those of its bucket."""
        by_bucket: dict[int, list[str]] = {}
        for user in users:
            by_bucket.setdefault(bucket_of(user, self.manifest["num_buckets"]), []).append(user)
        return [
            (file, own)
            for bucket, own in sorted(by_bucket.items())
            for file in self.files_of_buckets.get((name, bucket), [])
            if file.first_user is not None
            and file.last_user is not None
            and own[0] <= file.last_user
            and own[-1] >= file.first_user
        ]

    def checked(self, name: str, columns: Sequence[str] | None) -> list[str] | None:
        """The columns as a list. Raises UserError for a table or a column that there is not."""
        if isinstance(columns, str):
            raise TypeError(f"columns is the string {columns!r}; give a list of columns, [{columns!r}]")
        columns = None if columns is None else list(columns)
        if name not in TABLES:
            raise InputError(f"catalog {self.root}: there is no table {name!r}; {did_you_mean(name, TABLES)}")
        for column in columns or []:
            if column not in self.schema(name).names:
                raise InputError(
                    f"catalog {self.root}: {name} has no column {column!r}; {did_you_mean(column, self.schema(name).names)}"
                )
        return columns

    def sorted_users(self, name: str, user_ids: Sequence[str]) -> list[str]:
        """Each user once, but names that are no text. Raises TypeError for a single name, which would be taken for a list of letters."""
        if isinstance(user_ids, str):
            raise TypeError(f"user_ids is the string {user_ids!r}; give a list of users, [{user_ids!r}]")
        if name == "images":
            raise InputError(
                "images: has no users; read the users' items, and give them to `Snapshot.images`"
            )
        users = user_ids.to_pylist() if isinstance(user_ids, pa.Array | pa.ChunkedArray) else list(user_ids)
        if strange := [user for user in users if not isinstance(user, str)]:
            raise TypeError(
                f"user_ids: {strange[0]!r} is a {type(strange[0]).__name__}; every user_id is a string"
            )
        return sorted({user for user in users if not SURROGATE.search(user)})

    @contextmanager
    def explained(self, path: str = "") -> Iterator[None]:
        """What keeps a file (one of them) from being read, as a UserError with the remedy."""
        try:
            yield
        except (pa.ArrowException, *failure_types()) as error:
            told, where = f"catalog {self.root}: run {self.run_id}", f"{path} " if path else ""
            broken = classify(error) in (Failure.MISSING, Failure.DAMAGED)
            try:
                gone = broken and not exists(join(self.root, self.path, "manifest.json"))
            except failure_types():
                broken, gone = False, False
            if not broken:
                raise StorageError(
                    f"{told}: {where}cannot be read ({describe(error)}); check the network and the credentials, and ask again"
                ) from None
            if gone:
                raise InputError(
                    f"{told} was collected and cannot be read any more; go on with `refresh()`, and hold no snapshot longer than "
                    "the grace period of `rebeca catalog gc`"
                ) from None
            raise InputError(
                f"{told}: {where}is missing or damaged ({describe(error)}); `rebeca catalog verify` names every such file: "
                "restore it, or `rebeca catalog rollback`, if a snapshot before can do without it; or generate into another root"
            ) from None


def published(root: str) -> Snapshot | None:
    """The snapshot `latest.json` points to, or None before the first publication."""
    root = str(root or "")  # a Path will do
    if not root:
        raise InputError("catalog: its root is empty; give a path, or s3://bucket/prefix")
    pointer, _ = read_pointer(root)
    return open_snapshot(root, pointer.snapshot) if pointer.snapshot else None


def read_catalog(root: str) -> Snapshot:
    """The published snapshot of the catalog at `root`, a local path or `s3://bucket/prefix`. Raises UserError if there is none."""
    snapshot = published(root)
    if snapshot is None:
        raise nothing_published(root)
    return snapshot


def nothing_published(root: str) -> UserError:
    return InputError(
        f"catalog {root}: nothing is published there; give another root, wait for the first run to end, or publish one of the snapshots "
        "that `rebeca catalog list` shows"
    )


def open_snapshot(root: str, path: str) -> Snapshot:
    """One snapshot by its folder below the root.

    Raises UserError if it is gone, damaged, of a newer version than this one reads, or of one before the format was settled.
    """
    manifest = read_manifest(root, path)
    return Snapshot(
        root=absolute(root).rstrip("/"),
        path=path,
        manifest=manifest,
        files=read_file_list(root, path, manifest),
    )
