"""Folders that are replaced as a whole: a prior, or embedded items. Readers see one complete version.

<root>/<kind>.json, pointer and lease -> <root>/_versions/<fencing token>-<fingerprint>/

A writer fills a new folder, then moves the pointer. A version never changes. The previous one stays until the
next publication, so that its readers can finish. Without a pointer, files of the older layout may lie in the
root itself. Readers of Parquet folders take no name that begins with `_` for data.
"""

import datetime
import logging
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch

from rebeca_ray.catalog.layout import inside
from rebeca_ray.catalog.lease import Lease, hold_lease
from rebeca_ray.catalog.pointer import POINTERS_OF, Kind, damaged
from rebeca_ray.errors import UserError
from rebeca_ray.storage.filesystem import (
    delete,
    delete_files,
    join,
    list_files,
    list_folders,
    remove_empty_folders,
)
from rebeca_ray.storage.leftovers import remove_leftovers
from rebeca_ray.storage.objects import read_json

log = logging.getLogger(__name__)

VERSIONS = "_versions"
ROOT = ""  # the name of the version in the older layout
LEASE_SECONDS = 60.0
# The marker first: a folder without it holds no version of the older layout.
OLDER_LAYOUT: dict[Kind, tuple[str, ...]] = {
    "prior": ("config.json", "*.safetensors", "users.parquet", "training.csv", "README.md", "nightly.json"),
    "items": ("embedding.json", "*.parquet"),
}


def current_version(root: str, kind: Kind) -> str:
    """Return the folder of the published version at `root`; without one, `root` itself.

    Raises UserError for a pointer that is damaged or cannot be read.
    """
    snapshot = (read_json(join(root, POINTERS_OF[kind])) or {}).get("snapshot")
    if snapshot is None:
        return root
    try:
        return join(root, inside(snapshot))
    except (ValueError, AttributeError):
        raise damaged(root, kind) from None


class NewVersion:
    """A version that the one holder of the lease writes."""

    def __init__(self, root: str, kind: Kind, lease: Lease) -> None:
        self.root, self.kind, self.lease = root, kind, lease
        self.previous = current_version(root, kind)
        self.previous_name = ROOT if self.previous == root else self.previous.rpartition("/")[2]
        self.name: str | None = None
        # Whatever is newer than the published version was never finished: its writer held an earlier lease.
        # With the first token, the pointer is new or was lost: that costs no version before there is another.
        if lease.fencing_token > 1:
            self.remove(name for name in versions_in(root) if name > self.previous_name)

    def begin(self, fingerprint: str) -> str:
        """Return the folder for the files of the new version."""
        self.name = f"{self.lease.fencing_token:08d}-{fingerprint}"
        return join(self.root, VERSIONS, self.name)

    def publish(self, run_date: datetime.date, *, uses: Collection[str] = ()) -> None:
        """Point readers at the new version, and remove those before the previous one.

        `uses` names older versions, or the root, that hold files of these two. Raises LeaseHeldError if
        another writer holds the lease by now.
        """
        assert self.name is not None
        self.lease.publish(
            run_id=self.name, run_date=run_date.isoformat(), snapshot=f"{VERSIONS}/{self.name}"
        )
        kept = {self.name, self.previous_name, *uses}
        self.name = None
        self.remove(name for name in [ROOT, *versions_in(self.root)] if name not in kept)
        remove_leftovers(self.root)

    def discard(self) -> None:
        """Remove the new version if it is not published."""
        if self.name:
            self.remove([self.name])

    def remove(self, names: Iterable[str]) -> None:
        """Remove versions. A failure is only logged: the next writer removes the rest."""
        try:
            for name in names:
                if name == ROOT:
                    remove_older_layout(self.root, self.kind)
                else:
                    delete(join(self.root, VERSIONS, name))
        except UserError as error:
            log.warning("%s %s: an old version is not removed yet: %s", self.kind, self.root, error)


def versions_in(root: str) -> list[str]:
    """Return the names of all versions. Another folder beside them is not ours."""
    return [name for name in list_folders(join(root, VERSIONS)) if re.fullmatch(r"\d{8}-[\w.-]+", name)]


def remove_older_layout(root: str, kind: Kind) -> None:
    """Remove the files of a version of the older layout, its marker last."""
    marker, *others = OLDER_LAYOUT[kind]
    names = [uri.removeprefix(f"{root.rstrip('/')}/") for uri in list_files(root)]
    if marker in names:  # or they are somebody else's files
        old = [name for name in names if "/" not in name and any(fnmatch(name, other) for other in others)]
        delete_files([join(root, name) for name in [*old, marker]])


@contextmanager
def replace_version(root: str, kind: Kind, writer: str) -> Iterator[NewVersion]:
    """Hold the lease of `root` inside the block, which writes a new version. `writer` names it to others.

    A block that raises leaves the published version as it was. Raises LeaseHeldError if another writer is at
    work, or takes over.
    """
    with hold_lease(root, writer, LEASE_SECONDS, kind) as lease:
        version = NewVersion(root, kind, lease)
        try:
            yield version
        except Exception:
            version.discard()
            if lease.published is None and not versions_in(root):  # a first one that failed leaves nothing
                lease.remove_pointer()
                remove_empty_folders(root)
            raise
        finally:
            version.discard()
