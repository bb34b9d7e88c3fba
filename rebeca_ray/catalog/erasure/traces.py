"""Find everything of some users in the snapshots of a catalog. Only the buckets of these users are read.

snapshots -> `Trace`s: files with rows of the users, counts without them -> rows of images that nobody shows

An image stays if an item of another user, or of the population pool, points to it in any snapshot. All other
rows in the image files of these buckets go, because nobody can say any more whose they were.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.catalog.counts import DEFERRED, FAILED, FILTERED, tally
from rebeca_ray.catalog.images import image_location
from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.catalog.manifest import Counts, FileRow
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.catalog.row_groups import read_users
from rebeca_ray.errors import DamagedFilesError, InputError
from rebeca_ray.identity import bucket_of
from rebeca_ray.storage.records import read_columns

USER_TABLES = ("items", "users", "errors", "changes")
COLUMNS = ["user_id", "item_id", "origin", "image_file", "image_row"]
THREADS = 16
ERASED = ""  # the item id of an erased row of an image file


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Everything of some users in one snapshot. Locations are those of `image_location`, each once."""

    snapshot: Snapshot
    users: list[str]
    tables: dict[str, FileRow]  # files with rows of the users, by path
    rows: Counter[str]  # rows of the users, by table
    counts: Counts  # of the manifest, without the users
    item_ids: set[str]  # made for these users
    shown_ids: pa.ChunkedArray  # items of other users in the same buckets, and of the pool: perhaps millions
    locations: np.ndarray  # of these users' images
    other_locations: np.ndarray  # of all other images that these buckets show

    def lost_rows(self, pool: np.ndarray) -> Counter[int]:
        """Return how many live rows each image file loses, by its number.

        The rows at the locations of the `pool` count in the pool's bucket alone, and stay.
        """
        lost = np.setdiff1d(self.locations, np.concatenate([self.other_locations, pool]))
        return Counter((lost >> 32).tolist())


def find_trace(snapshot: Snapshot, users: list[str]) -> Trace:
    """Return the trace of some sorted users in a snapshot. Raises InputError for a damaged file."""
    num_buckets = snapshot.num_buckets
    names = pa.array(users, pa.string())
    buckets = sorted({bucket_of(user, num_buckets) for user in users})
    items = pa.concat_tables([snapshot.bucket("items", bucket, num_buckets, COLUMNS) for bucket in buckets])
    of_users = pc.is_in(items["user_id"], value_set=names)
    theirs, others = items.filter(of_users), items.filter(pc.invert(of_users))
    tables, rows = files_with_rows(snapshot, users)
    mine = theirs.filter(pc.not_equal(theirs["origin"], schemas.POPULATION))
    gone = {*mine["item_id"].to_pylist()}
    for name in ("errors", "changes"):
        gone.update(snapshot.table(name, ["item_id"], users)["item_id"].to_pylist())
    # The changes of a cold-start user name items of pools, too, perhaps of one that was just replaced.
    pools = [snapshot.table(name, ["item_id"], [POPULATION_USER]) for name in ("items", "changes")]
    return Trace(
        snapshot=snapshot,
        users=users,
        tables=tables,
        rows=rows,
        counts=counts_without(snapshot, users, theirs),
        item_ids=gone - {ERASED},
        shown_ids=pa.concat_tables(
            table.select(["item_id"])
            for table in (others, *pools, theirs.filter(pc.equal(theirs["origin"], schemas.POPULATION)))
        )["item_id"],
        locations=np.unique(image_location(theirs)),
        other_locations=np.unique(image_location(others)),
    )


def files_with_rows(snapshot: Snapshot, users: list[str]) -> tuple[dict[str, FileRow], Counter[str]]:
    """Return the files that hold rows of some sorted users, by path, and the number of rows by table."""
    listed: dict[str, FileRow] = {row["path"]: row for row in snapshot.files.to_pylist()}
    tables: dict[str, FileRow] = {}
    rows: Counter[str] = Counter()
    for name in USER_TABLES:
        for file, users_of_file in snapshot.user_files.files_with(name, users):
            number = read_users(snapshot.root, file.path, file.bytes, users_of_file, ["user_id"]).num_rows
            if number:
                tables[file.path] = listed[file.path]
                rows[name] += number
    return tables, rows


