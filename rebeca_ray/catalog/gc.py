"""Garbage collection: snapshots beyond those kept, runs that were given up, images without a reference.

records of runs - runs that are needed -> their folders -> files of our own names -> those that no kept
snapshot lists

A file goes only if a record of this catalog names its run, and if its name is one that we give. The first
thing to go is what makes a run visible (a manifest, a `run.json`), the last is its record: a collection that
dies on the way has only left more to collect.
"""

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from rebeca_ray.catalog.file_list import read_all_lists, read_file_list
from rebeca_ray.catalog.layout import image_folder, snapshot_folder, work_folder
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.manifest import Manifest
from rebeca_ray.catalog.pointer import Pointer, read_pointer
from rebeca_ray.catalog.reports import old_reports
from rebeca_ray.catalog.runs import (
    RunRecord,
    has_record,
    read_records,
    record_uri,
    unfinished_runs,
    write_run_record,
)
from rebeca_ray.catalog.snapshots import LEASE_SECONDS, read_manifests
from rebeca_ray.errors import InputError
from rebeca_ray.progress import counting
from rebeca_ray.storage.filesystem import (
    delete,
    delete_files,
    join,
    list_files,
    list_folders,
    remove_empty_folders,
)
from rebeca_ray.storage.leftovers import remove_leftovers

log = logging.getLogger(__name__)

MAX_HOURS = 100_000
FILES_AT_ONCE = 1000  # as many as a request to S3 removes
PARTIAL = r"(\.partial\S*)?$"  # a writer that was killed left it
IN_SNAPSHOT = re.compile(
    r"(\.manifest\.lock|manifest\.json|files-\d+\.parquet"
    r"|(items|users|errors|changes)/bucket=\d+/part-[\d-]+\.parquet)" + PARTIAL
)
IN_IMAGES = re.compile(r"bucket=\d+/(part|compacted)-[0-9a-f-]+\.parquet" + PARTIAL)


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """Everything a collection removes, in its order."""

    manifests: list[str]  # of snapshots, which are gone from here on
    work: list[str]  # folders of runs that were given up, or were killed after their publication
    files: list[str]  # tables, images, old reports
    folders: list[str]  # of these files, on a disk and if nothing else is in them
    records: list[str]  # of runs that have nothing left
    kept: list[str]  # run ids of the snapshots that stay
    runs: list[str]  # run ids: all that cannot be published any more


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
    with hold_lease(root, "gc", LEASE_SECONDS) as lease:
        adopt_runs(root, lease.catalog_id)
        garbage = find_garbage(root, keep=keep, now=datetime.now(UTC), grace=timedelta(hours=grace_hours))
        if not dry_run:
            lease.doom(garbage.runs)
            remove(garbage)
            # An hour at least: estimates and trainings write here without this lease.
            remove_leftovers(root, datetime.now(UTC) - timedelta(hours=max(1, grace_hours)))
            lease.doom([])
    return garbage


def remove(garbage: Garbage) -> None:
    for manifest in garbage.manifests:
        delete(manifest)
    for folder in garbage.work:
        delete(join(folder, "run.json"))
        delete(folder)
    with counting("remove files", len(garbage.files)) as counted:
        for start in range(0, len(garbage.files), FILES_AT_ONCE):
            files = garbage.files[start : start + FILES_AT_ONCE]
            delete_files(files)
            counted.add(len(files))
    for folder in garbage.folders:
        remove_empty_folders(folder)
    for record in garbage.records:
        delete(record)


