"""Collecting what nobody needs any more: snapshots beyond those kept, runs that were given up, images nothing points to.

What makes a thing visible goes first (a manifest, a run's `run.json`), what it pointed to after it: a collection that dies on the way
has only left more to collect.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.pointer import Pointer, read_pointer
from rebeca_ray.catalog.read import open_snapshot
from rebeca_ray.catalog.runs import unfinished_runs
from rebeca_ray.catalog.snapshots import LEASE_SECONDS, list_snapshots
from rebeca_ray.errors import InputError
from rebeca_ray.storage.filesystem import delete, delete_files, join, list_files, list_folders

MAX_HOURS = 100_000


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """What a collection removes, in its order."""

    manifests: list[str]  # of snapshots: they are gone from here on
    folders: list[str]  # of those snapshots, of runs given up, and what a collection that died left
    files: list[str]  # images, and tables of snapshots of which others are still referred to
    kept: list[str]  # run ids of the snapshots that stay


def collect(root: str, *, keep: int, grace_hours: float, dry_run: bool = False) -> Garbage:
    """Remove what no kept snapshot and no unfinished run needs; returns it.

    Kept are the published snapshot and the one it followed, the `keep` that were published last, and whatever was published or made
    within the last `grace_hours`, so that a reader who holds it can finish. Unfinished runs stay as long, from when they were begun.
    Raises LeaseHeldError while a run is at work.
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
    """What may go, and in which order."""
    root = root.rstrip("/")
    snapshots = list_snapshots(root)
    begun = {
        run_id: told
        for run_id, told in unfinished_runs(root).items()
        if now - datetime.fromisoformat(told["begun_at"]) < grace
    }
    kept = kept_snapshots(snapshots, read_pointer(root)[0], keep, now, grace)
    kept += [manifest for manifest in snapshots if manifest["run_id"] in begun and manifest not in kept]
    kept_ids = {manifest["run_id"] for manifest in kept}
    alive = kept_ids | set(begun)
    needed = {
        path for manifest in kept for path in open_snapshot(root, manifest["path"]).files["path"].to_pylist()
    }
    folders = [
        join(root, "work", name)
        for name in list_folders(join(root, "work"))
        if name.removeprefix("run_id=") not in begun
    ]
    dead = [
        join(root, "images", name)
        for name in list_folders(join(root, "images"))
        if name.removeprefix("run_id=") not in begun
    ]
    for date in list_folders(join(root, "snapshots")):
        names = list_folders(join(root, "snapshots", date))
        dead += [
            join(root, "snapshots", date, name) for name in names if name.removeprefix("run_id=") not in alive
        ]
    files = []
    for folder in dead:
        there = list_files(folder)
        unneeded = [file for file in there if file.removeprefix(f"{root}/") not in needed]
        if len(unneeded) == len(there):
            folders.append(folder)
        else:
            files += unneeded
    manifests = [
        join(root, manifest["path"], "manifest.json")
        for manifest in snapshots
        if manifest["run_id"] not in kept_ids
    ]
    return Garbage(manifests=manifests, folders=folders, files=files, kept=sorted(kept_ids))


def kept_snapshots(
    snapshots: list[dict[str, Any]], pointer: Pointer, keep: int, now: datetime, grace: timedelta
) -> list[dict[str, Any]]:
    """Of snapshots those that stay: the published one and the one it followed, the `keep` that were published last, and, within the grace
    period, whatever was published until then or was made and not published."""
    before = {left["run_id"]: datetime.fromisoformat(left["at"]) for left in pointer.left}
    left = dict.fromkeys(
        left["run_id"] for left in reversed(pointer.left) if left["run_id"] != pointer.run_id
    )  # each when it was last
    latest = {run_id for run_id in (pointer.run_id, *[*left][: keep - 1]) if run_id}
    shown = [
        manifest["run_id"]
        for manifest in reversed(snapshots)
        if manifest["gate"]["forced"] or not manifest["gate"]["refused"]
    ]
    made = [run_id for run_id in shown if run_id not in latest]
    latest.update(
        made[: max(0, keep - len(latest))]
    )  # where latest.json was lost, it has forgotten what was published
    latest |= {manifest["previous"] for manifest in snapshots if manifest["run_id"] == pointer.run_id}
    ends = {
        manifest["run_id"]: before.get(manifest["run_id"], datetime.fromisoformat(manifest["created_at"]))
        for manifest in snapshots
    }
    return [
        manifest
        for manifest in snapshots
        if manifest["run_id"] in latest or now - ends[manifest["run_id"]] < grace
    ]
