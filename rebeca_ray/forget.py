"""Erase people: find -> exports, priors, rated items -> snapshots -> Iceberg -> old files -> receipt.

Tombstones come first, so that no later night makes anything of these users again. Every step finds its work
in what the steps before left, so the same command completes an erasure that was killed.
"""

import itertools
import logging
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.catalog.erasure.exports import erase_from_export, formats_in
from rebeca_ray.catalog.erasure.receipts import Receipt, read_receipts, write_receipt
from rebeca_ray.catalog.erasure.removed import Removed
from rebeca_ray.catalog.erasure.rewriting import Rewriting
from rebeca_ray.catalog.erasure.sweeping import find_unlisted, sweep
from rebeca_ray.catalog.erasure.tombstones import add_tombstones, erasure_key, read_tombstones
from rebeca_ray.catalog.erasure.traces import ImageRows, Trace, find_trace, image_rows_to_erase
from rebeca_ray.catalog.exports.iceberg import register_snapshot, require_namespace
from rebeca_ray.catalog.gc import adopt_runs
from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.catalog.lease import Lease, hold_lease
from rebeca_ray.catalog.manifest import read_manifest
from rebeca_ray.catalog.pointer import Pointer, change_pointer, read_pointer
from rebeca_ray.catalog.read import open_snapshot, read_catalog
from rebeca_ray.catalog.reports import reports_naming
from rebeca_ray.catalog.snapshots import LEASE_SECONDS, read_manifests, user_key_of
from rebeca_ray.data.erasure import erase_from_storage, erase_rated
from rebeca_ray.data.validation import check_columns, check_ids, check_rows
from rebeca_ray.errors import InputError, redacted
from rebeca_ray.prior.erasure import erase_from_prior, is_prior
from rebeca_ray.progress import counting
from rebeca_ray.storage.filesystem import delete_files, join, list_folders
from rebeca_ray.storage.leftovers import remove_leftovers
from rebeca_ray.storage.objects import JsonObject
from rebeca_ray.storage.parquet import open_table

log = logging.getLogger(__name__)

NOT_COVERED = (
    "interactions and requests, copies of the catalog, key-value stores and CDNs that were loaded, maps of "
    "`export atlas`, rated items of snapshots that were collected (`rated/` names no user), and every place "
    "that was not given"
)
FILES_AT_ONCE = 4  # in memory; one of images has some ten megabytes
USERS = pa.schema([schemas.required("user_id", schemas.STRING)])


@dataclass(frozen=True)
class Iceberg:
    """The Iceberg tables of a catalog: the database, the folder of their metadata, and their namespace."""

    database: str
    warehouse: str
    namespace: str = "rebeca"


@dataclass(frozen=True, kw_only=True)
class Places:
    """The places outside a catalog from which users are erased too."""

    folders: Sequence[str] = ()  # of exports and priors
    storages: Sequence[str] = ()  # of trainings
    iceberg: Iceberg | None = None

    def names(self) -> list[str]:
        """Return the addresses of all places."""
        iceberg = [self.iceberg.database, self.iceberg.warehouse] if self.iceberg else []
        return [redacted(place) for place in (*self.folders, *self.storages, *iceberg)]


@dataclass(frozen=True, kw_only=True)
class Erased:
    """The result of an erasure. A dry run has no receipt, and a repeat of a complete one has none either."""

    users: int
    removed: Removed
    receipt: Receipt | None

    def values(self) -> JsonObject:
        """Return the result as JSON; that of a dry run has the files to rewrite or to remove."""
        return {
            "dry_run": self.removed.dry_run,
            "users": self.users,
            "removed": dict(self.removed.counts),
            "paths": self.removed.paths if self.removed.dry_run else [],
            "receipt": self.receipt,
            "not_covered": NOT_COVERED,
        }


def forget(root: str, users: Sequence[str], places: Places, *, dry_run: bool = False) -> Erased:
    """Erase some users from a catalog and from some places, and keep them away from later nights.

    Users are given by their ids, also for a catalog with pseudonyms, which needs their key. Unfinished runs
    are given up. Raises InputError for a missing or wrong key, a damaged snapshot, or a place that is
    something else, LeaseHeldError while a run is at work.
    """
    names = sorted({*users})
    if not names:
        raise InputError("forget: no users are given; give --user ID, or --users FILE")
    if names[0] == POPULATION_USER:
        raise InputError("forget: an empty user_id names the population pool, which is nobody's; give an id")
    if read_pointer(root)[1] is None:
        raise InputError(f"catalog {root}: there is none (no latest.json); give the root of one")
    user_key = user_key_of(root)
    names = sorted(user_key.pseudonyms(names)) if user_key else names
    check_places(places)
    erasure_key()
    read_tombstones(root)
    read_receipts(root)
    removed = Removed(dry_run=dry_run)
    if dry_run:
        erase(root, names, places, removed, None)
        return Erased(users=len(names), removed=removed, receipt=None)
    with hold_lease(root, "forget", LEASE_SECONDS) as lease:
        adopt_runs(root, lease.catalog_id)
        hashes = add_tombstones(root, names)
        erase(root, names, places, removed, lease)
        receipt = write_receipt(
            root,
            catalog_id=lease.catalog_id,
            token=lease.fencing_token,
            places=[root, *places.names()],
            hashes=hashes,
            removed=removed,
        )
    return Erased(users=len(names), removed=removed, receipt=receipt)


