"""Runs that were begun and did not end."""

from typing import Any

from rebeca_ray.storage.filesystem import join, list_folders
from rebeca_ray.storage.objects import read_json


def unfinished_runs(root: str) -> dict[str, dict[str, Any]]:
    """What every run with a work folder was begun with, the latest last. A published run has none, but for a moment."""
    told = {
        name.removeprefix("run_id="): read_json(join(root, "work", name, "run.json"))
        for name in list_folders(join(root, "work"))
    }
    return {
        run_id: found
        for run_id, found in sorted(told.items(), key=lambda pair: (pair[1] or {}).get("begun_at", ""))
        if found
    }
