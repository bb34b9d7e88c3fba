"""Histories: one row a user with all they rated, which training and planning stream from.

interactions (Parquet, in any order) -> buckets by a hash of the user -> one file a bucket, one row a user

Small interactions are one bucket and never meet Ray. Larger ones are split by a Ray Data graph first; then every bucket is
grouped, checked and written by a task of its own, so that no process ever holds more than a bucket.
"""

import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rebeca_ray import schemas
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data.interactions import (
    Interactions,
    history_digests,
    interactions_of,
    no_users,
    normalise,
    read_columns,
)
from rebeca_ray.data.validation import check_columns
from rebeca_ray.errors import InputError
from rebeca_ray.identity import GENERATED_ID, bucket_of, hash128
from rebeca_ray.storage.filesystem import arrow_filesystem, delete, join, open_filesystem
from rebeca_ray.storage.objects import read_json, write_json
from rebeca_ray.storage.parquet import describe_files, open_table, read_table, write_table
from rebeca_ray.storage.store import failure_types

ROWS_PER_BUCKET = 500_000
ROWS_PER_BLOCK = 100_000  # of interactions, while they are split
BYTES_PER_BLOCK, BYTES_IN_FLIGHT = (
    16 * 2**20,
    128 * 2**20,
)  # Ray Data would read all of them ahead of the split
USERS_PER_ROW_GROUP = 2_000
MARKER = "histories.json"


@dataclass(frozen=True, kw_only=True)
class Histories:
    """A folder of histories: where, and how many users each bucket holds."""

    uri: str
    users_of_bucket: list[int]
    digest: str  # of all users' histories
    rated: str | None = None  # of generation: where the generated items are that stand after the real ones

    @property
    def num_users(self) -> int:
        return sum(self.users_of_bucket)

    @property
    def first_user_index(self) -> np.ndarray:
        """[buckets] the user_index of each bucket's first user."""
        return np.concatenate([[0], np.cumsum(self.users_of_bucket)[:-1]])

    def file(self, bucket: int) -> str:
        return bucket_file(self.uri, bucket)

    def bucket_of(self, user_id: str) -> int:
        return bucket_of(user_id, len(self.users_of_bucket))


@dataclass(frozen=True, kw_only=True)
class ItemIndex:
    """The embedded items by name: sorted ids, and the row of each."""

    sorted_id: np.ndarray
    row: np.ndarray


def bucket_file(uri: str, bucket: int) -> str:
    return join(uri, f"bucket-{bucket:05d}.parquet")


def build_histories(
    settings: InteractionSettings, item_id: np.ndarray, storage: str, *, multiple_of: int = 1
) -> Histories:
    """Group the interactions by user into a folder below `storage`; an earlier one of the same input is used again.

    `item_id` are the embedded items, into which `item_index` counts. The number of buckets is a multiple of `multiple_of`. Raises
    UserError as `read_interactions` does, and for rated items that are not among them.
    """
    columns = check_columns(settings.path, "interactions", schemas.INTERACTIONS)
    source = fingerprint(settings, item_id)
    out = join(storage, f"histories-{source[:12]}")
    if told := read_json(join(out, MARKER)):
        return Histories(**told)
    order = np.argsort(item_id)
    items = ItemIndex(sorted_id=item_id[order], row=order)
    num_buckets = multiple_of * math.ceil(count_rows(settings.path) / ROWS_PER_BUCKET / multiple_of)
    try:
        if num_buckets <= 1:
            ratings = known_items(read_columns(settings.path), items, settings)
            counted = [write_bucket(interactions_of(ratings, settings), items, settings.path, out, 0)]
        else:
            counted = build_in_buckets(settings, columns, items, out, num_buckets)
        users_of_bucket, digests = (list(column) for column in zip(*counted, strict=True))
        if not sum(users_of_bucket):
            raise no_users(settings)
    except Exception:  # not an interrupt: another attempt may be at it by now
        with suppress(*failure_types()):
            delete(out)
        raise
    histories = Histories(uri=out, users_of_bucket=users_of_bucket, digest=hash128(*digests))
    write_json(asdict(histories), join(out, MARKER))
    return histories


