"""Remove everything that no snapshot lists: replaced files, leftovers of attempts, and unfinished runs.

An unfinished run goes as a whole: its plan, its histories and its images may be of anybody.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rebeca_ray.catalog.file_list import read_file_list
from rebeca_ray.catalog.gc import FILES_AT_ONCE, files_of, folders_of
from rebeca_ray.catalog.manifest import Manifest
from rebeca_ray.catalog.runs import read_records, record_uri
from rebeca_ray.storage.filesystem import delete, delete_files, join, list_folders, remove_empty_folders


@dataclass(frozen=True, kw_only=True)
class Unlisted:
    """Folders of work, files that no snapshot lists, and folders and records of runs without a file."""

    work: list[str]
    files: list[str]
    folders: list[str]
    records: list[str]


def find_unlisted(root: str, catalog_id: str, manifests: list[Manifest]) -> Unlisted:
    """Return what no snapshot lists, of the runs of this catalog. `manifests` are those of all snapshots."""
    root = root.rstrip("/")
    needed: set[str] = set()
    for manifest in manifests:
        needed |= {f"{manifest.path}/{name}" for name in ("manifest.json", ".manifest.lock")}
        needed.add(manifest.files.path)
        needed.update(read_file_list(root, manifest.path, manifest.files)["path"].to_pylist())
    records = read_records(root, catalog_id)
    with ThreadPoolExecutor(16) as pool:
        files_of_runs = list(pool.map(lambda run: files_of(root, run), records))
    unlisted = Unlisted(
        work=[join(root, "work", name) for name in list_folders(join(root, "work"))],
        files=[],
        folders=[],
        records=[],
    )
    for record, files in zip(records, files_of_runs, strict=True):
        unneeded = [file for file in files if file.removeprefix(f"{root}/") not in needed]
        unlisted.files.extend(unneeded)
        if unneeded:
            unlisted.folders.extend(join(root, folder) for folder in folders_of(record))
        if len(unneeded) == len(files):
            unlisted.records.append(record_uri(root, record.run_id))
    return unlisted


def sweep(unlisted: Unlisted) -> None:
    """Remove what no snapshot lists: first what makes a run resumable, last the records of runs."""
    for folder in unlisted.work:
        delete(join(folder, "run.json"))
        delete(folder)
    for start in range(0, len(unlisted.files), FILES_AT_ONCE):
        delete_files(unlisted.files[start : start + FILES_AT_ONCE])
    for folder in unlisted.folders:
        remove_empty_folders(folder)
    for record in unlisted.records:
        delete(record)
