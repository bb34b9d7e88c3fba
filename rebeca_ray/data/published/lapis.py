"""LAPIS (Maerten et al. 2025): artworks, rated from 0 to 100.

SOURCE/annotation/LAPIS_individualratings_metaANDdemodata.csv (participant_id, image_filename, response),
SOURCE/images/<image>, and the split by image in SOURCE/imageset/{Train,Val,Test}ImageSet.txt
"""

import logging

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.data.published.dataset import (
    TEST,
    TRAIN,
    VALIDATION,
    PublishedData,
    by_split,
    counts_of,
    warn_of_counts,
)
from rebeca_ray.data.published.image_files import find_images, read_file, reader_of
from rebeca_ray.data.published.rows import Rows, read_csv
from rebeca_ray.errors import InputError, shown
from rebeca_ray.storage.filesystem import exists, join

log = logging.getLogger(__name__)

NAME = "LAPIS"
RATINGS, IMAGES = "annotation/LAPIS_individualratings_metaANDdemodata.csv", "images"
COLUMNS = ("participant_id", "image_filename", "response")
SETS = {
    TRAIN: "imageset/TrainImageSet.txt",
    VALIDATION: "imageset/ValImageSet.txt",
    TEST: "imageset/TestImageSet.txt",
}
SCALE = (0.0, 100.0)
PUBLISHED = {"images": 11_723}


def read_lapis(source: str, *, keep_last: bool = False) -> PublishedData:
    """Read LAPIS with the authors' split by image. An item's id is the name of its image.

    Rows without a response are no ratings: they are left out and counted. Raises InputError, naming line and
    value, for an image on two lists.
    """
    rows = rated_rows(read_csv(join(source, RATINGS), COLUMNS))
    paths = rows.texts("image_filename").to_pylist()
    table = pa.table(
        {
            "user_id": rows.texts("participant_id"),
            "item_id": pa.array([path.rsplit("/", 1)[-1] for path in paths], pa.string()),
            "rating": rows.numbers("response", *SCALE),
        }
    )
    table = rows.without_repeats(table, keep_last=keep_last)
    split_of = read_sets(source)
    unlisted = [item for item in pc.unique(table["item_id"]).to_pylist() if item not in split_of]
    if split_of and unlisted:
        log.warning(
            f"{NAME} {source}: {len(unlisted):,} rated images are on no list of {join(source, 'imageset')} "
            f"({', '.join(map(shown, unlisted[:3]))}); their ratings are for training"
        )
    ratings = by_split(table, pa.array([split_of.get(item, TRAIN) for item in table["item_id"].to_pylist()]))
    warn_of_counts(f"{NAME} {source}", counts_of(ratings), PUBLISHED)
    files = find_images(join(source, IMAGES))
    return PublishedData(
        name=NAME,
        source=source,
        ratings=ratings,
        available=frozenset(files),
        read_images=reader_of(files),
        rating_scale=SCALE,
    )


def rated_rows(rows: Rows) -> Rows:
    """Return the rows with a response, under their names in the whole file."""
    is_rated = pc.not_equal(pc.utf8_trim_whitespace(pc.fill_null(rows.table["response"], "")), "")
    indices = pc.indices_nonzero(is_rated).to_pylist()
    if empty := rows.table.num_rows - len(indices):
        log.warning(f"{rows.uri}: {empty:,} of {rows.table.num_rows:,} rows have no response; left out")
    if not indices:
        raise InputError(f"{rows.uri}: no row has a response; expected ratings; get the file again")
    return Rows(
        uri=rows.uri,
        table=rows.table.filter(is_rated),
        name_of_row=lambda row: rows.name_of_row(indices[row]),
    )


def read_sets(source: str) -> dict[str, str]:
    """Return the split of each listed image. Without the folder of the lists, it is empty, with a warning."""
    if not exists(join(source, "imageset")):
        log.warning(f"{NAME} {source}: has no folder imageset; all ratings are for training")
        return {}
    split_of: dict[str, str] = {}
    for split, name in SETS.items():
        uri = join(source, name)
        for number, line in enumerate(read_file(uri).decode("utf-8", "replace").splitlines(), 1):
            image = line.strip()
            if image and split_of.setdefault(image, split) != split:
                raise InputError(
                    f"{uri}: line {number} has {shown(image)}, also on the list {SETS[split_of[image]]}; "
                    "expected one list per image; remove it from one of them"
                )
    return split_of
