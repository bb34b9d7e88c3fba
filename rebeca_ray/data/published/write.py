"""Write a published data set: interactions and items, which become visible together.

`PublishedData` -> images that are missing -> items in row groups of 100 images -> a table per split

On a disk everything is written into a folder beside `out`, and one rename makes it appear. In an object store
the items come first, and `interactions.parquet` comes last.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.data.published.dataset import (
    IMAGES_PER_GROUP,
    SPLITS,
    TRAIN,
    PublishedData,
    Ratings,
    distinct,
)
from rebeca_ray.data.validation import check_ids
from rebeca_ray.errors import InputError, shown
from rebeca_ray.progress import counting
from rebeca_ray.storage.filesystem import (
    delete,
    is_local,
    join,
    list_files,
    open_filesystem,
    storage_errors,
    sync_files,
)
from rebeca_ray.storage.local import make_folder, partial_of, sync
from rebeca_ray.storage.parquet import write_table, write_tables
from rebeca_ray.storage.store import failure_types
from rebeca_ray.storage.writable import require_writable

log = logging.getLogger(__name__)

GROUPS_PER_FILE = 100  # `rebeca embed` reads each file in a task of its own
RATINGS_PER_GROUP = 1_000_000
MAX_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Written:
    """The numbers of written ratings by split, of users and images, and the scale of the ratings."""

    ratings: dict[str, int]
    users: int
    items: int
    rating_scale: tuple[float, float]


def write_published(data: PublishedData, out: str, *, allow_missing: bool = False) -> Written:
    """Write `interactions.parquet`, `items/`, and the published splits besides training, into a new folder.

    Raises InputError for an `out` that holds anything, and for rated images that are missing. With
    `allow_missing` their ratings are left out instead.
    """
    check_out(out)
    for column in ("user_id", "item_id"):
        for split, table in data.ratings.items():
            check_ids(table[column], f"{data.name} {split}", data.source, column)
    ratings = with_images(data, allow_missing=allow_missing)
    if TRAIN not in ratings or not ratings[TRAIN].num_rows:
        raise InputError(
            f"{data.name} {data.source}: no rating is left for training ({', '.join(ratings) or 'none'}); "
            "expected at least one with an image; check the split and the folder of images"
        )
    items = distinct(ratings, "item_id")
    with new_folder(out) as folder:
        write_items(data, items, join(folder, "items"))
        for split in reversed([name for name in SPLITS if name in ratings]):
            table = ratings[split]
            schema = pa.schema([schemas.INTERACTIONS.field(name) for name in table.column_names])
            write_table(
                table.cast(schema), join(folder, f"{split}.parquet"), row_group_size=RATINGS_PER_GROUP
            )
    return Written(
        ratings={split: ratings[split].num_rows for split in SPLITS if split in ratings},
        users=len(distinct(ratings, "user_id")),
        items=len(items),
        rating_scale=data.rating_scale,
    )


def check_out(out: str) -> None:
    """Raise UserError unless `out` is a new or empty folder that can be written."""
    if files := list_files(out):
        name = files[0].removeprefix(f"{out.rstrip('/')}/")
        raise InputError(f"out {out}: holds {name}; expected a new or empty folder; give another or empty it")
    require_writable(out, "out")


def with_images(data: PublishedData, *, allow_missing: bool) -> Ratings:
    """Return the ratings of items that have an image. Raises InputError for others, unless allowed."""
    rated = data.rated
    missing = [item for item in rated if item not in data.available]
    if not missing:
        return data.ratings
    is_present = {
        split: pc.is_in(table["item_id"], value_set=pa.array(sorted(data.available), pa.string()))
        for split, table in data.ratings.items()
    }
    ratings = {split: table.filter(is_present[split]) for split, table in data.ratings.items()}
    lost = sum(data.ratings[split].num_rows - table.num_rows for split, table in ratings.items())
    names = ", ".join([*map(shown, missing[:MAX_NAMED]), *(["…"] if len(missing) > MAX_NAMED else [])])
    problem = (
        f"{data.name} {data.source}: {len(missing):,} of {len(rated):,} rated images are missing ({names})"
    )
    if not allow_missing:
        raise InputError(
            f"{problem}; expected every rated image; get them, or leave out their {lost:,} ratings with "
            "--allow-missing"
        )
    log.warning(f"{problem}; their {lost:,} ratings are left out")
    return {split: table for split, table in ratings.items() if table.num_rows}


def write_items(data: PublishedData, items: set[str], folder: str) -> None:
    """Write the images of `items`, GROUPS_PER_FILE row groups per file, with one row group in memory.

    Raises InputError if an image disappeared since it was listed.
    """
    tables = data.read_images(items)
    rows = 0
    with counting("import images", len(items)) as counted:
        for number in range(len(items)):
            if (first := next(tables, None)) is None:
                break
            written = write_tables(
                chain([first], islice(tables, GROUPS_PER_FILE - 1)),
                schemas.ITEMS,
                join(folder, f"part-{number:05d}.parquet"),
                row_group_size=IMAGES_PER_GROUP,
            )
            rows += written["rows"]
            counted.add(written["rows"])
    if rows != len(items):
        raise InputError(
            f"{data.name} {data.source}: {rows:,} images were read, {len(items):,} expected; "
            "it was changed meanwhile; run again"
        )


@contextmanager
def new_folder(out: str) -> Iterator[str]:
    """Yield a folder to write into. After an error nothing is left; on a disk, `out` appears at the end."""
    filesystem, path = open_filesystem(out)
    target = Path(path).resolve() if is_local(filesystem) else None
    folder = str(partial_of(target)) if target else out
    try:
        yield folder
        if target:
            sync_files(folder)
            with storage_errors(out):
                make_folder(target.parent)
                Path(folder).replace(target)
                sync(target.parent)
    except BaseException:
        with suppress(*failure_types()):  # or it would hide the first error
            delete(folder)
        raise
