"""Small trees in the published layouts. The bytes of an image are its name, unless others are given."""

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rebeca_ray.storage.parquet import read_table

FLICKR_CSV = "FLICKR-AES_image_labeled_by_each_worker.csv"
FLICKR = " worker, imagePair, score\nA1, a.jpg, 5\nA1,b.jpg,2\nB2,a.jpg,1\n"
LAPIS_CSV = "annotation/LAPIS_individualratings_metaANDdemodata.csv"
LAPIS = (
    "participant_id,image_filename,age,response\n"
    '7,cubism/a.jpg,"20,\nabout",88.5\n7,realism/b.jpg,20,0\n8,cubism/a.jpg,31,\n8,pop/c.jpg,31,100\n'
)
PAMELA: dict[str, list[tuple[Any, str, Any]]] = {
    "pamela_train": [("p1", "images/x/a.png", 5), ("p2", "./images/b.png", 1.5)],
    "pamela_val_seen": [("p1", "images/b.png", 3)],
    "pamela_val_unseen": [("p3", "PAMELA/images/b.png", 4)],
    "pamela_test_seen": [("p2", "images/c.png", 2)],
    "pamela_test_unseen": [(9, "images/c.png", 4)],
}
# user, uid and label of both images, and the day: a1 wins, then loses; a tie; a pair without a label.
PAIRS: dict[str, list[tuple[int, str, str, float | None, float | None, int]]] = {
    "train": [
        (1, "a1", "a2", 1.0, 0.0, 1),
        (1, "a1", "a3", 0.0, 1.0, 2),
        (2, "b1", "b2", 0.5, 0.5, 3),
        (2, "b1", "b3", None, None, 3),
        (2, "b1", "b1", 1.0, 0.0, 3),
    ],
    "validation": [(3, "c1", "c2", 0.0, 1.0, 4)],
    "test": [(3, "d1", "d2", 1.0, 0.0, 5)],
}


def write_images(folder: Path, names: Iterable[str], data: Mapping[str, bytes] | None = None) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((data or {}).get(name, name.encode()))


def write_flickr(folder: Path, text: str = FLICKR, images: Iterable[str] = ("a.jpg", "b.jpg")) -> str:
    write_images(folder / "40K", [*images, "unrated.jpg", "._a.jpg"])
    (folder / FLICKR_CSV).write_text(text)
    return str(folder)


def write_lapis(folder: Path, text: str = LAPIS, *, sets: Mapping[str, str] | None = None) -> str:
    write_images(folder / "images", ["a.jpg", "b.jpg", "c.jpg"])
    (folder / LAPIS_CSV).parent.mkdir()
    (folder / LAPIS_CSV).write_text(text)
    (folder / "imageset").mkdir()
    for name, lines in (sets or {"Train": "a.jpg\n", "Val": "b.jpg\n", "Test": "c.jpg\n"}).items():
        (folder / "imageset" / f"{name}ImageSet.txt").write_text(lines)
    return str(folder)


def write_pamela(folder: Path, **changes: list[tuple[Any, str, Any]]) -> str:
    write_images(folder / "images", ["x/a.png", "b.png", "c.png"])
    (folder / "annotations").mkdir()
    for name, entries in {**PAMELA, **changes}.items():
        records = [
            {
                "participant_id": user,
                "image_id": 1,
                "image_path": path,
                "original_score": score,
                "image_metadata": {"style": None},
            }
            for user, path, score in entries
        ]
        (folder / "annotations" / f"{name}.json").write_text(json.dumps(records))
    return str(folder)


def pairs_table(rows: list[tuple[Any, ...]], *, without: Iterable[str] = ()) -> pa.Table:
    """Return pairs in the columns of Pick-a-Pic, among others. The images in `without` are null."""
    jpgs = [
        [None if row[side] in set(without) else f"jpg {row[side]}".encode() for row in rows]
        for side in (1, 2)
    ]
    return pa.table(
        {
            "best_image_uid": ["-"] * len(rows),
            "created_at": pa.array([datetime(2023, 1, row[5]) for row in rows], pa.timestamp("ns")),
            "has_label": [row[3] is not None for row in rows],
            "image_0_uid": [row[1] for row in rows],
            "image_1_uid": [row[2] for row in rows],
            "jpg_0": pa.array(jpgs[0], pa.binary()),
            "jpg_1": pa.array(jpgs[1], pa.binary()),
            "label_0": pa.array([row[3] for row in rows], pa.float64()),
            "label_1": pa.array([row[4] for row in rows], pa.float64()),
            "user_id": pa.array([row[0] for row in rows], pa.int64()),
        }
    )


def write_pairs(folder: Path, *, without: Iterable[str] = (), **changes: list[tuple[Any, ...]]) -> str:
    (folder / "data").mkdir(parents=True)
    for split, rows in {**PAIRS, **changes}.items():
        table = pairs_table(rows, without=without)
        pq.write_table(table, folder / "data" / f"{split}-00000-of-00001-0a1b2c.parquet", row_group_size=2)
    repeated = pairs_table([(99, "e1", "e2", 1.0, 0.0, 1)])
    pq.write_table(repeated, folder / "data" / "test_unique-00000-of-00001-0a1b2c.parquet")
    return str(folder)


def rows_of(out: Path | str, name: str = "interactions") -> list[tuple[Any, ...]]:
    """Return the rows of a written split, sorted."""
    rows = read_table(f"{out}/{name}.parquet", name).to_pylist()
    return sorted((tuple(row.values()) for row in rows), key=repr)


def images_of(out: Path) -> dict[str, tuple[bytes, str]]:
    """Return the bytes and the path of each written image by item."""
    rows = read_table(str(out / "items"), "items").to_pylist()
    assert len({row["item_id"] for row in rows}) == len(rows)
    return {row["item_id"]: (row["image"]["bytes"], row["image"]["path"]) for row in rows}
