"""Histories: one row per user with all their ratings. Training and planning stream them.

interactions (Parquet, in any order) -> buckets by a hash of the user -> one file per bucket, one row per user

Few interactions are one bucket, built without Ray. Many are first split by a Ray Data graph into folders.
Then one task per folder groups, checks and writes its buckets. A folder is one bucket, unless there are many.
"""

import logging
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.catalog.erasure.tombstones import Tombstones, read_tombstones
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data.interactions import (
    Interactions,
    history_digests,
    interactions_of,
    no_users,
    normalise,
    open_interactions,
    read_columns,
)
from rebeca_ray.data.streaming import stream
from rebeca_ray.data.validation import check_columns
from rebeca_ray.errors import InputError, shown
from rebeca_ray.identity import GENERATED_ID, bucket_of, hash128
from rebeca_ray.ray_runtime import for_each, start_ray, with_log
from rebeca_ray.storage.filesystem import arrow_filesystem, delete, join, open_filesystem
from rebeca_ray.storage.parquet import ParquetInput, read_table, write_table
from rebeca_ray.storage.records import ListedFile, damage_among, read_record, write_record
from rebeca_ray.storage.store import failure_types
from rebeca_ray.watchdog import Activity, Pulse

log = logging.getLogger(__name__)

ROWS_PER_BUCKET = 500_000
ROWS_PER_BLOCK = 100_000  # of interactions, while they are split
ROWS_PER_WRITE = 500_000  # of interactions that one task splits and writes
BYTES_PER_BLOCK, BYTES_IN_FLIGHT = 16 * 2**20, 128 * 2**20  # by default Ray Data reads all before the split
# Each task that splits writes a file into every folder. Arrow takes at most 1,024.
MAX_FOLDERS = 256
USERS_PER_ROW_GROUP = 2_000
MARKER = "histories.json"


@dataclass(frozen=True, kw_only=True)
class Histories:
    """A folder of histories, and the number of users in each bucket."""

    uri: str
    users_of_bucket: list[int]
    digest: str  # of the histories of all users
    sizes: list[int] = field(default_factory=list)  # bytes of each file
    sha256: list[str] = field(default_factory=list)
    rated: str | None = None  # for generation: the file of rated generated items, counted after the real ones

    @property
    def num_users(self) -> int:
        return sum(self.users_of_bucket)

    @property
    def first_user_index(self) -> np.ndarray:
        """Return [buckets], the user_index of the first user of each bucket."""
        return np.concatenate([[0], np.cumsum(self.users_of_bucket)[:-1]])

    def written_files(self) -> list[ListedFile]:
        """Return the file of each bucket as it was written, below `uri`."""
        return [
            ListedFile(path=bucket_file("", bucket).strip("/"), bytes=size, sha256=sha256)
            for bucket, (size, sha256) in enumerate(zip(self.sizes, self.sha256, strict=True))
        ]

    def file(self, bucket: int) -> str:
        return bucket_file(self.uri, bucket)

    def bucket_of(self, user_id: str) -> int:
        return bucket_of(user_id, len(self.users_of_bucket))


class WrittenBucket(NamedTuple):
    """The users of a bucket, a digest of their histories, and the size and checksum of the file."""

    users: int
    digest: str
    size: int
    sha256: str


def bucket_file(uri: str, bucket: int) -> str:
    return join(uri, f"bucket-{bucket:05d}.parquet")


