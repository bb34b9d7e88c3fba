"""All snapshots of a catalog, and publishing one of them by hand.

This is for operators. Readers follow the pointer.
"""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from typing_extensions import TypedDict

from rebeca_ray.catalog.layout import work_folder
from rebeca_ray.catalog.manifest import Manifest, read_manifest
from rebeca_ray.catalog.pointer import (
    REMEMBERED,
    Pointer,
    Withdrawn,
    change_pointer,
    moved,
    read_pointer,
)
from rebeca_ray.catalog.read import open_snapshot
from rebeca_ray.catalog.verify import verify
from rebeca_ray.errors import InputError, LeaseHeldError, QualityGateError
from rebeca_ray.identity import UserKey, read_user_key, require_key
from rebeca_ray.storage.failures import only_warn
from rebeca_ray.storage.filesystem import delete, exists, join, list_files

log = logging.getLogger(__name__)

LEASE_SECONDS = 60
USER_KEY = "env:REBECA_USER_KEY"  # for commands without a config


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


def check_user_key(root: str, key: UserKey | None) -> None:
    """Raise InputError if the published snapshot names users by another key, or without one."""
    pointer, _ = read_pointer(root)
    if pointer.snapshot is not None:
        manifest = read_manifest(root, pointer.snapshot)
        require_key(f"catalog {root}", manifest.user_key_fingerprint, key)


def user_key_of(root: str) -> UserKey | None:
    """Return the key of a catalog's pseudonyms from USER_KEY; None for a catalog with user ids as they are.

    Before the first snapshot nothing says which, and the key counts if the variable is set. Raises InputError
    if the variable is not set, or holds another key.
    """
    pointer, _ = read_pointer(root)
    # Before the first publication, a snapshot that the gate refused may hold users.
    manifests = [read_manifest(root, pointer.snapshot)] if pointer.snapshot else read_manifests(root)[0]
    if not manifests:
        return read_user_key(USER_KEY) if USER_KEY.removeprefix("env:") in os.environ else None
    fingerprint = manifests[-1].user_key_fingerprint
    if fingerprint is None:
        return None
    key = read_user_key(USER_KEY)
    require_key(f"catalog {root}", fingerprint, key)
    return key


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
    """Point readers at a complete snapshot and return its manifest, also while a run is at work.

    A snapshot that the quality gate refused is published too, and the pointer records it. Raises InputError
    if there is no such snapshot, QualityGateError if a file of it is missing.
    """
    manifest = verified(root, run_id)
    manifests, _ = read_manifests(root)

    def move(pointer: Pointer) -> Pointer:
        require_uncollected(root, manifest)
        # A lost pointer begins again: under the catalog's own id, and beyond all tokens that were given.
        pointer = replace(
            pointer,
            catalog_id=pointer.catalog_id or manifest.catalog_id,
            fencing_token=max(pointer.fencing_token, *(made.fencing_token for made in manifests)),
        )
        return moved(pointer, **publication(manifest))

    pointer = change_pointer(root, move)
    if pointer.lease is None or pointer.lease["run_id"] != run_id:
        with only_warn(f"removing {work_folder(root, run_id)}"):
            delete(work_folder(root, run_id))  # nothing is left to resume
    return manifest


def roll_back(root: str) -> Manifest:
    """Publish the snapshot that the published one followed, and return its manifest.

    The same swap records what was withdrawn: a run that is at work does not publish over it, and no night
    makes its date again. Raises InputError if there is no earlier snapshot, LeaseHeldError if another one is
    published meanwhile.
    """
    pointer, _ = read_pointer(root)
    if pointer.run_id is None or pointer.run_date is None:
        raise InputError(f"catalog {root}: nothing is published there; there is nothing to roll back")
    before = previous_of(root, pointer)
    if before is None:
        raise InputError(
            f"catalog {root}: run {pointer.run_id} is the first there was; "
            "publish another with `rebeca catalog publish`"
        )
    manifest = verified(root, before)
    withdrawn = Withdrawn(run_id=pointer.run_id, run_date=pointer.run_date)

    def move(current: Pointer) -> Pointer:
        if current.run_id != withdrawn["run_id"]:
            raise LeaseHeldError(
                f"catalog {root}: run {current.run_id} was published meanwhile; "
                "look at it and roll back again"
            )
        require_uncollected(root, manifest)
        back = moved(current, **publication(manifest))
        return replace(back, withdrawn=(*back.withdrawn, withdrawn)[-REMEMBERED:])

    change_pointer(root, move)
    return manifest


def require_uncollected(root: str, manifest: Manifest) -> None:
    """Raise InputError for a snapshot that garbage collection removed after it was verified.

    Call it between the read and the swap of the pointer: a collection in between changes the pointer.
    """
    if not exists(join(root, manifest.path, "manifest.json")):
        raise InputError(
            f"catalog {root}: run {manifest.run_id} was collected meanwhile; publish another, which "
            "`rebeca catalog list` shows"
        )


class Publication(TypedDict):
    """What the pointer says of a snapshot."""

    run_id: str
    run_date: str
    snapshot: str
    forced: bool


def publication(manifest: Manifest) -> Publication:
    return Publication(
        run_id=manifest.run_id,
        run_date=manifest.run_date,
        snapshot=manifest.path,
        forced=bool(manifest.gate.refused),
    )


def verified(root: str, run_id: str) -> Manifest:
    """Return the manifest of a complete snapshot. Raises QualityGateError if a file of it is missing."""
    manifest = find_snapshot(root, run_id)
    if wrong := verify(open_snapshot(root, manifest.path), "metadata"):
        raise QualityGateError(
            f"catalog {root}: run {run_id} is not published: {wrong[0]} ({len(wrong)} such)"
        )
    return manifest


def require_pointer(root: str) -> None:
    """Raise InputError if `latest.json` is lost: there are snapshots, and nobody says which is published."""
    if read_pointer(root)[1] is None and (manifests := read_manifests(root)[0]):
        newest = manifests[-1].run_id
        raise InputError(
            f"catalog {root}: latest.json is missing, but there are {len(manifests)} snapshots; restore it "
            f"or publish one: `rebeca catalog publish {root} --run-id {newest}`"
        )


def previous_of(root: str, pointer: Pointer) -> str | None:
    """Return the run id of the snapshot that the published one followed, None for the first.

    If its manifest is damaged, this is the snapshot that was published before it and not withdrawn.
    """
    assert pointer.run_id is not None
    try:
        return find_snapshot(root, pointer.run_id).previous_run_id
    except InputError as error:
        log.warning("%s", error)
        no_more = {pointer.run_id, *(entry["run_id"] for entry in pointer.withdrawn)}
        before = [entry["run_id"] for entry in pointer.previously_published]
        return next((run_id for run_id in reversed(before) if run_id not in no_more), None)
