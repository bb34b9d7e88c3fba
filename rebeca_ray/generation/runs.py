"""The run of this job: a new one, or an unfinished one that was made from exactly the same things."""

import datetime
import json
import logging

from rebeca_ray.catalog.layout import new_run_id
from rebeca_ray.catalog.manifest import Manifest
from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.catalog.runs import BegunRun, RunRecord, unfinished_runs, write_begun, write_run_record
from rebeca_ray.config.fields import NOT_COMPARED, fields_with
from rebeca_ray.config.jobs import GenerateConfig, Resume
from rebeca_ray.errors import InputError
from rebeca_ray.identity import hash128
from rebeca_ray.storage.filesystem import join, list_folders
from rebeca_ray.storage.objects import JsonObject, read_json

log = logging.getLogger(__name__)

Description = JsonObject  # the inputs of a run, by field

# Settings that do not change the result: where and when, how many at a time, and later judgement.
NOT_COMPARED_ON_RESUME = fields_with(GenerateConfig, NOT_COMPARED)


def describe_run(
    config: GenerateConfig, versions: dict[str, str], previous: str | None, digests: dict[str, str]
) -> Description:
    """Return the inputs of a run: settings, models, digests of its tables, and the snapshot it follows."""
    description = {
        **flat("config", config.model_dump(mode="json", exclude=NOT_COMPARED_ON_RESUME)),
        **{f"version of {name}": version for name, version in versions.items()},
        **{f"content of {name}": digest for name, digest in digests.items()},
        "previous snapshot": previous,
    }
    return dict(json.loads(json.dumps(description)))  # as it is read back


def inputs_digest(description: Description) -> str:
    """Return a digest of a run's inputs, for its manifest: all but the snapshot it follows."""
    inputs = {name: value for name, value in description.items() if name != "previous snapshot"}
    return hash128(json.dumps(inputs, sort_keys=True))


def is_made_already(
    published: Manifest, config: GenerateConfig, run_date: datetime.date, description: Description
) -> bool:
    """Return whether the published snapshot is what this job would make.

    It is of the same date and inputs, and no item failed or waits for time. So a job that is repeated after
    its success, or after it was killed past it, succeeds and changes nothing.
    """
    counts = published.counts
    return (
        published.inputs == inputs_digest(description)
        and published.run_date == run_date.isoformat()
        and config.run_id in (None, published.run_id)
        and not (counts.failed or counts.deferred or counts.stale_users)
    )


def described_inputs(description: Description) -> dict[str, str]:
    """Return the digests of a run's tables in its description, by their names."""
    prefix = "content of "
    return {
        name.removeprefix(prefix): digest for name, digest in description.items() if name.startswith(prefix)
    }


def flat(prefix: str, values: Description) -> Description:
    """Return nested settings under dotted names."""
    flattened: Description = {}
    for name, value in values.items():
        joined = f"{prefix}.{name}"
        flattened |= flat(joined, value) if isinstance(value, dict) else {joined: value}
    return flattened


def choose_run(
    config: GenerateConfig,
    run_date: datetime.date,
    description: Description,
    *,
    resume: Resume,
    retry_failed: bool,
) -> tuple[str, BegunRun | None]:
    """Return the id of the run to resume and its beginning, or a new id and None.

    Raises InputError, naming the field that differs, if the run that must be resumed was made from something
    else, and if there is none that must be resumed.
    """
    candidates = candidate_runs(config, run_date)
    differences = {
        run_id: difference(
            {"run_date": run.run_date, **run.described},
            # Without a date in the config, the run's own date applies.
            {"run_date": str(config.run_date or run.run_date), **description},
        )
        for run_id, run in candidates.items()
    }
    same = [run_id for run_id, field in differences.items() if field is None]
    must_resume = resume == "require" or retry_failed
    if resume != "never" and same:
        return same[-1], candidates[same[-1]]
    if resume == "never" and config.run_id in candidates:
        raise InputError(
            f"catalog {config.catalog}: run_id {config.run_id} was begun before; "
            "choose another, or let it be resumed"
        )
    if resume != "never" and differences:
        run_id, field = list(differences.items())[-1]
        reason = f"run {run_id} of {candidates[run_id].run_date} cannot be resumed: {field}"
        if must_resume or config.run_id is not None:
            raise InputError(
                f"catalog {config.catalog}: {reason}; restore that, "
                "or start a new run with --resume never and another run_id"
            )
        log.warning(f"{reason}; a new run starts")
    elif must_resume:
        raise InputError(
            f"catalog {config.catalog}: no unfinished run {config.run_id or f'of {run_date}'} to go on with, "
            "which --resume require and --retry-failed ask for; leave them out to start one"
        )
    return config.run_id or new_run_id(), None


def candidate_runs(config: GenerateConfig, run_date: datetime.date) -> dict[str, BegunRun]:
    """Return the unfinished runs that this job may resume: the one it names, else those of its date.

    Raises InputError if the named run ended before.
    """
    doomed = read_pointer(config.catalog)[0].doomed  # gc removes what is left of them
    begun = {run_id: run for run_id, run in unfinished_runs(config.catalog).items() if run_id not in doomed}
    if config.run_id is None:
        return {run_id: run for run_id, run in begun.items() if run.run_date == run_date.isoformat()}
    if config.run_id in doomed:
        raise InputError(
            f"catalog {config.catalog}: run_id {config.run_id} is being collected; "
            "choose another, or give none"
        )
    if config.run_id in begun:
        return {config.run_id: begun[config.run_id]}
    for date in list_folders(join(config.catalog, "snapshots")):
        if (
            read_json(join(config.catalog, "snapshots", date, f"run_id={config.run_id}/manifest.json"))
            is not None
        ):
            raise InputError(
                f"catalog {config.catalog}: run_id {config.run_id} was used before; "
                "choose another, or give none"
            )
    return {}


def difference(before: Description, now: Description) -> str | None:
    """Return the first field that differs, with both values; None if none does."""
    for name in [*now, *before]:
        if before.get(name) != now.get(name):
            return f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
    return None


def begin(root: str, run_id: str, run_date: datetime.date, description: Description) -> BegunRun:
    """Record everything a new run is made from, before it writes anything else."""
    begun = BegunRun(
        run_id=run_id,
        run_date=run_date.isoformat(),
        begun_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        described=description,
    )
    write_run_record(root, record_of(root, begun))
    write_begun(root, begun)
    return begun


def record_of(root: str, begun: BegunRun) -> RunRecord:
    catalog_id = read_pointer(root)[0].catalog_id or ""
    return RunRecord(catalog_id=catalog_id, run_id=begun.run_id, run_date=begun.run_date)
