"""The inputs beside a catalog, if they are given: a user's ratings, and the images of the real items."""

import threading
from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rebeca_ray import schemas
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data.interactions import normalise, open_interactions
from rebeca_ray.data.validation import check_columns
from rebeca_ray.errors import InputError
from rebeca_ray.storage.filesystem import arrow_filesystem, open_filesystem, unreadable
from rebeca_ray.storage.parquet import open_parquet
from rebeca_ray.storage.store import failure_types

ROWS_AT_ONCE = 500_000
USERS_REMEMBERED = 256
LIKED_SHOWN = 60


@dataclass(frozen=True)
class Liked:
    """One item that a user likes. Without ratings every interaction is a like."""

    item_id: str
    rating: float | None
    time: datetime | None


class Histories:
    """The ratings of users. Each user costs one pass over the interactions, and is remembered for a while."""

    def __init__(self, settings: InteractionSettings) -> None:
        self.settings = settings
        self.columns = check_columns(open_interactions(settings), schemas.INTERACTIONS)
        self.lock = threading.Lock()
        self.remembered: OrderedDict[tuple[str, str], pa.Table] = OrderedDict()

    def liked_by(self, user_id: str) -> tuple[int, list[Liked]]:
        """Return the number of a user's likes, and the latest LIKED_SHOWN of them."""
        rows = self.ratings_of(user_id)
        if "rating" in rows.column_names:
            least = pa.scalar(self.settings.like_threshold, rows["rating"].type)  # 0.7 as the ratings hold it
            rows = rows.filter(pc.greater_equal(rows["rating"], least))
        if "timestamp" in rows.column_names:
            rows = rows.sort_by([("timestamp", "descending")])
        liked = [
            Liked(row["item_id"], row.get("rating"), row.get("timestamp"))
            for row in rows.slice(0, LIKED_SHOWN).to_pylist()
        ]
        return rows.num_rows, liked

    def ratings_of(self, user_id: str) -> pa.Table:
        """Return all ratings of a user, as `schemas.INTERACTIONS` without impressions."""
        with self.lock:  # one pass at a time
            interactions = open_interactions(self.settings)
            key = (user_id, interactions.digest())
            if key not in self.remembered:
                parts = [
                    batch.filter(pc.equal(batch["user_id"], user_id))
                    for batch in interactions.batches(self.columns, ROWS_AT_ONCE)
                ]
                rows = pa.concat_tables([self.columns.empty_table(), *parts]).combine_chunks()
                self.remembered[key] = normalise(rows, self.settings.path)
                while len(self.remembered) > USERS_REMEMBERED:
                    self.remembered.popitem(last=False)
            return self.remembered[key]


class RealItems:
    """The images of the real items, as `rebeca embed` reads them. Raises InputError without such a column."""

    def __init__(self, uri: str) -> None:
        self.uri, self.input = uri, open_parquet(uri, "items")
        if "image" not in self.input.names:
            raise InputError(
                f"items {uri}: column 'image' is missing; give the items that `rebeca embed` reads, "
                "with their images"
            )

    @cached_property
    def rows(self) -> tuple[pa.Array, pa.Array]:
        """All ids, sorted, and the row of each."""
        table = self.input.read(pa.schema([schemas.ITEMS.field("item_id")]))
        ids = table["item_id"].combine_chunks()
        order = pc.sort_indices(ids)
        return ids.take(order), order

    def image(self, item_id: str) -> bytes | None:
        """Return the encoded image of an item, None for an unknown one. Reads one row group."""
        ids, order = self.rows
        position = bisect_left(ids, item_id, key=lambda value: value.as_py())
        if position == len(ids) or ids[position].as_py() != item_id:
            return None
        row, filesystem = order[position].as_py(), open_filesystem(self.uri)[0]
        for file, header in zip(self.input.files, self.input.headers, strict=True):
            if row >= header.num_rows:
                row -= header.num_rows
                continue
            try:
                with arrow_filesystem(filesystem).open_input_file(file.file.path) as source:
                    return image_in_row(pq.ParquetFile(source, metadata=header.metadata), row)
            except (pa.ArrowException, *failure_types()) as error:
                raise unreadable(f"items {self.uri}", error) from None
        return None


def image_in_row(file: pq.ParquetFile, row: int) -> bytes | None:
    """Return the bytes of the column `image` in a row of a file."""
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if row < rows:
            image = file.read_row_group(group, columns=["image"], use_threads=False)["image"][row].as_py()
            return image if isinstance(image, bytes) else (image or {}).get("bytes")
        row -= rows
    return None
