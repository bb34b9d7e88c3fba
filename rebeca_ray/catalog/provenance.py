"""Check the provenance of a snapshot's images: the marks that the metadata of their files promises."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow.parquet as pq

from rebeca_ray import schemas
from rebeca_ray.catalog.manifest import FileRow
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.catalog.read_errors import explained
from rebeca_ray.catalog.verify import Level, spread
from rebeca_ray.provenance.marks import defect_of, load_c2pa
from rebeca_ray.storage.filesystem import join, open_filesystem

SHOWN = 10  # failures that are listed, of all files
Checked = list[tuple[str, str | None]]  # per image: the expected mark, and the defect if any


@dataclass(frozen=True, kw_only=True)
class ProvenanceCheck:
    """The outcome of a check: images by the mark that they must have, and those without it."""

    checked: dict[str, int]
    failed: int
    defects: list[str]  # the first of them

    @property
    def total(self) -> int:
        return sum(self.checked.values())


def check_provenance(snapshot: Snapshot, level: Level) -> ProvenanceCheck:
    """Check the marks of a sample of images, 20 each in 20 files; with the level `full`, of all.

    Raises InputError if a file holds signed images, and the package c2pa is not installed.
    """
    files = spread([row for row in snapshot.files.to_pylist() if row["table"] == "images"], level)

    def check(row: FileRow) -> Checked:
        with explained(snapshot, row["path"]):
            return check_file(snapshot, row, level)

    with ThreadPoolExecutor(16) as pool:
        checked = [image for images in pool.map(check, files) for image in images]
    defects = [defect for _, defect in checked if defect]
    lines = defects[:SHOWN]
    if len(defects) > SHOWN:
        lines.append(f"provenance: {len(defects) - SHOWN:,} more images without their mark")
    counts = Counter(mark for mark, _ in checked)
    return ProvenanceCheck(checked=dict(sorted(counts.items())), failed=len(defects), defects=lines)


def check_file(snapshot: Snapshot, row: FileRow, level: Level) -> Checked:
    filesystem, root = open_filesystem(snapshot.root)
    with filesystem.open(join(root, row["path"]), "rb") as file:
        table = pq.read_table(file, columns=["item_id", "image"])
    mark = schemas.mark_of(table.schema)
    if mark == "c2pa":
        load_c2pa(f"catalog {snapshot.root}: its images are signed")
    checked: Checked = []
    for image in spread([image for image in table.to_pylist() if image["image"]], level):
        kind = image["image"]["path"].rpartition(".")[2]
        defect = defect_of(image["image"]["bytes"], kind, image["item_id"], mark)
        checked.append((mark, defect and f"{row['path']}: item {image['item_id']}: {defect}"))
    return checked