def counts_without(snapshot: Snapshot, users: list[str], items: pa.Table) -> Counts:
    """Return the counts of a manifest without some users, whose items are given.

    The outcomes add up to `requested`. Missing items count as the user's row says: failed, filtered, or
    deferred if the user is stale. What the manifest has too few of is taken from the other outcomes.
    """
    columns = ["user_id", "num_images", "num_failed", "stale"]
    counts = Counter(snapshot.manifest.counts.model_dump())
    num_items = tally(items["user_id"])
    counts.subtract(tally(items["origin"]))
    counts["requested"] -= items.num_rows
    counts["users"] -= len(num_items)
    for row in snapshot.table("users", columns, users).to_pylist():
        missing = max(0, row["num_images"] - num_items.get(row["user_id"], 0))
        counts["stale_users"] -= row["stale"]
        failed = min(missing, row["num_failed"])
        first = [(DEFERRED, missing)] if row["stale"] else [(FAILED, failed), (FILTERED, missing - failed)]
        for outcome, most in [*first, (FAILED, missing), (FILTERED, missing), (DEFERRED, missing)]:
            taken = min(missing, most, counts[outcome])
            counts[outcome] -= taken
            counts["requested"] -= taken
            missing -= taken
    return Counts(**{name: max(0, counts[name]) for name in Counts.model_fields})


@dataclass(frozen=True, kw_only=True)
class ImageRows:
    """An image file, and which of its rows go: None for the whole file."""

    file: FileRow
    erased: np.ndarray | None  # [rows] of bool


def image_rows_to_erase(traces: list[Trace]) -> dict[str, ImageRows]:
    """Return the image files that hold rows to erase, by path.

    Reads the item ids of an image file alone, and only if no snapshot shows some of its rows.
    """
    listed = candidates(traces)
    shown = {path: np.zeros(row["rows"], bool) for path, row in listed.items()}
    for trace in traces:
        mark_shown(trace, shown)

    def erased_rows(row: FileRow) -> ImageRows | None:
        mask = ~shown[row["path"]]
        if mask.all():
            return ImageRows(file=row, erased=None)
        if mask.any():
            root = traces[0].snapshot.root
            try:
                item_id = read_columns(root, row["path"], ["item_id"])["item_id"]
            except DamagedFilesError as error:
                raise damaged_file(root, error) from None
            mask &= pc.not_equal(item_id, ERASED).to_numpy()
        return ImageRows(file=row, erased=mask) if mask.any() else None

    with ThreadPoolExecutor(THREADS) as pool:
        return {rows.file["path"]: rows for rows in pool.map(erased_rows, listed.values()) if rows}


def candidates(traces: list[Trace]) -> dict[str, FileRow]:
    """Return the image files of the users' buckets, and those that their items point into, by path."""
    rows: dict[str, FileRow] = {}
    # An image file keeps the bucket of its run, also where later runs have another number of buckets.
    numbers_of_buckets = {trace.snapshot.num_buckets for trace in traces}
    for trace in traces:
        buckets = {bucket_of(user, number) for user in trace.users for number in numbers_of_buckets}
        numbers = {*(np.setdiff1d(trace.locations, pool_locations(trace.snapshot)) >> 32).tolist()}
        for row in image_files(trace.snapshot):
            if row["bucket"] in buckets or row["file"] in numbers:
                rows[row["path"]] = row
    return rows


def mark_shown(trace: Trace, shown: dict[str, np.ndarray]) -> None:
    """Mark the rows of some image files that other users' items show in a snapshot."""
    files = {row["file"]: row for row in image_files(trace.snapshot) if row["path"] in shown}
    others = trace.other_locations
    used = Counter((np.union1d(trace.locations, others) >> 32).tolist())
    # A file that other buckets point into, too: one of an earlier pool, or of another number of buckets.
    if any(used[number] != row["live_rows"] for number, row in files.items()):
        items = trace.snapshot.items(["user_id", "image_file", "image_row"])
        of_users = pc.is_in(items["user_id"], value_set=pa.array(trace.users, pa.string()))
        others = image_location(items.filter(pc.invert(of_users))).to_numpy()
    for number in np.unique(others >> 32).tolist():
        if number in files:
            rows = others[others >> 32 == number] & 0xFFFFFFFF
            shown[files[number]["path"]][rows] = True


def image_files(snapshot: Snapshot) -> list[FileRow]:
    images: list[FileRow] = snapshot.files.filter(pc.equal(snapshot.files["table"], "images")).to_pylist()
    return images


def pool_locations(snapshot: Snapshot) -> np.ndarray:
    pool = snapshot.for_user(POPULATION_USER, ["image_file", "image_row"])
    return image_location(pool).to_numpy()


def damaged_file(root: str, error: DamagedFilesError) -> InputError:
    """Return the error for a file that cannot be rewritten without some of its rows."""
    path, reason = next(iter(error.reasons.items()))
    return InputError(
        f"catalog {root}: {path}: {reason}; restore it, or let a night and `rebeca catalog gc` remove it, "
        "and erase again"
    )
