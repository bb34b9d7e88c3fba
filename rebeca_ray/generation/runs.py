"""Which run this is: a new one, or one that was begun from the very same things and did not end."""

import datetime
import json
import logging
from typing import Any

from rebeca_ray.catalog.layout import new_run_id, work_folder
from rebeca_ray.catalog.runs import unfinished_runs
from rebeca_ray.config.jobs import GenerateConfig, Resume
from rebeca_ray.errors import InputError
from rebeca_ray.storage.filesystem import join, list_folders
from rebeca_ray.storage.objects import read_json, write_json
from rebeca_ray.storage.parquet import describe_files

log = logging.getLogger(__name__)

# What does not change what is made: where and when, how many at a time, and what is judged once it is there.
NOT_DESCRIBED: dict[str, Any] = {
    "catalog": True, "run_date": True, "run_id": True, "error_budget": True, "gate": True, "limits": True, "prices": True,
    "sampler": {"num_actors": True, "cpus_per_actor": True},
    "decoder": {"num_actors": True, "cpus_per_actor": True, "triton": True},
    "layout": {"images_per_file": True},
}  # fmt: skip


def describe_run(config: GenerateConfig, versions: dict[str, str], previous: str | None) -> dict[str, Any]:
    """What a run is made from, field by field: settings, models, the content of its inputs, and the snapshot it follows."""
    inputs = {
        "request": config.request,
        "items": config.items,
        "interactions": config.interactions and config.interactions.path,
    }
    told = {
        **flat("config", config.model_dump(mode="json", exclude=NOT_DESCRIBED)),
        **flat("version of", versions),
        **{f"content of {name}": describe_files(uri, name) for name, uri in inputs.items() if uri},
        "snapshot before": previous,
    }
    return dict(json.loads(json.dumps(told)))  # as it is read back


def flat(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        joined = (
            f"{prefix}.{name}" if prefix == "config" or prefix.startswith("config.") else f"{prefix} {name}"
        )
        found |= flat(joined, value) if isinstance(value, dict) else {joined: value}
    return found


def choose_run(
    config: GenerateConfig,
    run_date: datetime.date,
    described: dict[str, Any],
    *,
    resume: Resume,
    retry_failed: bool,
) -> tuple[str, dict[str, Any] | None]:
    """The id of the run to go on with and what it was begun with, or a new id and None.

    Raises UserError, naming the field that differs, if the run that must be resumed was begun from something else, and if there is
    none that must be.
    """
    begun = unfinished_runs(config.catalog)
    if config.run_id is not None:
        begun = {run_id: told for run_id, told in begun.items() if run_id == config.run_id}
        dates = list_folders(join(config.catalog, "snapshots"))
        if not begun and any(
            read_json(join(config.catalog, "snapshots", date, f"run_id={config.run_id}/manifest.json"))
            for date in dates
        ):
            raise InputError(
                f"root {config.catalog}: run_id {config.run_id} was used before; choose another, or give none"
            )
    else:
        begun = {run_id: told for run_id, told in begun.items() if told["run_date"] == run_date.isoformat()}
    differences = {
        run_id: difference(
            {"run_date": told["run_date"], **told["described"]},
            {
                "run_date": str(config.run_date or told["run_date"]),
                **described,
            },  # a date nobody gave is that of the run
        )
        for run_id, told in begun.items()
    }
    same = [run_id for run_id, found in differences.items() if found is None]
    must = resume == "require" or retry_failed
    if resume != "never" and same:
        return same[-1], begun[same[-1]]
    if resume == "never" and config.run_id in begun:
        raise InputError(
            f"root {config.catalog}: run_id {config.run_id} was begun before; choose another, or let it be resumed"
        )
    if resume != "never" and differences:
        run_id, found = list(differences.items())[-1]
        told = f"run {run_id} of {begun[run_id]['run_date']} cannot be resumed: {found}"
        if must or config.run_id is not None:
            raise InputError(
                f"root {config.catalog}: {told}; restore that, or start a new run with --resume never and another run_id"
            )
        log.warning(f"{told}; a new run starts")
    elif must:
        raise InputError(
            f"root {config.catalog}: no unfinished run {config.run_id or f'of {run_date}'} to go on with, "
            "which --resume require and --retry-failed ask for; leave them out to start one"
        )
    return config.run_id or new_run_id(), None


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first field that differs, with both values; None if none does."""
    for name in [*now, *before]:
        if before.get(name) != now.get(name):
            return f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
    return None


def begin(root: str, run_id: str, run_date: datetime.date, described: dict[str, Any]) -> dict[str, Any]:
    """Note what a new run is made from, before it writes anything else."""
    begun = {
        "run_id": run_id,
        "run_date": run_date.isoformat(),
        "begun_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "described": described,
    }
    write_json(begun, join(work_folder(root, run_id), "run.json"))
    return begun