def find_garbage(root: str, *, keep: int, now: datetime, grace: timedelta) -> Garbage:
    """Return everything that may be removed, in its order.

    A snapshot whose manifest is damaged stays, with all files that its file lists name. Without a readable
    list, nobody knows which files it needs, so no file goes but the work of dead runs.
    """
    root = root.rstrip("/")
    pointer, _ = read_pointer(root)
    snapshots, errors = read_manifests(root)
    recent = {run.run_id for run in unfinished_runs(root).values() if now - run.began_at < grace}
    kept = kept_snapshots(snapshots, pointer, keep, now, grace)
    kept |= {manifest.run_id for manifest in snapshots if manifest.run_id in recent}
    needed: set[str] = set()
    unknown = False
    for manifest in snapshots:
        if manifest.run_id in kept:
            needed |= {f"{manifest.path}/{name}" for name in ("manifest.json", ".manifest.lock")}
            needed.add(manifest.files.path)
            try:
                needed.update(listed_files(root, manifest))
            except InputError as error:
                log.warning("%s; no tables and no images are collected until then", error)
                unknown = True
    for folder, damage in errors.items():
        log.warning("%s; its files stay, remove or restore %s", damage, join(root, folder))
        try:
            needed |= read_all_lists(root, folder)
        except InputError:
            unknown = True
    damaged = {folder.rpartition("run_id=")[2] for folder in errors}
    garbage = Garbage(manifests=[], work=[], files=[], folders=[], records=[], kept=sorted(kept), runs=[])
    garbage.files.extend(old_reports(root, now))
    records = read_records(root, pointer.catalog_id or "")
    unkept = [record for record in records if record.run_id not in kept | recent | damaged]
    working = set(list_folders(join(root, "work")))
    # Attempts that were killed left work and files in the folders of a run that was published after all.
    ended = {pointer.run_id, *(entry["run_id"] for entry in pointer.previously_published)} & kept
    published = [record for record in records if record.run_id in ended]
    work_of_published = [work_folder(root, record.run_id) for record in published]
    garbage.work.extend(work for work in work_of_published if work.rpartition("/")[2] in working)
    with ThreadPoolExecutor(16) as pool:
        listed = list(pool.map(lambda run: [] if unknown else files_of(root, run), [*unkept, *published]))
    for files in listed[len(unkept) :]:
        garbage.files.extend(file for file in files if file.removeprefix(f"{root}/") not in needed)
    for record, files in zip(unkept, listed, strict=False):
        garbage.runs.append(record.run_id)
        work = work_folder(root, record.run_id)
        has_work = work.rpartition("/")[2] in working
        if has_work:
            garbage.work.append(work)
        unneeded = [file for file in files if file.removeprefix(f"{root}/") not in needed]
        if unneeded:
            garbage.folders.extend(join(root, folder) for folder in folders_of(record))
        garbage.manifests.extend(file for file in unneeded if file.endswith("/manifest.json"))
        garbage.files.extend(file for file in unneeded if not file.endswith("/manifest.json"))
        if len(unneeded) == len(files) and not unknown:
            garbage.records.append(record_uri(root, record.run_id))
        elif not unneeded and not has_work:
            garbage.runs.remove(record.run_id)
    return garbage


def listed_files(root: str, manifest: Manifest) -> list[str]:
    """Return the files of a snapshot, below the root."""
    paths: list[str] = read_file_list(root, manifest.path, manifest.files)["path"].to_pylist()
    return paths


def files_of(root: str, record: RunRecord) -> list[str]:
    """Return the files of a run outside its work folder that have names of ours.

    A run makes no links: files behind one are those of somebody else, and stay.
    """
    return [
        file
        for folder, name in folders_of(record).items()
        for file in list_files(join(root, folder), links=False)
        if name.match(file.removeprefix(join(root, folder, "")))
    ]


def folders_of(record: RunRecord) -> dict[str, re.Pattern[str]]:
    """Return the folders of a run outside its work folder, below the root, and the names in them."""
    folders = {image_folder(record.run_id): IN_IMAGES}
    if record.run_date is not None:
        folders[snapshot_folder(record.run_date, record.run_id)] = IN_SNAPSHOT
    return folders


def adopt_runs(root: str, catalog_id: str) -> None:
    """Write the records of runs that an older version made: all that manifests, lists and work name."""
    pointer, _ = read_pointer(root)
    if pointer.run_id is None or has_record(root, pointer.run_id):
        return
    snapshots, _ = read_manifests(root)
    dates: dict[str, str | None] = {}
    for manifest in snapshots:
        try:
            paths = listed_files(root, manifest)
        except InputError as error:
            log.warning("%s; what it alone lists is never collected", error)
            continue
        for path in paths:
            if made := re.match(r"(?:images|snapshots/run_date=([^/]+))/run_id=([^/]+)/", path):
                dates[made[2]] = made[1] or dates.get(made[2])
    dates |= {name.removeprefix("run_id="): None for name in list_folders(join(root, "work"))}
    dates |= {run.run_id: run.run_date for run in unfinished_runs(root).values()}
    dates |= {manifest.run_id: manifest.run_date for manifest in snapshots}
    for run_id, run_date in sorted(dates.items(), key=lambda entry: entry[0] == pointer.run_id):
        # The published run's is written last: it says that all are there.
        write_run_record(root, RunRecord(catalog_id=catalog_id, run_id=run_id, run_date=run_date))


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