def build_histories(
    settings: InteractionSettings,
    item_id: np.ndarray,
    storage: str,
    *,
    multiple_of: int = 1,
    activity: Activity | None = None,
    catalog: str | None = None,
) -> Histories:
    """Group the interactions by user below `storage`, or return an earlier folder of the same input.

    `item_id` are the ids of the embedded items, and `item_index` counts into them. The number of buckets is a
    multiple of `multiple_of`. Progress is noted in `activity`. Users who were erased from `catalog` are left
    out. Raises InputError as `read_interactions` does,
    and for rated items that have no embedding.
    """
    # The name of the folder is a hash of everything in it, so a complete folder of that name serves again.
    source = open_interactions(settings)
    columns = check_columns(source, schemas.INTERACTIONS)
    tombstones = read_tombstones(catalog)
    out = join(storage, f"histories-{fingerprint(settings, source, item_id, tombstones)[:12]}")
    if record := read_record(join(out, MARKER)):
        histories = Histories(**record)
        if not (damaged := damage_among(out, histories.written_files())):
            return histories
        name, reason = next(iter(damaged.items()))
        log.warning(f"{join(out, name)}: {reason}; all histories are built again")

    if tombstones:
        log.info(
            f"interactions {settings.path}: ratings of erased users are left out "
            f"(tombstones: {len(tombstones.hashes):,})"
        )
    items = pa.array(item_id, pa.string())
    num_buckets = multiple_of * math.ceil(source.num_rows / ROWS_PER_BUCKET / multiple_of)
    try:
        # One bucket fits into this process, where no Ray needs to start.
        if num_buckets <= 1:
            ratings = read_columns(source)
            ratings = known_items(tombstones.without(ratings) if tombstones else ratings, items, settings)
            counted = [write_bucket(interactions_of(ratings, settings), items, settings.path, out, 0)]
        else:
            split, activity = join(out, "split"), activity or Activity()
            per_folder = math.ceil(num_buckets / MAX_FOLDERS)
            add_bucket = AddBucket(num_buckets, per_folder, source.uri, activity.listen(), tombstones)
            split_by_bucket(source, columns, split, add_bucket, activity)

            def build(folder: int) -> list[WrittenBucket]:
                buckets = range(num_buckets)[folder * per_folder :][:per_folder]
                return build_folder(settings, join(split, f"folder={folder}"), items, out, buckets)

            folders = range(math.ceil(num_buckets / per_folder))
            built = for_each(build, folders, activity.move, name="histories")
            counted = [bucket for buckets in built for bucket in buckets]
            delete(split)
        source.require_unchanged("it was grouped by user")
        users_of_bucket, digests, sizes, sha256 = (list(column) for column in zip(*counted, strict=True))
        if not sum(users_of_bucket):
            raise no_users(settings)
    except Exception:  # not after an interrupt: another attempt may be writing by now
        with suppress(*failure_types()):
            delete(out)
        raise

    # The marker comes last: a folder without it is incomplete and is built again.
    histories = Histories(
        uri=out, users_of_bucket=users_of_bucket, digest=hash128(*digests), sizes=sizes, sha256=sha256
    )
    write_record(asdict(histories), join(out, MARKER))
    return histories


def fingerprint(
    settings: InteractionSettings, source: ParquetInput, item_id: np.ndarray, tombstones: Tombstones | None
) -> str:
    """Return a hash of the settings, the input, the items, the columns of a history, and the tombstones."""
    columns, erased = ",".join(schemas.HISTORIES.names), [tombstones.digest] if tombstones else []
    # The digest of the source has the key. The date alone does not matter, only where it leads back to.
    described = settings.model_dump_json(exclude={"user_key", "until"}) + str(settings.since() or "")
    return hash128(described, source.digest(), columns, *item_id.tolist(), *erased)


def split_by_bucket(
    source: ParquetInput,
    columns: pa.Schema,
    split: str,
    add_bucket: "AddBucket",
    activity: Activity,
) -> None:
    """Write the interactions and their buckets into folders below `split`, with Ray Data."""
    from ray.data import ExecutionResources

    start_ray()
    split_filesystem, split_path = open_filesystem(split)
    delete(split)
    interactions = stream(source, columns, ROWS_PER_BLOCK)
    interactions.context.execution_options.resource_limits = ExecutionResources(
        object_store_memory=BYTES_IN_FLIGHT
    )
    interactions.context.target_max_block_size = BYTES_PER_BLOCK
    # Else Ray Data joins read and write into one task, which holds all files.
    interactions = interactions.repartition(target_num_rows_per_block=ROWS_PER_WRITE)
    with activity.counting("group by user", source.num_rows) as counted:
        interactions.map_batches(
            with_log(add_bucket),
            batch_format="pyarrow",
            batch_size=ROWS_PER_BLOCK,
            zero_copy_batch=True,
        ).write_parquet(split_path, filesystem=arrow_filesystem(split_filesystem), partition_cols=["folder"])
        counted.reach(source.num_rows)  # the last rows of a worker had no beat


