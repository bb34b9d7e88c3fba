"""Garbage collection: snapshots beyond those kept, runs that were given up, images without a reference.

The record goes first (a manifest, a run's `run.json`), then everything it refers to: a collection that dies
on the way has only left more to collect.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.manifest import Manifest
from rebeca_ray.catalog.pointer import Pointer, read_pointer
from rebeca_ray.catalog.read import open_snapshot
from rebeca_ray.catalog.runs import unfinished_runs
from rebeca_ray.catalog.snapshots import LEASE_SECONDS, read_manifests
from rebeca_ray.errors import InputError
from rebeca_ray.storage.filesystem import delete, delete_files, join, list_files, list_folders
from rebeca_ray.storage.leftovers import remove_leftovers

MAX_HOURS = 100_000


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """Everything a collection removes, in its order."""

    manifests: list[str]  # of snapshots, which are gone from here on
    folders: list[str]  # of those snapshots, of runs given up, and leftovers of a collection that died
    files: list[str]  # images, and tables of snapshots with other files still in use
    kept: list[str]  # run ids of the snapshots that stay


def collect(root: str, *, keep: int, grace_hours: float, dry_run: bool = False) -> Garbage:
    """Remove everything that no kept snapshot and no unfinished run needs, and return it.

    Kept are the published snapshot and the one it followed, the `keep` that were published last, and every
    snapshot that was published or made within the last `grace_hours`, so that a reader who holds it can
    finish. Unfinished runs are kept for `grace_hours` after they began. Raises LeaseHeldError while a run is
    at work.
    """
    if read_pointer(root)[1] is None:
        raise InputError(f"catalog {root}: there is none (no latest.json); give the root of one")
    if not (keep > 0 and 0 <= grace_hours <= MAX_HOURS):
        raise InputError(
            f"keep {keep}, grace_hours {grace_hours}: keep at least one, for 0 to {MAX_HOURS:,} hours"
        )
    with hold_lease(root, "gc", LEASE_SECONDS):
        garbage = find_garbage(root, keep=keep, now=datetime.now(UTC), grace=timedelta(hours=grace_hours))
        if not dry_run:
            remove(garbage)
            remove_leftovers(root, datetime.now(UTC) - timedelta(hours=grace_hours))
    return garbage


def remove(garbage: Garbage) -> None:
    for manifest in garbage.manifests:
        delete(manifest)
    for folder in garbage.folders:
        if folder.rpartition("/")[0].endswith("/work"):
            delete(join(folder, "run.json"))
        delete(folder)
    delete_files(garbage.files)


def find_garbage(root: str, *, keep: int, now: datetime, grace: timedelta) -> Garbage:
    """Return everything that may be removed, in its order.

    Raises InputError for a manifest that cannot be read: nobody knows which files its snapshot needs.
    """
    root = root.rstrip("/")
    snapshots, errors = read_manifests(root)
    for folder, error in errors.items():
        raise InputError(f"{error}; nothing was collected: remove or restore {join(root, folder)} first")
    recent = {run.run_id for run in unfinished_runs(root).values() if now - run.began_at < grace}
    kept = kept_snapshots(snapshots, read_pointer(root)[0], keep, now, grace)
    kept |= {manifest.run_id for manifest in snapshots if manifest.run_id in recent}
    needed = {
        path
        for manifest in snapshots
        if manifest.run_id in kept
        for path in open_snapshot(root, manifest.path).files["path"].to_pylist()
    }
    folders = [join(root, "work", name) for name in runs_in(root, "work") if run_of(name) not in recent]
    dead = [join(root, "images", name) for name in runs_in(root, "images") if run_of(name) not in recent]
    for date in list_folders(join(root, "snapshots")):
        names = list_folders(join(root, "snapshots", date))
        dead += [join(root, "snapshots", date, name) for name in names if run_of(name) not in kept | recent]
    files = []
    for folder in dead:
        existing = list_files(folder)
        unneeded = [file for file in existing if file.removeprefix(f"{root}/") not in needed]
        if len(unneeded) == len(existing):
            folders.append(folder)
        else:
            files += unneeded
    manifests = [
        join(root, manifest.path, "manifest.json") for manifest in snapshots if manifest.run_id not in kept
    ]
    return Garbage(manifests=manifests, folders=folders, files=files, kept=sorted(kept))


def runs_in(root: str, folder: str) -> list[str]:
    return list_folders(join(root, folder))


def run_of(name: str) -> str:
    return name.removeprefix("run_id=")


def kept_snapshots(
    snapshots: list[Manifest], pointer: Pointer, keep: int, now: datetime, grace: timedelta
) -> set[str]:
    """Return the run ids of the snapshots that stay.

    These are the published one and the one it followed, the `keep` that were published last, and those that
    were published, or made without being published, within the grace period.
    """
    replaced_at = {
        entry["run_id"]: datetime.fromisoformat(entry["replaced_at"])
        for entry in pointer.previously_published
    }
    # Each snapshot counts from its last publication.
    before = dict.fromkeys(
        entry["run_id"]
        for entry in reversed(pointer.previously_published)
        if entry["run_id"] != pointer.run_id
    )
    kept = {run_id for run_id in (pointer.run_id, *[*before][: keep - 1]) if run_id}
    # A lost latest.json has forgotten all publications: then the newest publishable snapshots stand in.
    publishable = [
        manifest.run_id
        for manifest in reversed(snapshots)
        if (manifest.gate.forced or not manifest.gate.refused) and manifest.run_id not in kept
    ]
    kept.update(publishable[: max(0, keep - len(kept))])
    for manifest in snapshots:
        if manifest.run_id == pointer.run_id and manifest.previous_run_id:
            kept.add(manifest.previous_run_id)
        ended_at = replaced_at.get(manifest.run_id, datetime.fromisoformat(manifest.created_at))
        if now - ended_at < grace:
            kept.add(manifest.run_id)
    return kept & {manifest.run_id for manifest in snapshots}
