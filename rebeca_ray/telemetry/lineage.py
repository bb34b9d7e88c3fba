"""OpenLineage events of an attempt: START, and COMPLETE, FAIL or ABORT at its end, with its datasets.

The client library sends them, from a thread of its own. Without a server in the settings or in the client's
variables, nothing is sent.
"""

import importlib.util
import logging
import os
import platform
import time
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import rebeca_ray
from rebeca_ray import schemas
from rebeca_ray.config.telemetry import LineageSettings
from rebeca_ray.telemetry.attempt import Attempt
from rebeca_ray.telemetry.sending import Sender, UndeliveredError, tolerating_errors
from rebeca_ray.telemetry.summary import Outcome, Summary

if TYPE_CHECKING:
    from openlineage.client import OpenLineageClient
    from openlineage.client.event_v2 import InputDataset, OutputDataset, RunEvent

log = logging.getLogger(__name__)

URL = "OPENLINEAGE_URL"
# Other ways to send events.
TRANSPORTS = ("OPENLINEAGE_CONFIG", "OPENLINEAGE__TRANSPORT", "OPENLINEAGE__TRANSPORT__TYPE")
PAUSES = (0.3, 1.0)  # seconds before an event is sent again
PRODUCER = f"urn:rebeca-ray:{rebeca_ray.__version__}"
STATES = {Outcome.STOPPED: "ABORT", Outcome.PUBLISHED: "COMPLETE", Outcome.NOTHING_TO_DO: "COMPLETE"}
COUNTS = "rebeca_counts"  # the facet with figures of our own


class Lineage:
    """The events of one attempt. An outage is one warning, and delays its end by a few seconds at most."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt, self.settings = attempt, attempt.settings.lineage
        self.sender: Sender | None = None
        if is_on(self.settings):
            self.sender = Sender("lineage")
            self.send("START", attempt.began_at, None)

    def send(self, state: str, moment: datetime, summary: Summary | None) -> None:
        """Send one event: make it now, and deliver it in the background."""
        if self.sender:
            with tolerating_errors("making a lineage event"):
                event = event_of(self.attempt, state, moment, summary)
                self.sender.send(lambda: deliver(self.settings, event))

    def end(self, summary: Summary) -> None:
        """Send the last event of the attempt."""
        self.send(STATES.get(summary.outcome, "FAIL"), datetime.fromisoformat(summary.ended_at), summary)

    def close(self) -> None:
        if self.sender:
            self.sender.close(self.settings.timeout_seconds)


def is_on(settings: LineageSettings) -> bool:
    """Return whether a server is named, and warn if the client is not installed."""
    if settings.url is None and not any(os.environ.get(name) for name in (URL, *TRANSPORTS)):
        return False
    if importlib.util.find_spec("openlineage") is None:
        log.warning(
            "lineage: the OpenLineage client is not installed; install rebeca-ray[lineage], or name no server"
        )
        return False
    return True


def deliver(settings: LineageSettings, event: "RunEvent") -> None:
    """Send an event, again after a pause if that fails."""
    client = client_of(settings)
    for pause in PAUSES:
        try:
            client.emit(event)
            break
        except Exception:  # of any transport
            time.sleep(pause)
    else:
        client.emit(event)
    if not client.close(settings.timeout_seconds):  # some transports only queue an event
        raise UndeliveredError(f"no answer within {settings.timeout_seconds:g} s")


def client_of(settings: LineageSettings) -> "OpenLineageClient":
    """Return a client for the server of the settings, or as the client's variables say."""
    from openlineage.client import OpenLineageClient
    from openlineage.client.transport.http import HttpConfig, HttpTransport

    url = settings.url or os.environ.get(URL)
    if settings.url is None and any(os.environ.get(name) for name in TRANSPORTS):
        return OpenLineageClient()
    # The client's retries would write a line of the log each.
    transport: dict[str, object] = {"url": url, "timeout": settings.timeout_seconds, "retry": {"total": 0}}
    if endpoint := os.environ.get("OPENLINEAGE_ENDPOINT"):
        transport["endpoint"] = endpoint
    if key := os.environ.get("OPENLINEAGE_API_KEY"):
        transport["auth"] = {"type": "api_key", "apiKey": key}
    return OpenLineageClient(transport=HttpTransport(HttpConfig.from_dict(transport)))


def event_of(attempt: Attempt, state: str, moment: datetime, summary: Summary | None) -> "RunEvent":
    """Return one event of an attempt; of its end if there is a summary."""
    from openlineage.client.event_v2 import Job, Run, RunEvent, RunState
    from openlineage.client.facet_v2 import job_type_job

    kind = job_type_job.JobTypeJobFacet(
        processingType="BATCH", integration="REBECA", jobType="JOB", producer=PRODUCER
    )
    return RunEvent(
        eventType=RunState[state],
        eventTime=moment.isoformat(timespec="milliseconds"),
        producer=PRODUCER,
        run=Run(runId=attempt.attempt_id, facets=run_facets(attempt, summary)),
        job=Job(namespace=attempt.settings.lineage.namespace, name=attempt.job, facets={"jobType": kind}),
        inputs=inputs_of(attempt),
        outputs=[output_of(attempt, summary)] if attempt.job != "nightly" else [],
    )


