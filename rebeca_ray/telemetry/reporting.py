"""Report an attempt around its work: a span, lineage events, and at its end a summary and notifications."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime

from rebeca_ray.catalog.reports import report_uri, write_report
from rebeca_ray.errors import redacted
from rebeca_ray.storage.objects import JsonObject, write_json
from rebeca_ray.telemetry import traces
from rebeca_ray.telemetry.attempt import Attempt, summarize
from rebeca_ray.telemetry.lineage import Lineage
from rebeca_ray.telemetry.notify import Notifier
from rebeca_ray.telemetry.sending import tolerating_errors
from rebeca_ray.telemetry.summary import Outcome, Summary

log = logging.getLogger(__name__)

ACTIVE: ContextVar[Attempt | None] = ContextVar("attempt", default=None)  # the innermost one of this thread


@contextmanager
def reported(attempt: Attempt) -> Iterator[Attempt]:
    """Run the block as an attempt of a job, and report it however it ends. No report changes the end."""
    attempt.parent = ACTIVE.get()
    active = ACTIVE.set(attempt)
    lineage, notifier = Lineage(attempt), Notifier(attempt.settings.notify)
    error: BaseException | None = None
    try:
        with traces.span(attempt.job) as attributes:
            try:
                yield attempt
            finally:
                attributes["out"] = redacted(attempt.out)
                attributes["run_id"] = attempt.run.run_id if attempt.run else ""
    except BaseException as caught:
        error = caught
        raise
    finally:
        ACTIVE.reset(active)
        with tolerating_errors("reporting this attempt"):
            report(attempt, error, lineage, notifier)


def report(attempt: Attempt, error: BaseException | None, lineage: Lineage, notifier: Notifier) -> None:
    """Write the summary, and send it to everybody who is to hear of it."""
    summary = summarize(attempt, error)
    if attempt.parent and summary.run_id and summary.outcome is Outcome.PUBLISHED:
        attempt.parent.runs.append(summary.run_id)
    values = summary.model_dump(mode="json")
    written = [redacted(uri) for uri in write_summary(attempt, summary, values)]
    where = f"; summary -> {', '.join(written)}" if written else ""
    log.info("%s: %s%s", attempt.job, headline(summary), where)
    lineage.end(summary)
    line = summary.error.message if summary.error else ""
    heard = line in attempt.notified or notifier.notify(summary, values)
    if heard and line and attempt.parent:
        attempt.parent.notified.add(line)  # the night that fails by this need not say it again
    lineage.close()
    notifier.close()
    if attempt.parent is None:
        traces.flush()


def write_summary(attempt: Attempt, summary: Summary, values: JsonObject) -> list[str]:
    """Write the summary to its catalog, if there is one, and to the second file; return their addresses."""
    written = []
    if attempt.job != "train":
        ended_at = datetime.fromisoformat(summary.ended_at)
        uri = report_uri(attempt.out, ended_at, attempt.job, attempt.attempt_id)
        with tolerating_errors(f"writing {redacted(uri)}"):
            written += [uri] if write_report(attempt.out, values, uri) else []
    if uri := attempt.settings.summary_file or "":
        with tolerating_errors(f"writing {redacted(uri)}"):
            write_json(values, uri)
            written.append(uri)
    return written


def headline(summary: Summary) -> str:
    """Return the outcome, the time of each stage and the counts in one line for a person."""
    stages = ", ".join(f"{name} {stage.seconds:.1f} s" for name, stage in summary.stages.items())
    outcome = summary.outcome.replace("_", " ")
    parts = [f"{outcome} after {summary.seconds:.1f} s (exit code {summary.exit_code})"]
    parts += [stages] if stages else []
    if summary.images:
        rate = f" at {summary.images_per_second:,.2f} per second" if summary.images_per_second else ""
        parts.append(f"{summary.images:,} images{rate}")
    if summary.late_seconds:
        parts.append(f"{summary.late_seconds:.0f} s after publish_by")
    return "; ".join(parts)
