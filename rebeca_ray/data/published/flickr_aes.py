"""FLICKR-AES (Ren et al. 2017): photos of Flickr, rated from 1 to 5 by workers.

SOURCE/FLICKR-AES_image_labeled_by_each_worker.csv (worker, imagePair, score), SOURCE/40K/<photo>

The authors publish no list of test workers, so there is one split.
"""

import pyarrow as pa

from rebeca_ray.data.published.dataset import TRAIN, PublishedData, counts_of, warn_of_counts
from rebeca_ray.data.published.image_files import find_images, reader_of
from rebeca_ray.data.published.rows import read_csv
from rebeca_ray.storage.filesystem import join

NAME = "FLICKR-AES"
RATINGS, IMAGES = "FLICKR-AES_image_labeled_by_each_worker.csv", "40K"
PUBLISHED = {"users": 210, "images": 40_988, "ratings": 193_208}


def read_flickr_aes(source: str, *, keep_last: bool = False) -> PublishedData:
    """Read FLICKR-AES. An item's id is the name of its photo. Raises InputError, naming line and value."""
    rows = read_csv(join(source, RATINGS), ("worker", "imagePair", "score"))
    table = pa.table(
        {
            "user_id": rows.texts("worker"),
            "item_id": rows.texts("imagePair"),
            "rating": rows.numbers("score", 1, 5, whole=True),
        }
    )
    ratings = {TRAIN: rows.without_repeats(table, keep_last=keep_last)}
    warn_of_counts(f"{NAME} {source}", {**counts_of(ratings), "ratings": table.num_rows}, PUBLISHED)
    files = find_images(join(source, IMAGES))
    return PublishedData(
        name=NAME,
        source=source,
        ratings=ratings,
        available=frozenset(files),
        read_images=reader_of(files),
    )
