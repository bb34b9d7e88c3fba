"""One night: embed new items, train if it is due, generate, collect garbage. For a date; done twice, it does nothing the second time."""

import datetime
from dataclasses import dataclass

from rebeca_ray.catalog.gc import Garbage, collect
from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.config.jobs import NightlyConfig, dated
from rebeca_ray.data.items import embed_items
from rebeca_ray.errors import InputError, LeaseHeldError, ResumableError, UserError
from rebeca_ray.generation.pipeline import Generated, generate_catalog
from rebeca_ray.storage.failures import user_error
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.objects import read_json, write_json
from rebeca_ray.training.train import train_prior

TRAINED = "nightly.json"  # beside a prior: the date it was trained for


@dataclass(frozen=True, kw_only=True)
class Night:
    """What one date brought: the manifest it published, and what failed without costing the catalog."""

    run_date: datetime.date
    generated: Generated
    trouble: UserError | None


def run_nightly(config: NightlyConfig) -> tuple[list[Night], Garbage | None]:
    """Bring the catalog up to `run_date`: missed dates first, the oldest before the others; returns what was published.

    A missed date or a training that fails costs no later date its catalog, but is raised at the end.
    """
    tonight = config.run_date or datetime.datetime.now(datetime.UTC).date()
    last = before_it(config, tonight)
    nights, trouble = [], None
    since = datetime.datetime.now(datetime.UTC)  # `publish_by` is the same for all of them
    for date in dates_due(last, tonight, config.catch_up):
        try:
            nights.append(one_night(config, date, since))
            trouble = trouble or nights[-1].trouble
        except Exception as error:
            found = user_error(error)
            if found is None or date == tonight or isinstance(found, LeaseHeldError | ResumableError):
                raise
            print(f"the night of {date} failed and is left out: {found}", flush=True)
            trouble = trouble or found
    garbage = (
        collect(config.generate.catalog, keep=config.keep_snapshots, grace_hours=config.grace_hours)
        if nights
        else None
    )
    if trouble:
        raise trouble
    return nights, garbage


def before_it(config: NightlyConfig, date: datetime.date) -> datetime.date | None:
    """The date that is published, None before the first. Raises UserError if `date` is before it."""
    pointer, _ = read_pointer(config.generate.catalog)
    last = datetime.date.fromisoformat(pointer.run_date) if pointer.run_date else None
    if last is not None and date < last:
        raise InputError(
            f"catalog {config.generate.catalog}: run_date {date} is before {last}, which is published; a night only goes forward "
            "(`rebeca generate` publishes any date, and `rebeca catalog rollback` goes back)"
        )
    return last


def dates_due(last: datetime.date | None, tonight: datetime.date, catch_up: int) -> list[datetime.date]:
    """The dates without a snapshot up to tonight, at most `catch_up` of them missed ones; only tonight before the first."""
    if last is None:
        return [tonight]
    first = max(last + datetime.timedelta(days=1), tonight - datetime.timedelta(days=catch_up))
    return [first + datetime.timedelta(days=number) for number in range((tonight - first).days + 1)]


def one_night(config: NightlyConfig, date: datetime.date, since: datetime.datetime) -> Night:
    """Embed, train if due, generate and publish for one date."""
    trouble = None
    if config.embed is not None:
        new = embed_items(dated(config.embed, date), only_new=True)
        print(f"{date}: {new:,} new items embedded", flush=True)
    if (
        config.train is not None
        and (train := dated(config.train, date))
        and training_is_due(train.out, date, config.train_every_days)
    ):
        if train.catalog is None:
            train = train.model_copy(update={"catalog": config.generate.catalog})
        try:
            train_prior(train)
            write_json({"run_date": date.isoformat()}, join(train.out, TRAINED))
        except Exception as error:
            trouble = user_error(error)
            if trouble is None or read_json(join(train.out, "config.json")) is None:
                raise
            print(f"{date}: training failed, the prior of before is used: {trouble}", flush=True)
    before_it(config, date)  # something else may have published since, which takes no lease from a training
    generate = dated(config.generate, date).model_copy(update={"run_date": date})
    return Night(run_date=date, generated=generate_catalog(generate, since=since), trouble=trouble)


def training_is_due(prior: str, date: datetime.date, every_days: int) -> bool:
    """Whether the prior is missing, or `every_days` old on `date`."""
    trained = (read_json(join(prior, TRAINED)) or {}).get("run_date")
    return trained is None or (date - datetime.date.fromisoformat(trained)).days >= every_days
