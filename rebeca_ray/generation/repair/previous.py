"""The previous snapshot, bucket by bucket: its users, and those of them whose items cannot be kept.

A file that is missing or damaged costs the users with items in it, and nobody else: they are planned again.
Every night compares the size of each file that it keeps. It also hashes some of them, others each night, so
that damage in files that nobody reads is found too.
"""

import logging
from collections.abc import Sequence, Set
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.catalog.counts import tally
from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.errors import InputError
from rebeca_ray.generation.context import RunContext
from rebeca_ray.generation.decisions import PublishedUser, published_users
from rebeca_ray.generation.sharing.separated import separated_users
from rebeca_ray.identity import hash128
from rebeca_ray.storage.filesystem import delete, delete_files, join
from rebeca_ray.storage.records import FileRecord, ListedFile, damage_among, listed, read_record, write_record

log = logging.getLogger(__name__)

HASHED_BYTES = 16 * 2**20  # of files of a bucket that are hashed per night
Damage = dict[str, str]  # files below the catalog's root, with the reasons


@dataclass(frozen=True, kw_only=True)
class PreviousBucket:
    """The users of one bucket, those with items that cannot be kept, and the damaged files."""

    users: dict[str, PublishedUser]
    lost: Set[str]
    damaged: Damage


def read_previous(context: RunContext, bucket: int, requested: Set[str], known: Damage) -> PreviousBucket:
    """Return the previous snapshot's part of a bucket. `known` are files that a reader found damaged.

    Only image files with items of the `requested` users, or of the population pool, are looked at.
    """
    previous = context.previous
    if previous is None:
        return PreviousBucket(users={}, lost=set(), damaged={})
    budget = HashedBytes(HASHED_BYTES)
    damaged = {path: known[path] for path in known if path in bucket_paths(previous, context, bucket)}
    damaged |= damage_of_tables(previous, context, bucket, budget)
    try:
        items = items_of(previous, context, bucket, damaged)
        users = last_users(previous, context, bucket, damaged)
    except InputError:
        # Read in part only, so the budget did not cover it.
        deeper = damage_of_tables(previous, context, bucket, HashedBytes(None))
        if not deeper.keys() - damaged.keys():
            raise
        damaged |= deeper
        items = items_of(previous, context, bucket, damaged)
        users = last_users(previous, context, bucket, damaged)

    # The image files in a new order each night, so that each is hashed some night.
    keepers = pa.array(sorted({*requested, POPULATION_USER}), pa.string())
    kept = items.filter(pc.is_in(items["user_id"].combine_chunks(), value_set=keepers))
    files = image_rows(previous, set(kept["image_file"].unique().to_pylist()))
    order = sorted(files, key=lambda file: hash128(context.run.run_date, file.path))
    damaged |= budget.check(previous.root, order) | {
        file.path: known[file.path] for file in order if file.path in known
    }
    intact = without_images(items, damaged_numbers(previous, damaged))
    num_intact = tally(intact["user_id"])
    lost = {user for user, row in users.items() if num_intact.get(user, 0) < row.num_items}
    lost |= separated_users(previous, bucket, context.num_buckets, without=damaged)
    return PreviousBucket(users=users, lost=lost, damaged=damaged)


class HashedBytes:
    """A budget of bytes to hash; None is without a limit."""

    def __init__(self, remaining: int | None) -> None:
        self.remaining = remaining

    def check(self, root: str, files: Sequence[FileRecord], *, sized: bool = True) -> Damage:
        """Return the damage among some files: by hash while the budget lasts, then by size, if `sized`."""
        hashed, others = list[FileRecord](), list[FileRecord]()
        for file in files:
            fits = self.remaining is None or file.bytes <= self.remaining
            (hashed if fits else others).append(file)
            if fits and self.remaining is not None:
                self.remaining -= file.bytes
        return damage_among(root, hashed) | damage_among(root, others if sized else [], hashed=False)


def damage_of_tables(
    previous: Snapshot, context: RunContext, bucket: int, budget: HashedBytes | None = None
) -> Damage:
    """Return the damage among the files with users and items of a bucket; all are hashed without a budget."""
    names = ("users", "items")
    tables = [previous.bucket_files(name, bucket, context.num_buckets).to_pylist() for name in names]
    files = [listed(row) for rows in tables for row in rows]
    return (budget or HashedBytes(None)).check(previous.root, files)


def bucket_paths(previous: Snapshot, context: RunContext, bucket: int) -> Set[str]:
    names = ("users", "items")
    files = (previous.bucket_files(name, bucket, context.num_buckets)["path"] for name in names)
    return {path for column in files for path in column.to_pylist()}


def items_of(previous: Snapshot, context: RunContext, bucket: int, damaged: Damage) -> pa.Table:
    columns = ["user_id", "image_file"]
    return previous.bucket("items", bucket, context.num_buckets, columns, without=damaged)


def last_users(
    previous: Snapshot | None, context: RunContext, bucket: int, damaged: Damage
) -> dict[str, PublishedUser]:
    """Return the previous snapshot's `users` of a bucket, without those in damaged files."""
    if previous is None:
        return {}
    return published_users(previous.bucket("users", bucket, context.num_buckets, without=damaged))


def without_images(items: pa.Table, numbers: pa.Array) -> pa.Table:
    """Return the items whose image is in none of some image files."""
    return items.filter(pc.invert(pc.is_in(items["image_file"].combine_chunks(), value_set=numbers)))


def image_rows(previous: Snapshot, numbers: Set[int]) -> list[ListedFile]:
    """Return image files by their numbers."""
    images = previous.files.filter(pc.equal(previous.files["table"], "images"))
    images = images.filter(pc.is_in(images["file"], value_set=pa.array(sorted(numbers), pa.int32())))
    return [listed(row) for row in images.select(["path", "bytes", "sha256"]).to_pylist()]


def damaged_numbers(previous: Snapshot | None, damaged: Damage) -> pa.Array:
    """Return the numbers of the damaged image files."""
    if previous is None or not damaged:
        return pa.array([], pa.int32())
    images = previous.files.filter(pc.equal(previous.files["table"], "images"))
    paths = pa.array(sorted(damaged), pa.string())
    return images.filter(pc.is_in(images["path"], value_set=paths))["file"].combine_chunks()


def read_known(work: str) -> Damage:
    """Return the files of the previous snapshot that this run found damaged while it read them."""
    return (read_record(join(work, "damaged.json")) or {"files": {}})["files"]


def note_damage(context: RunContext, damaged: Damage) -> None:
    """Make the run's stages, when they run again, do without damaged files.

    An image file of this run is removed, so that its items are rendered again. A file of the previous
    snapshot is noted, so that all users are decided on again. Files below the work folder are compared
    with their records anyway.
    """
    run = context.run
    for path, reason in damaged.items():
        log.warning(f"catalog {run.root}: {path}: {reason}; this run makes its items again")
    ours = [path for path in damaged if path.startswith(f"{run.images}/")]
    delete_files([join(run.root, path) for path in ours])
    earlier = {path: damaged[path] for path in damaged if path.startswith(("snapshots/", "images/"))}
    for path in ours:
        del earlier[path]
    if earlier:
        write_record({"files": {**read_known(run.work), **earlier}}, join(run.work, "damaged.json"))
        delete(join(run.work, "decisions.json"))
