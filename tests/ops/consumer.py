"""A ranking service that reads the published catalog all the time, and counts incomplete answers."""

import threading
from collections import Counter

import pyarrow.compute as pc

from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.errors import InputError
from tests.ops.inputs import NUM_IMAGES


class Consumer:
    """Reads every user of the published snapshot again and again, with images, until `stop`."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.reads: Counter[str] = Counter()  # by run id
        self.problems: list[str] = []
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self) -> None:
        while not self.ended.wait(8):  # with less, it would take a core from the nights
            if read_pointer(self.root)[0].run_id is None:
                continue
            try:
                self.read()
            except InputError as error:
                if "refresh()" not in str(error):  # a snapshot that was rewritten meanwhile is opened again
                    self.problems.append(str(error))
            except Exception as error:  # of any kind: a whole snapshot can be read
                self.problems.append(f"{type(error).__name__}: {error}")

    def read(self) -> None:
        """Read all of the published snapshot, user by user; note each user without a full list."""
        snapshot = read_catalog(self.root)
        for user in snapshot.table("users")["user_id"].to_pylist():
            if self.ended.is_set():
                return
            items = snapshot.for_user(user)
            images = snapshot.images(items)
            ranks = items["rank"].to_pylist()
            distinct = pc.count_distinct(items["item_id"]).as_py()
            if sorted(ranks) != list(range(NUM_IMAGES)) or distinct != NUM_IMAGES:
                self.problems.append(f"run {snapshot.run_id}: a user has the ranks {ranks}")
            if not all(images):
                self.problems.append(f"run {snapshot.run_id}: a user lacks an image")
        self.reads[snapshot.run_id] += 1

    def stop(self) -> None:
        self.ended.set()
        self.thread.join(60)
