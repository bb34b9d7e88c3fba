"""All snapshots of a catalog, and publishing one of them by hand.

This is for operators. Readers follow the pointer.
"""

import logging
from concurrent.futures import ThreadPoolExecutor

from rebeca_ray.catalog.layout import work_folder
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.manifest import Manifest, read_manifest
from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.catalog.read import open_snapshot
from rebeca_ray.catalog.verify import verify
from rebeca_ray.errors import InputError, QualityGateError
from rebeca_ray.storage.failures import only_warn
from rebeca_ray.storage.filesystem import delete, exists, join, list_files

log = logging.getLogger(__name__)

LEASE_SECONDS = 60


def list_snapshots(root: str) -> list[Manifest]:
    """Return the manifests of all complete snapshots, the oldest first.

    A snapshot whose manifest cannot be read is left out, with a warning.
    """
    manifests, errors = read_manifests(root)
    for error in errors.values():
        log.warning("%s; this snapshot is left out", error)
    return manifests


def read_manifests(root: str) -> tuple[list[Manifest], dict[str, InputError]]:
    """Return the manifests of all complete snapshots, the oldest first, and the errors of others by folder.

    A snapshot that is collected between listing and reading is in neither.
    """

    def read(folder: str) -> Manifest | InputError | None:
        try:
            return read_manifest(root, folder)
        except InputError as error:
            return error if exists(join(root, folder, "manifest.json")) else None

    files = list_files(join(root, "snapshots"), "/manifest.json")
    folders = [file.removeprefix(f"{root.rstrip('/')}/").removesuffix("/manifest.json") for file in files]
    with ThreadPoolExecutor(16) as pool:
        results = dict(zip(folders, pool.map(read, folders), strict=True))
    manifests = [manifest for manifest in results.values() if isinstance(manifest, Manifest)]
    errors = {folder: error for folder, error in results.items() if isinstance(error, InputError)}
    return sorted(manifests, key=lambda manifest: (manifest.created_at, manifest.fencing_token)), errors


def find_snapshot(root: str, run_id: str) -> Manifest:
    """Return the manifest of one run.

    Raises InputError if its manifest cannot be read, or, naming the latest runs, if there is none.
    """
    manifests, errors = read_manifests(root)
    for manifest in manifests:
        if manifest.run_id == run_id:
            return manifest
    for folder, error in errors.items():
        if folder.endswith(f"/run_id={run_id}"):
            raise error
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
        with only_warn(f"removing {work_folder(root, run_id)}"):
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
