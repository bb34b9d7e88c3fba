"""The runs that wrote to a catalog: a record of each, and the work of those that did not end.

A record is written before the run's first folder, and removed after its last. Nothing is ever deleted from a
catalog that such a record does not name.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime

from pydantic import TypeAdapter

from rebeca_ray.catalog.layout import inside, work_folder
from rebeca_ray.errors import InputError, ResumableError, StorageError
from rebeca_ray.storage.filesystem import delete, exists, join, list_files, list_folders
from rebeca_ray.storage.objects import JsonObject, read_json, write_json
from rebeca_ray.storage.records import read_record, write_record

log = logging.getLogger(__name__)

RUN = "run_id="
# The folders of a catalog, and the start of the names in them; None: no folders of runs.
FOLDERS = {
    "snapshots": "run_date=",
    "images": RUN,
    "work": RUN,
    "runs": None,
    "rated": None,
    "erasures": None,
    "reports": None,
}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """`runs/<id>.json`: this catalog's run has or had folders here."""

    catalog_id: str
    run_id: str
    run_date: str | None  # None: of an older version, and only its images are left


RUN_RECORD = TypeAdapter(RunRecord)


@dataclass(frozen=True, kw_only=True)
class BegunRun:
    """`run.json`: the identity of a run and everything it is made from."""

    run_id: str
    run_date: str
    begun_at: str  # ISO 8601, UTC
    described: JsonObject

    @property
    def began_at(self) -> datetime:
        return datetime.fromisoformat(self.begun_at)


def record_uri(root: str, run_id: str) -> str:
    return join(root, "runs", f"{run_id}.json")


def write_run_record(root: str, record: RunRecord) -> None:
    """Write the record of a run, before any folder of it."""
    write_json(asdict(record), record_uri(root, record.run_id))


def has_record(root: str, run_id: str) -> bool:
    return exists(record_uri(root, run_id))


def read_records(root: str, catalog_id: str) -> list[RunRecord]:
    """Return the records of this catalog's runs. Those of a catalog that was copied over it are left out."""
    with ThreadPoolExecutor(16) as pool:
        records = list(pool.map(read_run_record, list_files(join(root, "runs"), ".json")))
    # "": before any lease
    return [record for record in records if record and record.catalog_id in ("", catalog_id)]


def read_run_record(uri: str) -> RunRecord | None:
    """Return one record; None, after a warning, for a file that is none of ours."""
    try:
        record = RUN_RECORD.validate_python(read_json(uri))
        if record_uri(uri.rpartition("/runs/")[0], inside(record.run_id)) == uri:
            return record
    except (StorageError, ResumableError):
        raise
    except ValueError:  # also pydantic's, and that of a file which is no JSON
        pass
    log.warning("%s: is no record of a run of this catalog; it is left alone", uri)
    return None


def unfinished_runs(root: str) -> dict[str, BegunRun]:
    """Return the runs with a work folder by their id, the latest last.

    A published run keeps one for a moment only. A run whose `run.json` is damaged cannot be resumed: it is
    left out, with a warning.
    """
    folders = list_folders(join(root, "work"))
    values = (read_record(join(root, "work", name, "run.json")) for name in folders)
    runs = [
        BegunRun(**{field: record[field] for field in ("run_id", "run_date", "begun_at", "described")})
        for record in values
        if record
    ]
    return {run.run_id: run for run in sorted(runs, key=lambda run: run.begun_at)}


def write_begun(root: str, run: BegunRun) -> None:
    """Write `run.json`, before the run writes anything else."""
    write_record(asdict(run), join(work_folder(root, run.run_id), "run.json"))


def require_own_root(root: str) -> None:
    """Raise InputError, naming it, if the root holds a folder that no catalog has.

    Names that begin with a dot or an underscore are those of tools, and `lost+found` is the disk's.
    """
    foreign = [name for name in list_folders(root) if name not in FOLDERS and name != "lost+found"]
    for folder, start in FOLDERS.items():
        if start is not None:
            names = list_folders(join(root, folder))
            foreign += [f"{folder}/{name}" for name in names if not name.startswith(start)]
    if foreign := [name for name in foreign if not name.rpartition("/")[2].startswith((".", "_"))]:
        raise InputError(
            f"catalog {root}: holds a folder that is not a catalog's ({foreign[0]}); "
            "move it elsewhere, or choose another folder for the catalog"
        )


def remove_run(root: str, run_id: str) -> None:
    """Remove the work and the record of a run that left nothing else."""
    delete(work_folder(root, run_id))
    delete(record_uri(root, run_id))