class AddBucket:
    """Add the user's `bucket` and its `folder` to every row of a batch, and leave out erased users."""

    def __init__(
        self, num_buckets: int, per_folder: int, uri: str, pulse: Pulse, tombstones: Tombstones | None
    ) -> None:
        self.num_buckets, self.per_folder = num_buckets, per_folder
        self.uri, self.pulse, self.tombstones = uri, pulse, tombstones

    def __call__(self, batch: pa.Table) -> pa.Table:
        self.pulse.beat(batch.num_rows)
        batch = normalise(batch, self.uri)
        batch = self.tombstones.without(batch) if self.tombstones else batch
        users = batch["user_id"].combine_chunks().dictionary_encode()
        of_user = np.array(
            [bucket_of(user, self.num_buckets) for user in users.dictionary.to_pylist()], np.int32
        )
        # A null user goes to the first user's bucket. The task of that bucket refuses it.
        codes = users.indices.fill_null(0).to_numpy()
        bucket = of_user[codes] if len(of_user) else np.zeros(len(codes), np.int32)
        batch = batch.append_column("bucket", pa.array(bucket))
        return batch.append_column("folder", pa.array(bucket // self.per_folder))


def build_folder(
    settings: InteractionSettings, folder: str, items: pa.Array, out: str, buckets: range
) -> list[WrittenBucket]:
    """Build the buckets of one folder of split interactions."""
    filesystem, path = open_filesystem(folder)
    split = read_table(folder, "interactions") if filesystem.exists(path) else None
    written = []
    for bucket in buckets:
        rows = split.filter(pc.equal(split["bucket"], bucket)).drop_columns(["bucket"]) if split else None
        if not rows:  # no user has this bucket
            empty = write_histories(schemas.HISTORIES.empty_table(), out, bucket)
            written.append(empty._replace(digest=""))
            continue
        ratings = known_items(normalise(rows, settings.path), items, settings)
        written.append(write_bucket(interactions_of(ratings, settings), items, settings.path, out, bucket))
    return written


def known_items(ratings: pa.Table, items: pa.Array, settings: InteractionSettings) -> pa.Table:
    """Return the ratings of items that have an embedding, and print the number of the others.

    A generated item may have left every snapshot, so a late rating of it is dropped. A rating of a real item
    without an embedding is dropped if `settings.unknown_items` says so. Otherwise it stays, and `index_items`
    refuses it.
    """
    known = pc.is_in(ratings["item_id"], value_set=items)
    if settings.unknown_items == "refuse":
        known = pc.or_(known, pc.invert(pc.match_substring_regex(ratings["item_id"], GENERATED_ID)))
    known = pc.fill_null(known, True)  # `validate` refuses null ids
    if unknown := len(known) - (pc.sum(known).as_py() or 0):
        log.warning(
            f"interactions {settings.path}: {unknown:,} of {len(known):,} rate an item without an embedding "
            "(generated long ago, for another user, or in a catalog that `catalog` does not name); left out"
        )
    return ratings.filter(known)


def write_bucket(
    interactions: Interactions, items: pa.Array, uri: str, out: str, bucket: int
) -> WrittenBucket:
    """Write the interactions of one bucket."""
    return write_histories(
        histories_table(interactions, index_items(interactions, items, uri), bucket), out, bucket
    )


def write_histories(table: pa.Table, out: str, bucket: int) -> WrittenBucket:
    """Write the file of one bucket."""
    written = write_table(table, bucket_file(out, bucket), row_group_size=USERS_PER_ROW_GROUP)
    digest = hash128(*table["user_id"].to_pylist(), *table["history_digest"].to_pylist())
    return WrittenBucket(table.num_rows, digest, written["bytes"], written["sha256"])


def histories_table(interactions: Interactions, item_index: np.ndarray, bucket: int) -> pa.Table:
    """Return the interactions of one bucket as `schemas.HISTORIES`, one row per user."""
    starts = np.searchsorted(interactions.user_index, np.arange(interactions.num_users + 1)).astype(np.int32)

    def lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(starts, pa.array(values, kind))

    return pa.table(
        {
            "user_id": interactions.user_id,
            "bucket": np.full(interactions.num_users, bucket, np.int32),
            "row": np.arange(interactions.num_users, dtype=np.int32),
            "num_likes": np.bincount(
                interactions.user_index, weights=interactions.like, minlength=interactions.num_users
            ).astype(np.int32),
            "history_digest": history_digests(interactions),
            "item_index": lists(item_index, pa.int32()),
            "like": lists(interactions.like, pa.int8()),
            "timestamp": lists(interactions.timestamp, pa.int64()),
            "split": lists(interactions.split, pa.int8()),
        },
        schema=schemas.HISTORIES,
    )


def index_items(interactions: Interactions, items: pa.Array, uri: str) -> np.ndarray:
    """Return the row of each interaction's item. Raises InputError for rated items without an embedding."""
    index = pc.index_in(pa.array(interactions.item_id, pa.string()), value_set=items)
    missing = index.is_null().to_numpy(zero_copy_only=False)
    if missing.any():
        names = ", ".join(shown(name)[1:-1] for name in sorted(set(interactions.item_id[missing]))[:3])
        raise InputError(
            f"interactions {uri}: {int(missing.sum())} of {len(missing)} rate an item that has no embedding "
            f"({names}); embed those items with `rebeca embed`, drop their ratings, "
            "or set interactions.unknown_items=drop"
        )
    return index.to_numpy()


def user_table(histories: Histories) -> pa.Table:
    """Return the `users.parquet` of a prior: `user_index`, likes and digest of every user."""
    columns = ["user_id", "bucket", "row", "num_likes", "history_digest"]
    table = read_table(histories.uri, "histories", columns)
    user_index = histories.first_user_index[table["bucket"].to_numpy()] + table["row"].to_numpy()
    return pa.table(
        {
            "user_id": table["user_id"],
            "user_index": user_index.astype(np.int32),
            "num_likes": table["num_likes"],
            "history_digest": table["history_digest"],
        },
        schema=schemas.PRIOR_USERS,
    )
