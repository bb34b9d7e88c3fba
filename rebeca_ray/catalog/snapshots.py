"""All snapshots of a catalog, and publishing one of them by hand.

This is for operators. Readers follow the pointer.
"""

from concurrent.futures import ThreadPoolExecutor

from rebeca_ray.catalog.layout import work_folder
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.manifest import Manifest, read_manifest
from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.catalog.read import open_snapshot
from rebeca_ray.catalog.verify import verify
from rebeca_ray.errors import InputError, QualityGateError
from rebeca_ray.storage.filesystem import delete, join, list_files

LEASE_SECONDS = 60


def list_snapshots(root: str) -> list[Manifest]:
    """Return the manifests of all complete snapshots, the oldest first.

    Raises InputError as `read_manifest` does.
    """
    files = list_files(join(root, "snapshots"), "/manifest.json")
    folders = [file.removeprefix(f"{root.rstrip('/')}/").removesuffix("/manifest.json") for file in files]
    with ThreadPoolExecutor(16) as pool:
        manifests = list(pool.map(lambda folder: read_manifest(root, folder), folders))
    return sorted(manifests, key=lambda manifest: (manifest.created_at, manifest.fencing_token))


def find_snapshot(root: str, run_id: str) -> Manifest:
    """Return the manifest of one run.

    Raises InputError, naming the latest runs, if it has no complete snapshot.
    """
    manifests = list_snapshots(root)
    for manifest in manifests:
        if manifest.run_id == run_id:
            return manifest
    known = ", ".join(manifest.run_id for manifest in manifests[-5:]) or "none"
    raise InputError(f"catalog {root}: run {run_id} has no complete snapshot; the latest are: {known}")


def publish_snapshot(root: str, run_id: str) -> Manifest:
    """Point readers at a complete snapshot and return its manifest.

    A snapshot that the quality gate refused is published too, and the pointer records it. Raises InputError
    if there is no such snapshot, QualityGateError if a file of it is missing, LeaseHeldError while a run is
    at work.
    """
    find_snapshot(root, run_id)  # a mistyped id writes nothing
    with hold_lease(
        root, f"publish of {run_id}", LEASE_SECONDS
    ) as lease:  # nothing is collected from here on
        manifest = find_snapshot(root, run_id)
        if wrong := verify(open_snapshot(root, manifest.path), "metadata"):
            raise QualityGateError(
                f"catalog {root}: run {run_id} is not published: {wrong[0]} ({len(wrong)} such)"
            )
        lease.publish(
            run_id=run_id,
            run_date=manifest.run_date,
            snapshot=manifest.path,
            forced=bool(manifest.gate.refused),
        )
        delete(work_folder(root, run_id))  # nothing is left to resume
    return manifest


def roll_back(root: str) -> Manifest:
    """Publish the snapshot that the published one followed, and return its manifest.

    Raises InputError if it is gone.
    """
    pointer, _ = read_pointer(root)
    if pointer.run_id is None:
        raise InputError(f"catalog {root}: nothing is published there; there is nothing to roll back")
    before = find_snapshot(root, pointer.run_id).previous_run_id
    if before is None:
        raise InputError(
            f"catalog {root}: run {pointer.run_id} is the first there was; "
            "publish another with `rebeca catalog publish`"
        )
    return publish_snapshot(root, before)