def fingerprint(settings: InteractionSettings, item_id: np.ndarray) -> str:
    """Changes with the settings, the files (by name, size and time of change) and the items."""
    return hash128(
        settings.model_dump_json(), describe_files(settings.path, "interactions"), *item_id.tolist()
    )


def count_rows(uri: str) -> int:
    files, _ = open_table(uri, "interactions")
    filesystem, _ = open_filesystem(uri)
    total = 0
    for name in files:
        with filesystem.open(name, "rb") as file:
            total += pq.read_metadata(file).num_rows
    return total


def build_in_buckets(
    settings: InteractionSettings, columns: list[str], items: ItemIndex, out: str, num_buckets: int
) -> list[tuple[int, str]]:
    """Split the interactions by bucket with Ray Data, then build every bucket; returns users and digest of each."""
    import ray
    from ray.data import ExecutionResources

    from rebeca_ray.ray_runtime import start_ray

    start_ray()
    files, _ = open_table(settings.path, "interactions")
    filesystem, _ = open_filesystem(settings.path)
    split = join(out, "split")
    split_filesystem, split_path = open_filesystem(split)
    delete(split)
    interactions = ray.data.read_parquet(files, filesystem=arrow_filesystem(filesystem))
    interactions.context.execution_options.resource_limits = ExecutionResources(
        object_store_memory=BYTES_IN_FLIGHT
    )
    interactions.context.target_max_block_size = BYTES_PER_BLOCK
    (
        interactions.select_columns(columns)
        .map_batches(
            AddBucket(num_buckets, settings.path),
            batch_format="pyarrow",
            batch_size=ROWS_PER_BLOCK,
            zero_copy_batch=True,
        )
        .write_parquet(split_path, filesystem=arrow_filesystem(split_filesystem), partition_cols=["bucket"])
    )
    shared = ray.put(items)

    def build(row: dict[str, Any]) -> dict[str, Any]:
        users, digest = build_bucket(settings, split, ray.get(shared), out, int(row["id"]))
        return {"bucket": row["id"], "users": users, "digest": digest}

    built = (
        ray.data.range(num_buckets, override_num_blocks=num_buckets)
        .map(build)
        .to_pandas()
        .sort_values("bucket")
    )
    delete(split)
    return list(zip(built["users"].astype(int).tolist(), built["digest"].tolist(), strict=True))


class AddBucket:
    """One row in, the same row out with its user's `bucket`."""

    def __init__(self, num_buckets: int, uri: str) -> None:
        self.num_buckets, self.uri = num_buckets, uri

    def __call__(self, batch: pa.Table) -> pa.Table:
        batch = normalise(batch, self.uri)
        users = (
            batch["user_id"].combine_chunks().dictionary_encode()
        )  # a null user is anybody's bucket, which will refuse it
        of_user = np.array(
            [bucket_of(user, self.num_buckets) for user in users.dictionary.to_pylist()], np.int32
        )
        codes = users.indices.fill_null(0).to_numpy()
        return batch.append_column(
            "bucket", pa.array(of_user[codes] if len(of_user) else np.zeros(len(codes), np.int32))
        )


def build_bucket(
    settings: InteractionSettings, split: str, items: ItemIndex, out: str, bucket: int
) -> tuple[int, str]:
    folder = join(split, f"bucket={bucket}")
    filesystem, path = open_filesystem(folder)
    if not filesystem.exists(path):  # no user's hash fell here
        write_table(
            schemas.HISTORIES.empty_table(), bucket_file(out, bucket), row_group_size=USERS_PER_ROW_GROUP
        )
        return 0, ""
    ratings = known_items(normalise(read_table(folder, "interactions"), settings.path), items, settings)
    return write_bucket(interactions_of(ratings, settings), items, settings.path, out, bucket)