def run_facets(attempt: Attempt, summary: Summary | None) -> Mapping[str, Any]:
    """Return the facets of a run: its engine, date, parent, error and counts."""
    from openlineage.client.facet_v2 import (
        RunFacet,
        error_message_run,
        nominal_time_run,
        parent_run,
        processing_engine_run,
    )

    facets: dict[str, object] = {
        "processing_engine": processing_engine_run.ProcessingEngineRunFacet(
            name="rebeca_ray", version=rebeca_ray.__version__, producer=PRODUCER
        )
    }
    if attempt.run_date:
        begin = datetime.combine(date.fromisoformat(attempt.run_date), datetime.min.time(), UTC)
        facets["nominalTime"] = nominal_time_run.NominalTimeRunFacet(
            nominalStartTime=begin.isoformat(),
            nominalEndTime=(begin + timedelta(days=1)).isoformat(),
            producer=PRODUCER,
        )
    if attempt.parent:
        namespace = attempt.parent.settings.lineage.namespace
        facets["parent"] = parent_run.ParentRunFacet(
            run=parent_run.Run(runId=attempt.parent.attempt_id),
            job=parent_run.Job(namespace=namespace, name=attempt.parent.job),
            producer=PRODUCER,
        )
    if summary and summary.error:
        facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(
            message=summary.error.message,
            programmingLanguage=f"Python {platform.python_version()}",
            producer=PRODUCER,
        )
    if summary:
        keys = {"run_id", "outcome", "exit_code", "counts", "failures", "figures", "late_seconds"}
        values = summary.model_dump(mode="json", include=keys, exclude_none=True)
        seconds = {name: stage.seconds for name, stage in summary.stages.items()}
        facets[COUNTS] = RunFacet(producer=PRODUCER).with_additional_properties(**values, stages=seconds)
    return facets


def inputs_of(attempt: Attempt) -> "list[InputDataset]":
    """Return the input datasets: the tables, the prior, and the snapshot that this one follows."""
    from openlineage.client.event_v2 import InputDataset
    from openlineage.client.facet_v2 import dataset_version_dataset

    datasets = []
    versions = {name: attempt.versions.get(name) for name in attempt.inputs}
    locations = dict(attempt.inputs)
    if attempt.previous:
        locations["previous"], versions["previous"] = attempt.out, attempt.previous.run_id
    for name, location in locations.items():
        if location is None:
            continue
        facets = {}
        if version := versions[name]:
            facets["version"] = dataset_version_dataset.DatasetVersionDatasetFacet(
                datasetVersion=version, producer=PRODUCER
            )
        namespace, path = dataset_name(location)
        datasets.append(InputDataset(namespace=namespace, name=path, facets=facets))
    return datasets


def output_of(attempt: Attempt, summary: Summary | None) -> "OutputDataset":
    """Return the output dataset, with schema and statistics once it is published."""
    from openlineage.client.event_v2 import OutputDataset
    from openlineage.client.facet_v2 import (
        dataset_version_dataset,
        output_statistics_output_dataset,
        schema_dataset,
    )

    namespace, path = dataset_name(attempt.out)
    manifest = attempt.manifest
    if manifest is None or summary is None or summary.outcome is not Outcome.PUBLISHED:
        return OutputDataset(namespace=namespace, name=path)
    fields = [
        schema_dataset.SchemaDatasetFacetFields(name=field.name, type=str(field.type))
        for field in schemas.table("items", manifest.embed_dim)
    ]
    return OutputDataset(
        namespace=namespace,
        name=path,
        facets={
            "schema": schema_dataset.SchemaDatasetFacet(fields=fields, producer=PRODUCER),
            "version": dataset_version_dataset.DatasetVersionDatasetFacet(
                datasetVersion=manifest.run_id, producer=PRODUCER
            ),
        },
        outputFacets={
            "outputStatistics": output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
                rowCount=manifest.counts.published,
                size=manifest.bytes,
                fileCount=manifest.files.rows,
                producer=PRODUCER,
            )
        },
    )


def dataset_name(location: str) -> tuple[str, str]:
    """Return namespace and name of a dataset, as OpenLineage names those of object stores and disks."""
    scheme, separator, rest = location.rstrip("/").partition("://")
    if not separator:
        return "file", location.rstrip("/")
    bucket, _, path = rest.partition("/")
    return f"{scheme}://{bucket}", path or "/"
