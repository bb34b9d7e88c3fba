"""All snapshots of a catalog, and publishing one of them by hand. For those who run it: readers follow the pointer."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rebeca_ray.catalog.layout import work_folder
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.catalog.read import open_snapshot
from rebeca_ray.catalog.verify import verify
from rebeca_ray.errors import InputError, QualityGateError
from rebeca_ray.storage.filesystem import delete, join, list_files
from rebeca_ray.storage.objects import read_json

LEASE_SECONDS = 60


def list_snapshots(root: str) -> list[dict[str, Any]]:
    """The manifests of all complete snapshots, the oldest first, each with its folder below the root under `path`."""
    files = list_files(join(root, "snapshots"), "/manifest.json")
    with ThreadPoolExecutor(16) as pool:
        manifests = list(pool.map(read_json, files))
    folders = [file.removeprefix(f"{root.rstrip('/')}/").removesuffix("/manifest.json") for file in files]
    found = [
        {**manifest, "path": folder} for manifest, folder in zip(manifests, folders, strict=True) if manifest
    ]
    return sorted(found, key=lambda manifest: (manifest["created_at"], manifest["epoch"]))


def find_snapshot(root: str, run_id: str) -> dict[str, Any]:
    """The manifest of one run. Raises UserError, naming those there are, if it has none."""
    there = list_snapshots(root)
    for manifest in there:
        if manifest["run_id"] == run_id:
            return manifest
    known = ", ".join(manifest["run_id"] for manifest in there[-5:]) or "none"
    raise InputError(f"catalog {root}: run {run_id} has no complete snapshot; the latest are: {known}")


def publish_snapshot(root: str, run_id: str) -> dict[str, Any]:
    """Point readers at a complete snapshot, also at one that the quality gate refused (the pointer then says so); returns its manifest.

    Raises UserError if there is no such snapshot or a file of it is missing, LeaseHeldError while a run is at work.
    """
    find_snapshot(root, run_id)  # a slip of the keyboard writes nothing
    with hold_lease(
        root, f"publish of {run_id}", LEASE_SECONDS
    ) as lease:  # from here on nothing is collected
        manifest = find_snapshot(root, run_id)
        if wrong := verify(open_snapshot(root, manifest["path"]), "metadata"):
            raise QualityGateError(
                f"catalog {root}: run {run_id} is not published: {wrong[0]} ({len(wrong)} such)"
            )
        lease.publish(
            run_id=run_id,
            run_date=manifest["run_date"],
            snapshot=manifest["path"],
            forced=bool(manifest["gate"]["refused"]),
        )
        delete(work_folder(root, run_id))  # there is nothing left to go on with
    return manifest


def roll_back(root: str) -> dict[str, Any]:
    """Publish the snapshot that the published one followed; returns its manifest. Raises UserError if it is gone."""
    pointer, _ = read_pointer(root)
    if pointer.run_id is None:
        raise InputError(f"catalog {root}: nothing is published there; there is nothing to roll back")
    before = find_snapshot(root, pointer.run_id)["previous"]
    if before is None:
        raise InputError(
            f"catalog {root}: run {pointer.run_id} is the first there was; publish another with `rebeca catalog publish`"
        )
    return publish_snapshot(root, before)
