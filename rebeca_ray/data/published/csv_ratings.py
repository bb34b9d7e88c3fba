"""Ratings in a CSV file of any names, beside a folder of images.

SOURCE (user_id, item_id, rating, timestamp if present), IMAGES/<item_id>, with or without its suffix
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.data.published.dataset import TRAIN, PublishedData
from rebeca_ray.data.published.image_files import find_images, reader_of
from rebeca_ray.data.published.rows import Rows, read_csv
from rebeca_ray.errors import InputError, did_you_mean, shown
from rebeca_ray.storage.columns import TIME, parse

COLUMNS = ("user_id", "item_id", "rating", "timestamp")
TIMES = r"^([-+]?\d+|\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[-+]\d\d(:?\d\d)?)?)?)$"


def column_names(pairs: Iterable[str], optional: Sequence[str] = ()) -> dict[str, str]:
    """Return the names in the file by column, from texts such as `user_id=rater`.

    Those of `optional` columns may be empty.
    Raises InputError for an unknown column and for a text of another form.
    """
    names, known = {}, sorted({*COLUMNS, *optional})
    for pair in pairs:
        column, equals, name = pair.partition("=")
        if not (equals and (name or column in optional)):
            raise InputError(f"column {shown(pair)}: no name in it; expected the form user_id=rater")
        if column not in known:
            raise InputError(f"column {shown(column)}: unknown; {did_you_mean(column, known)}")
        names[column] = name
    return names


def read_csv_ratings(
    source: str, images: str, names: Mapping[str, str] | None = None, *, keep_last: bool = False
) -> PublishedData:
    """Read ratings of any scale, and the images that they name. Raises InputError, naming line and value."""
    stored = {column: column for column in COLUMNS} | dict(names or {})
    required = [stored[column] for column in COLUMNS[:3]]
    time = stored["timestamp"]
    is_named = "timestamp" in (names or {})
    rows = read_csv(source, [*required, time] if is_named else required, () if is_named else [time])
    user, item, rating = required
    columns = {
        "user_id": rows.texts(user),
        "item_id": rows.texts(item),
        "rating": rows.numbers(rating, -np.inf, np.inf),
    }
    if time in rows.table.column_names:
        columns["timestamp"] = times(rows, time)
    ratings = {TRAIN: rows.without_repeats(pa.table(columns), keep_last=keep_last)}
    files = files_by_item(images)
    return PublishedData(
        name="csv",
        source=source,
        ratings=ratings,
        available=frozenset(files),
        read_images=reader_of(files),
    )


def times(rows: Rows, column: str) -> pa.Array:
    """Return a column of times: ISO 8601 or Unix seconds, null where the cell is empty."""
    values = pc.utf8_trim_whitespace(rows.table[column].combine_chunks())
    is_time = pc.fill_null(pc.match_substring_regex(values, TIMES), True)
    expected, remedy = "expected a time as ISO 8601 or Unix seconds", "correct it or empty the cell"
    rows.refuse(pc.invert(is_time), column, expected, remedy)
    try:
        return parse(values, TIME)
    except pa.ArrowException as error:
        raise InputError(f"{rows.uri}: column {column} ({error}); {expected}; {remedy}") from None


def files_by_item(images: str) -> dict[str, str]:
    """Return the file of each item: by its name, and by its name without the suffix if that is one file's."""
    files = find_images(images)
    short: dict[str, list[str]] = {}
    for name, uri in files.items():
        short.setdefault(str(PurePosixPath(name).with_suffix("")), []).append(uri)
    return {name: uris[0] for name, uris in short.items() if len(uris) == 1} | files
