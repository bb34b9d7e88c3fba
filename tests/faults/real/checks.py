"""The checks of the real campaign: one hash of a snapshot, a reader that polls, files without an owner."""

import hashlib
import threading
from contextlib import suppress

import pyarrow as pa

from rebeca_ray.catalog.read import Snapshot, open_snapshot, published
from rebeca_ray.catalog.snapshots import list_snapshots
from rebeca_ray.errors import StorageError, UserError
from rebeca_ray.storage.filesystem import list_files

# Of one attempt alone: times, names of files, and the positions in them.
OF_AN_ATTEMPT = ("generated_at", "image_file", "image_row", "planned_by")


def fingerprint(snapshot: Snapshot) -> str:
    """Return one hash over all rows of users and items in key order, with the bytes of the images."""
    digest = hashlib.sha256()
    for name, keys in (("users", ("user_id",)), ("items", ("user_id", "rank", "item_id"))):
        table = snapshot.table(name)
        table = table.sort_by([(key, "ascending") for key in keys])
        images = snapshot.images(table) if name == "items" else []
        kept = table.drop_columns([column for column in OF_AN_ATTEMPT if column in table.column_names])
        digest.update(rows_as_bytes(kept))
        for image in images:
            digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()


def rows_as_bytes(table: pa.Table) -> bytes:
    return "\n".join(map(repr, table.to_pylist())).encode()


def lost_and_doubled(snapshot: Snapshot) -> tuple[int, int]:
    """Return the requested items that the snapshot lacks, and the items that it has twice."""
    item_ids = snapshot.items(["item_id"])["item_id"].to_pylist()
    counts = snapshot.manifest.counts
    shown = counts.new + counts.carried + counts.population
    accounted = shown + counts.failed + counts.filtered + counts.deferred
    return counts.requested - accounted, len(item_ids) - len(set(item_ids))


class Reader(threading.Thread):
    """Polls a catalog until it is stopped, and keeps the hash of every snapshot that it saw.

    A store that is down is no fault of the snapshot; every other error is.
    """

    def __init__(self, root: str, seconds: float = 0.5) -> None:
        super().__init__(name="reader", daemon=True)
        self.root, self.seconds = root, seconds
        self.hashes: dict[str, str] = {}  # by run id
        self.errors: list[str] = []
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(self.seconds):
            self.poll()

    def poll(self) -> None:
        """Read the published snapshot as a whole, if it is another one than before."""
        try:
            with suppress(StorageError):
                snapshot = published(self.root)
                if snapshot and snapshot.run_id not in self.hashes:
                    self.hashes[snapshot.run_id] = fingerprint(snapshot)
        except (UserError, OSError, KeyError, pa.ArrowException) as error:
            self.errors.append(f"{type(error).__name__}: {error}")

    def stop(self) -> None:
        self.done.set()
        self.join()
        self.poll()


def without_owner(root: str) -> list[str]:
    """Return the files of a catalog that no snapshot and no record of it names."""
    named = {"latest.json", ".latest.lock"}
    for manifest in list_snapshots(root):
        named |= {f"{manifest.path}/{name}" for name in ("manifest.json", ".manifest.lock")}
        named |= {manifest.files.path, f"runs/{manifest.run_id}.json"}
        named |= set(open_snapshot(root, manifest.path).files["path"].to_pylist())
    runs = {part.removeprefix("run_id=") for name in named for part in name.split("/") if "run_id=" in part}
    named |= {f"runs/{run_id}.json" for run_id in runs}
    files = [uri.removeprefix(f"{root}/") for uri in list_files(root)]
    return sorted(name for name in files if name not in named and not name.startswith("reports/"))
