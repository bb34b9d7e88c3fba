"""A reader that polls a world, and one hash over all rows of a snapshot."""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.catalog.verify import verify

if TYPE_CHECKING:
    from tests.faults.world import World

# These differ between two runs of the same night: times, names of runs, and where an image lies.
VOLATILE = {"generated_at", "planned_on", "planned_by", "image_file", "image_row"}
KEYS = {"items": ("user_id", "rank"), "users": ("user_id",), "errors": ("item_id", "user_id")}
NOTHING = "nothing"  # is published


class View(NamedTuple):
    """Something to see: a cheap stamp that changes with it, and a hash of all of it."""

    name: str
    stamp: Callable[["World"], str | None]
    digest: Callable[["World"], str]


def rows_of(snapshot: Snapshot) -> list[str]:
    """Return a text for each row of the tables, in key order, with the hashes of its image bytes."""
    rows = []
    for name, keys in KEYS.items():
        table = snapshot.table(name).sort_by([(key, "ascending") for key in keys])
        if name == "items":
            images = [hashlib.sha256(image).hexdigest() for image in snapshot.images(table)]
            table = table.append_column("image", pa.array(images, pa.string()))
        table = table.drop_columns([*VOLATILE & {*table.column_names}])
        rows += [f"{name} {sorted(row.items())}" for row in table.to_pylist()]
    return rows


def published_digest(root: str) -> str:
    """Return one hash over all rows of the published snapshot. Raises AssertionError for a defect."""
    if read_pointer(root)[0].run_id is None:
        return NOTHING
    snapshot = read_catalog(root)
    defects = verify(snapshot, "full")
    assert not defects, defects[0]
    return hashlib.sha256("\n".join(rows_of(snapshot)).encode()).hexdigest()


class Reader:
    """Polls views, and reads all of whatever has a new stamp."""

    def __init__(self, world: "World", expected: dict[View, set[str]]) -> None:
        self.world, self.expected = world, expected
        self.stamps: dict[str, str | None] = {}
        self.half_seen: list[str] = []
        self.looking = False

    def look(self) -> None:
        """Note a content that is not one of those expected."""
        if self.looking:
            return
        self.looking = True
        try:
            for view, digests in self.expected.items():
                stamp = view.stamp(self.world)
                if stamp is not None and stamp != self.stamps.get(view.name):
                    self.stamps[view.name] = stamp
                    self.read(view, digests)
        finally:
            self.looking = False

    def read(self, view: View, digests: set[str]) -> None:
        try:
            if view.digest(self.world) not in digests:
                self.half_seen.append(f"{view.name}: is neither as before the command nor as after it")
        except Exception as error:  # of any kind: a whole view can be read
            self.half_seen.append(f"{view.name}: {type(error).__name__}: {error}")