def check_places(places: Places) -> None:
    """Raise InputError for a place that is something else, before anything is written."""
    for folder in places.folders:
        if not is_prior(folder):
            formats_in(folder)
    for storage in places.storages:
        if not list_folders(storage):
            # No error: the repeat of an erasure that was killed may have emptied it, on an object store.
            log.warning("storage %s: is empty or missing, so nothing is erased there", redacted(storage))
    tables = places.iceberg
    if tables:
        require_namespace(tables.database, tables.warehouse, tables.namespace)


def erase(root: str, users: list[str], places: Places, removed: Removed, lease: Lease | None) -> None:
    """Do all steps between tombstones and receipt. Without a lease, only count."""
    traces = find_traces(root, users)
    items = {item for trace in traces for item in trace.item_ids}
    theirs = pa.array(sorted(items), pa.string())
    for trace in traces:
        items -= {*trace.shown_ids.filter(pc.is_in(trace.shown_ids, value_set=theirs)).to_pylist()}
    images = image_rows_to_erase(traces)
    for trace in traces:
        for name, number in trace.rows.items():
            removed.add(f"rows of {name}", number)
    files = {path: row for trace in traces for path, row in trace.tables.items()}
    removed.add("files of tables", len(files), *(join(root, path) for path in files))
    removed.add("files of images", len(images), *(join(root, path) for path in images))
    removed.add("rows of images", sum(rows_erased(rows) for rows in images.values()))

    with ExitStack() as leases:
        # While the snapshots still say which items were made for these users.
        for folder in places.folders:
            if is_prior(folder):
                erase_from_prior(folder, users, removed)
            else:
                erase_from_export(folder, users, items, removed, leases)
        erase_rated(root, items, removed)
        reports = reports_naming(root, users)
        removed.add("reports of attempts", len(reports), *reports)
        if lease is not None:
            delete_files(reports)
        if lease is not None:
            rewrite_snapshots(traces, images, users, lease)
    if lease is not None and places.iceberg and read_pointer(root)[0].run_id is not None:
        tables = places.iceberg
        register_snapshot(
            read_catalog(root), tables.database, tables.warehouse, tables.namespace, without_history=True
        )
    pointer, _ = read_pointer(root)
    unlisted = find_unlisted(root, pointer.catalog_id or "", read_manifests(root)[0])
    removed.add("folders of work", len(unlisted.work), *unlisted.work)
    if lease is None:
        removed.add("leftover files", len(unlisted.files), *unlisted.files)
    else:
        lease.check()
        sweep(unlisted)
        for place in (root, *places.folders):
            remove_leftovers(place)
    for storage in places.storages:
        erase_from_storage(storage, users, removed)


def read_users(uri: str) -> list[str]:
    """Return the users in the column `user_id` of a Parquet or CSV file, or those on standard input.

    `-` stands for standard input, with an id in each line. Raises InputError for bad ids.
    """
    if uri == "-":
        return [line for line in sys.stdin.read().splitlines() if line]
    source = open_table(uri, "users", columns={})
    users = source.read(check_columns(source, USERS))["user_id"]
    check_rows(pa.table([users], names=["user_id"]), "users", uri)
    check_ids(users, "users", uri, "user_id")
    return list(users.unique().to_pylist())


def find_traces(root: str, users: list[str]) -> list[Trace]:
    """Return the traces of users in all snapshots.

    Raises InputError for a snapshot that cannot be read: nobody knows whom it holds.
    """
    manifests, errors = read_manifests(root)
    for folder, error in errors.items():
        raise InputError(f"{error}; nobody can be erased from {join(root, folder)} until then")
    return [find_trace(open_snapshot(root, manifest.path), users) for manifest in manifests]


def rows_erased(images: ImageRows) -> int:
    return images.file["rows"] if images.erased is None else int(images.erased.sum())


def rewrite_snapshots(
    traces: list[Trace], images: dict[str, ImageRows], users: list[str], lease: Lease
) -> None:
    """Rewrite all files with rows of the users, then the manifests, then a note for readers.

    Older snapshots come first: until the last manifest, the published snapshot is as it was.
    """
    rewriting = Rewriting(lease=lease, users=users)
    tables = {path: row for trace in traces for path, row in trace.tables.items()}
    with counting("erase", len(images) + len(tables)) as counted, ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for _ in itertools.chain(
            pool.map(rewriting.replace_images, images.values()),
            pool.map(rewriting.replace_table, tables.values()),
        ):
            counted.add()
    for trace in traces:
        rewriting.replace_manifest(trace)

    def tell_readers(pointer: Pointer) -> Pointer:
        lease.held(pointer)
        if pointer.snapshot is None:
            return pointer
        manifest = read_manifest(lease.root, pointer.snapshot)
        token = manifest.files.fencing_token
        # A list with a later token than its run's is that of an erasure, perhaps of one that was killed.
        return replace(pointer, rewritten=token) if token > manifest.fencing_token else pointer

    change_pointer(lease.root, tell_readers)
