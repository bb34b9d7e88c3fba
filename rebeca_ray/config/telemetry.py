"""The settings of reports: the summary of an attempt, lineage events, notifications. None changes a run."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from rebeca_ray.config.decoder import WebAddress, web_address
from rebeca_ray.config.fields import SECRET, Effect, Identifier, Location, Settings


def variable(value: str) -> str:
    """Return `env:NAME`. Raises an error that shows no value: it may be the secret itself."""
    if not re.fullmatch(r"env:[A-Za-z_][A-Za-z0-9_]*", value):
        raise PydanticCustomError(SECRET, "a config must hold no secret; give env:NAME")
    return value


def hook_address(value: str) -> str:
    """Return `env:NAME`, or an address of http or https. Raises ValueError for any other text."""
    return variable(value) if value.startswith("env:") else web_address(value)


Event = Literal["success", "failure", "late", "refused"]
Events = Annotated[tuple[Event, ...], Field(strict=False, min_length=1)]
Command = Annotated[tuple[str, ...], Field(strict=False, min_length=1, max_length=100)]
Variable = Annotated[str, AfterValidator(variable)]
HookAddress = Annotated[str, AfterValidator(hook_address)]
Patience = Annotated[float, Field(gt=0, le=300)]  # seconds that a report may delay the end of a job


class LineageSettings(Settings):
    """The OpenLineage events of a job."""

    url: Annotated[WebAddress | None, Effect.NOTHING] = None
    """Address of an OpenLineage server. By default, the variables of the OpenLineage client decide, such as
    `OPENLINEAGE_URL`. Without any of them, no event is sent."""
    namespace: Annotated[Identifier, Effect.NOTHING] = "rebeca"
    """Namespace of the jobs. Give each catalog its own."""
    timeout_seconds: Annotated[Patience, Effect.NOTHING] = 5
    """Seconds that the events may delay the end of a job, all together."""


class NotifySettings(Settings):
    """The command and the address that hear of ended attempts."""

    command: Annotated[Command | None, Effect.NOTHING] = None
    """Program and arguments, run without a shell. It reads the summary as JSON from standard input."""
    url: Annotated[HookAddress | None, Effect.NOTHING] = None
    """Address that receives a short summary as JSON, or `env:NAME` if the address is a secret."""
    authorization: Annotated[Variable | None, Effect.NOTHING] = None
    """Variable `env:NAME` with the value of the header `Authorization`."""
    events: Annotated[Events, Effect.NOTHING] = ("failure", "late", "refused")
    """Events that are reported: `success`, `failure`, `late`, `refused` by the gate."""
    timeout_seconds: Annotated[Patience, Effect.NOTHING] = 10
    """Seconds that the command and the address may each take."""


class ReportSettings(Settings):
    """The reports of a job at its end. A report that fails is one warning in the log."""

    summary_file: Annotated[Location | None, Effect.NOTHING] = None
    """Second file that receives the summary. Each attempt replaces it."""
    lineage: LineageSettings = LineageSettings()
    """OpenLineage events."""
    notify: NotifySettings = NotifySettings()
    """Notifications of ended attempts."""