def known_items(ratings: pa.Table, items: ItemIndex, settings: InteractionSettings) -> pa.Table:
    """Without ratings of items whose embedding is nowhere, which are counted aloud: of generated ones, and of all that may be dropped.

    What was generated long ago is in no snapshot any more, and a late rating of it is nobody's mistake.
    """
    known = pc.is_in(ratings["item_id"], value_set=pa.array(items.sorted_id, pa.string()))
    if settings.unknown_items == "refuse":
        known = pc.or_(known, pc.invert(pc.match_substring_regex(ratings["item_id"], GENERATED_ID)))
    known = pc.fill_null(known, True)  # a null is for others to refuse
    if unknown := len(known) - (pc.sum(known).as_py() or 0):
        print(
            f"interactions {settings.path}: {unknown:,} of {len(known):,} rate an item whose embedding is nowhere (generated long ago, for "
            "somebody else, or in a catalog that `catalog` does not name); left out",
            flush=True,
        )
    return ratings.filter(known)


def write_bucket(
    interactions: Interactions, items: ItemIndex, uri: str, out: str, bucket: int
) -> tuple[int, str]:
    """Write one bucket's file; returns how many users it holds and a digest of their histories."""
    table = histories_table(interactions, index_items(interactions, items, uri), bucket)
    write_table(table, bucket_file(out, bucket), row_group_size=USERS_PER_ROW_GROUP)
    return table.num_rows, hash128(*table["user_id"].to_pylist(), *table["history_digest"].to_pylist())


def histories_table(interactions: Interactions, item_index: np.ndarray, bucket: int) -> pa.Table:
    """The interactions of one bucket, one row a user."""
    starts = np.searchsorted(interactions.user_index, np.arange(interactions.num_users + 1)).astype(np.int32)

    def lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(starts, pa.array(values, kind))

    return pa.table(
        {
            "user_id": interactions.user_id,
            "bucket": np.full(interactions.num_users, bucket, np.int32),
            "place": np.arange(interactions.num_users, dtype=np.int32),
            "num_likes": np.bincount(
                interactions.user_index, weights=interactions.like, minlength=interactions.num_users
            ).astype(np.int32),
            "history_digest": history_digests(interactions),
            "item_index": lists(item_index, pa.int32()),
            "like": lists(interactions.like, pa.int8()),
            "timestamp": lists(interactions.timestamp, pa.int64()),
            "held_out": lists(interactions.held_out, pa.bool_()),
        },
        schema=schemas.HISTORIES,
    )


def index_items(interactions: Interactions, items: ItemIndex, uri: str) -> np.ndarray:
    """The row of each interaction's item. Raises UserError for rated items that were not embedded."""
    place = np.minimum(np.searchsorted(items.sorted_id, interactions.item_id), len(items.sorted_id) - 1)
    missing = items.sorted_id[place] != interactions.item_id
    if missing.any():
        names = ", ".join(sorted(set(interactions.item_id[missing]))[:3])
        raise InputError(
            f"interactions {uri}: {int(missing.sum())} of {len(missing)} rate an item that has no embedding "
            f"({names}); embed those items with `rebeca embed`, drop their ratings, or set interactions.unknown_items=drop"
        )
    return items.row[place].astype(np.int32)


def user_table(histories: Histories) -> pa.Table:
    """The `users.parquet` of a prior with a row a user: who has which `user_index`, with how many likes."""
    table = read_table(
        histories.uri, "histories", ["user_id", "bucket", "place", "num_likes", "history_digest"]
    )
    user_index = histories.first_user_index[table["bucket"].to_numpy()] + table["place"].to_numpy()
    columns = {"user_id": table["user_id"], "user_index": user_index.astype(np.int32)}
    return pa.table(
        {**columns, "num_likes": table["num_likes"], "history_digest": table["history_digest"]},
        schema=schemas.PRIOR_USERS,
    )
