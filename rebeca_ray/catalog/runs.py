"""Runs that began and did not end: their work folders hold what a later attempt resumes from."""

from dataclasses import asdict, dataclass
from datetime import datetime

from rebeca_ray.catalog.layout import work_folder
from rebeca_ray.storage.filesystem import join, list_folders
from rebeca_ray.storage.objects import JsonObject
from rebeca_ray.storage.records import read_record, write_record


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
