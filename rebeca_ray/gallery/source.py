"""The snapshots that the gallery shows: the published one, which it follows, and others by run.

Every page names its snapshot, so that a page stays whole when another snapshot is published.
"""

import threading
import time
from collections import OrderedDict
from pathlib import PurePosixPath

from rebeca_ray.catalog.layout import snapshot_folder
from rebeca_ray.catalog.read import Snapshot, open_snapshot, read_catalog
from rebeca_ray.gallery.tables import Tables

SECONDS_BETWEEN_LOOKS = 1.0  # at the pointer
SNAPSHOTS = 4  # that stay open: a list of files takes some 100 bytes per file


class Source:
    """One catalog. Threads share it. Raises InputError if nothing is published there."""

    def __init__(self, root: str) -> None:
        self.published = read_catalog(root)
        self.root = self.published.root
        self.looked_at = time.monotonic()
        self.lock, self.looking = threading.Lock(), threading.Lock()
        self.opened: OrderedDict[str, Tables] = OrderedDict()

    def current(self) -> Tables:
        """Return the tables of the published snapshot. Raises StorageError if the store does not answer."""
        due = time.monotonic() - self.looked_at >= SECONDS_BETWEEN_LOOKS
        # One thread looks, and the others show the last snapshot meanwhile: a slow store delays one page.
        if due and self.looking.acquire(blocking=False):
            try:
                self.looked_at = time.monotonic()
                self.published = self.published.refresh()
            finally:
                self.looking.release()
        with self.lock:
            return self.keep(self.published.path, self.published)

    def at(self, date: str, run_id: str) -> Tables:
        """Return the tables of a run's snapshot. Raises InputError if it is gone."""
        path = snapshot_folder(date, run_id)
        with self.lock:
            if path in self.opened:
                return self.keep(path, self.opened[path].snapshot)
        snapshot = open_snapshot(self.root, path)
        with self.lock:
            return self.keep(path, snapshot)

    def keep(self, path: str, snapshot: Snapshot) -> Tables:
        """Return the tables of a snapshot, and forget those that nobody looked at for longest."""
        tables = self.opened.pop(path, None) or Tables(snapshot)
        self.opened[path] = tables
        while len(self.opened) > SNAPSHOTS:
            self.opened.popitem(last=False)
        return tables


def is_one_name(text: str) -> bool:
    """Return whether a text of an address is one name of a folder."""
    return bool(text) and PurePosixPath(text).name == text and text not in (".", "..")
