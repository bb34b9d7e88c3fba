"""Run the nightly job for one date: embed new items, train if due, generate, collect garbage.

Running it a second time for the same date changes nothing.
"""

import datetime
import logging
from dataclasses import dataclass

from rebeca_ray.catalog.gc import Garbage, collect
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.catalog.versions import LEASE_SECONDS
from rebeca_ray.config.jobs import NightlyConfig, TrainConfig, dated
from rebeca_ray.data.embedding import embed_items
from rebeca_ray.data.erasure import remove_old_work
from rebeca_ray.errors import InputError, LeaseHeldError, ResumableError, UserError
from rebeca_ray.generation.pipeline import Generated, generate_catalog
from rebeca_ray.log import set_run_id
from rebeca_ray.prior.checkpoint import load_prior
from rebeca_ray.storage.failures import user_error
from rebeca_ray.telemetry.attempt import Attempt, night_attempt
from rebeca_ray.telemetry.reporting import reported

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Night:
    """The result of one date: its published manifest, and an error that did not cost the catalog."""

    run_date: datetime.date
    generated: Generated
    trouble: UserError | None


def run_nightly(config: NightlyConfig) -> tuple[list[Night], Garbage | None]:
    """Bring the catalog up to `run_date`: backfill missed dates, oldest first. Returns the published nights.

    A missed date or a training that fails costs no later date its catalog. Its error is raised at the end.
    """
    since = datetime.datetime.now(datetime.UTC)  # read once: all dates share one `publish_by`
    tonight = config.run_date or since.date()
    with reported(night_attempt(config, tonight)) as attempt:
        return run_dates(config, attempt, since, tonight)


def run_dates(
    config: NightlyConfig, attempt: Attempt, since: datetime.datetime, tonight: datetime.date
) -> tuple[list[Night], Garbage | None]:
    """Run the nights of all dates due, as `run_nightly` says, and note them in `attempt`."""
    last = published_date(config, tonight)
    nights, trouble = [], None
    for date in dates_due(last, tonight, config.catch_up):
        set_run_id(None)  # the run of the date before is over
        try:
            nights.append(run_night(config, attempt, date, since))
            trouble = trouble or nights[-1].trouble
        except Exception as error:
            reason = user_error(error)
            # A later date would keep an unfinished run from ever being resumed.
            if reason is None or date == tonight or isinstance(reason, LeaseHeldError | ResumableError):
                raise
            log.warning("the night of %s failed and is skipped: %s", date, reason)
            trouble = trouble or reason
    set_run_id(None)
    garbage = None
    if nights:
        root, keep = config.generate.catalog, config.keep_snapshots
        try:
            with attempt.step("collect"):
                garbage = collect(root, keep=keep, grace_hours=config.grace_hours)
        except UserError as error:  # the nights are published all the same
            log.warning("collecting garbage failed, the next night tries again: %s", error)
        remove_old_training(config, since)
    attempt.changed = bool(nights)
    if trouble:
        raise trouble
    return nights, garbage


def remove_old_training(config: NightlyConfig, now: datetime.datetime) -> None:
    """Remove histories and checkpoints that are older than the config keeps them. A failure is a warning."""
    if config.train is None or config.keep_training_days is None:
        return
    before = now - datetime.timedelta(days=config.keep_training_days)
    try:
        with hold_lease(config.train.out, "collect", LEASE_SECONDS, "prior"):  # no training writes meanwhile
            folders = remove_old_work(config.train.storage, before)
    except UserError as error:
        log.warning("collecting the work of trainings failed, the next night tries again: %s", error)
    else:
        log.info(f"{config.train.storage}: {len(folders):,} folders of earlier trainings removed")


def published_date(config: NightlyConfig, date: datetime.date) -> datetime.date | None:
    """Return the latest date that was published, None before the first.

    A date that was rolled back stays so: it counts. Raises InputError if `date` is before it.
    """
    pointer, _ = read_pointer(config.generate.catalog)
    dates = [pointer.run_date, *(entry["run_date"] for entry in pointer.withdrawn)]
    last = max((datetime.date.fromisoformat(text) for text in dates if text), default=None)
    if last is not None and date < last:
        raise InputError(
            f"catalog {config.generate.catalog}: run_date {date} is before {last}, which was published; "
            "a night only goes forward "
            "(`rebeca generate` publishes any date, and `rebeca catalog rollback` goes back)"
        )
    return last


def dates_due(last: datetime.date | None, tonight: datetime.date, catch_up: int) -> list[datetime.date]:
    """Return the dates without a snapshot up to tonight, at most `catch_up` of them missed ones.

    Before the first snapshot only tonight is due.
    """
    if last is None:
        return [tonight]
    first = max(last + datetime.timedelta(days=1), tonight - datetime.timedelta(days=catch_up))
    return [first + datetime.timedelta(days=number) for number in range((tonight - first).days + 1)]


def run_night(
    config: NightlyConfig, attempt: Attempt, date: datetime.date, since: datetime.datetime
) -> Night:
    """Embed, train if due, generate and publish for one date."""
    trouble = None
    if config.embed is not None:
        with attempt.step("embed"):
            new = embed_items(dated(config.embed, date), only_new=True, run_date=date)
        log.info("%s: %s new items embedded", date, f"{new:,}")
    if config.train is not None:
        train = dated(config.train, date)
        if training_is_due(train.out, date, config.train_every_days):
            with attempt.step("train"):
                trouble = train_for(train, date, config.generate.catalog)
    published_date(config, date)  # training holds no lease of the catalog: is a later date published by now?
    generate = dated(config.generate, date).model_copy(update={"run_date": date})
    with attempt.step("generate"):
        generated = generate_catalog(generate, since=since)
    return Night(run_date=date, generated=generated, trouble=trouble)


def train_for(train: TrainConfig, date: datetime.date, catalog: str) -> UserError | None:
    """Train the prior for a date. Returns the error of a failed training if an earlier prior remains.

    Raises LeaseHeldError if another process trains it now.
    """
    from rebeca_ray.training.train import train_prior  # it loads torch, which other nights do without

    if train.catalog is None:
        train = train.model_copy(update={"catalog": catalog})
    try:
        train_prior(train, run_date=date)
    except Exception as error:
        reason = user_error(error)
        if reason is None or isinstance(reason, LeaseHeldError) or not loads(train.out):
            raise
        log.warning("%s: training failed, the previous prior is used: %s", date, reason)
        return reason
    return None


def training_is_due(prior: str, date: datetime.date, every_days: int) -> bool:
    """Return whether the prior does not load, or is `every_days` old on `date`, or of unknown age."""
    trained = read_pointer(prior, "prior")[0].run_date
    if trained is None or (date - datetime.date.fromisoformat(trained)).days >= every_days:
        return True
    return not loads(prior)


def loads(prior: str) -> bool:
    """Return whether the prior can be read as a whole."""
    try:
        load_prior(prior)
    except InputError as error:  # a store that does not answer says nothing about the prior
        log.warning("%s", error)
        return False
    return True
