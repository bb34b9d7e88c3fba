"""The summary of an ended attempt: its outcome, stages, counts, figures, rates and error, for machines.

`python -m rebeca_ray.telemetry.summary` prints its JSON schema, `infra/docs/summary.schema.json`.
"""

import json
import sys
from enum import StrEnum, auto
from typing import Literal

from pydantic import Field

from rebeca_ray.catalog.figures import GateFigures
from rebeca_ray.catalog.manifest import Cost, Counts, GateOutcome, PermutationFigures, Record, StageFigures
from rebeca_ray.config.telemetry import Event

Job = Literal["generate", "nightly", "train"]


class Outcome(StrEnum):
    """The end of an attempt."""

    PUBLISHED = auto()
    NOTHING_TO_DO = auto()  # it is published already
    REFUSED = auto()  # by the quality gate
    HELD = auto()  # another run holds the lease, or took it over
    STOPPED = auto()  # by Ctrl-C or SIGTERM
    FAILED = auto()


class Failure(Record):
    """The error that ended an attempt: its type, and one line with its remedy."""

    type: str
    message: str


class Safety(Record):
    """The checker of the images, and the items that it left out."""

    checker: str | None
    filtered: int


class Summary(Record):
    """An ended attempt. Later versions add keys. Null: it is unknown, or the attempt ended before it."""

    schema_version: int = 1
    attempt_id: str
    parent_id: str | None = None
    """The attempt of the night that this one is a part of."""
    job: Job
    outcome: Outcome
    events: list[Event]
    """Events of this attempt that can be notified."""
    exit_code: int
    error: Failure | None = None
    out: str
    """The folder that the job publishes in: a catalog, or the folder of a prior."""
    run_id: str | None = None
    run_date: str | None = None
    runs: list[str] = Field(default_factory=list)
    """The runs that a night published."""
    resumed: bool = False
    began_at: str
    ended_at: str
    seconds: float
    stages: dict[str, StageFigures]
    """Stages of a run or steps of a night, in their order."""
    counts: Counts | None = None
    failures: dict[str, int] = Field(default_factory=dict)
    """Failed items by stage and error, the ten most frequent."""
    safety: Safety | None = None
    figures: GateFigures | None = None
    permutation: PermutationFigures | None = None
    gate: GateOutcome | None = None
    actual: Cost | None = None
    """Images, hours of GPUs and CPUs, and the cost."""
    images: int | None = None
    """Images that this attempt rendered."""
    images_per_second: float | None = None
    bytes: int | None = None
    bytes_written: int | None = None
    publish_by: str | None = None
    late_seconds: float | None = None
    """Seconds from `publish_by` to the publication, 0 if it was in time."""
    versions: dict[str, str] = Field(default_factory=dict)
    previous_run_id: str | None = None
    snapshot: str | None = None
    manifest: str | None = None


if __name__ == "__main__":
    sys.stdout.write(json.dumps(Summary.model_json_schema(mode="serialization"), indent=2) + "\n")
