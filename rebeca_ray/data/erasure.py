"""Erase some users, or old work, from what trainings keep: histories, checkpoints, embeddings of rated items.

A tombstone changes the histories of the next training, so the work of an earlier one is of no use any more.
"""

import re
from collections.abc import Collection
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.catalog.erasure.removed import Removed
from rebeca_ray.data.feedback import ROWS_PER_GROUP
from rebeca_ray.data.histories import MARKER, bucket_file
from rebeca_ray.errors import UserError
from rebeca_ray.identity import bucket_of, hash128
from rebeca_ray.storage.filesystem import (
    delete,
    delete_files,
    exists,
    join,
    list_files,
    list_folders,
    open_filesystem,
    storage_errors,
)
from rebeca_ray.storage.parquet import read_table, write_table
from rebeca_ray.storage.records import read_record

HISTORIES = re.compile(r"histories-[0-9a-f]{12}")
TRAINING = re.compile(r".+-[0-9a-f]{12}")  # the name of a training run ends with a hash


def erase_from_storage(storage: str, users: Collection[str], removed: Removed) -> None:
    """Remove the histories with some users below a training's storage, and the checkpoints beside them.

    Checkpoints do not say whose rows they hold, so those of all training runs go. No training may run.
    """
    histories, runs = training_work(storage)
    histories = [folder for folder in histories if holds_users(folder, users)]
    removed.add("training runs", len(runs), *runs)
    removed.add("folders of histories", len(histories), *histories)
    if removed.dry_run:
        return
    remove_work(histories, runs)


def remove_old_work(storage: str, before: datetime) -> list[str]:
    """Remove histories and training runs that were last changed before a time; return their folders.

    No training may run. A later one with the same ratings builds its histories again.
    """
    histories, runs = (
        [folder for folder in folders if last_change(folder) < before] for folders in training_work(storage)
    )
    remove_work(histories, runs)
    return [*histories, *runs]


def training_work(storage: str) -> tuple[list[str], list[str]]:
    """Return the folders of histories, and those of training runs, below a training's storage."""
    folders = list_folders(storage)
    histories = [join(storage, name) for name in folders if HISTORIES.fullmatch(name)]
    runs = [
        join(storage, name)
        for name in folders
        if TRAINING.fullmatch(name)
        and not HISTORIES.fullmatch(name)
        and holds_checkpoints(join(storage, name))
    ]
    return histories, runs


def last_change(folder: str) -> datetime:
    """Return when a file of a folder was last changed. A folder without files is very old."""
    filesystem, _ = open_filesystem(folder)
    with storage_errors(folder, "list"):
        times = [filesystem.modified(open_filesystem(file)[1]) for file in list_files(folder)]
    return max(
        (time if time.tzinfo else time.replace(tzinfo=UTC) for time in times),
        default=datetime.min.replace(tzinfo=UTC),
    )


def remove_work(histories: list[str], runs: list[str]) -> None:
    for folder in runs:
        delete(folder)
    for folder in histories:
        delete(join(folder, MARKER))  # from here on the folder is incomplete
        delete(folder)


def holds_checkpoints(folder: str) -> bool:
    return any(name.startswith("checkpoint_") for name in list_folders(folder)) or exists(
        join(folder, "checkpoint_manager_snapshot.json")
    )


def holds_users(histories: str, users: Collection[str]) -> bool:
    """Return whether a folder of histories holds one of the users, or cannot be read."""
    record = read_record(join(histories, MARKER))
    if record is None:
        return True
    num_buckets = len(record["users_of_bucket"])
    names = pa.array(sorted(users), pa.string())
    try:
        return any(
            pc.any(
                pc.is_in(
                    read_table(bucket_file(histories, bucket), "histories", ["user_id"])["user_id"],
                    value_set=names,
                )
            ).as_py()
            for bucket in {bucket_of(user, num_buckets) for user in users}
        )
    except UserError:
        return True


def erase_rated(root: str, item_ids: Collection[str], removed: Removed) -> None:
    """Erase items from the embeddings of rated items below the root of a catalog."""
    ids = pa.array(sorted(item_ids), pa.string())
    for uri in list_files(join(root, "rated"), ".parquet"):
        gone = pc.is_in(read_table(uri, "rated items", ["item_id"])["item_id"], value_set=ids)
        count = pc.sum(gone).as_py() or 0
        removed.add("embeddings of rated items", count, *([uri] if count else []))
        if not count or removed.dry_run:
            continue
        kept = read_table(uri, "rated items").filter(pc.invert(gone))
        if kept.num_rows:
            folder, name = uri.rpartition("/")[0], hash128(*kept["item_id"].to_pylist())[:16]
            new = join(folder, f"part-{name}.parquet")
            write_table(kept, new, row_group_size=ROWS_PER_GROUP, embed_column="image_embeds")
        delete_files([uri])
