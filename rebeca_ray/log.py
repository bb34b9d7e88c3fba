"""The log of the package: time, level and run id on each line, for a person or as JSON lines.

Modules log with `logging.getLogger(__name__)`. The command line calls `configure`. What runs in a worker of
Ray first calls `use` with the settings of the process that sent it. A program that imports the package
configures `logging` itself. Lines go to standard error, with times in UTC.
"""

import json
import logging
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal, TextIO

from rebeca_ray.errors import redacted

PACKAGE = "rebeca_ray"
Level = Literal["debug", "info", "warning", "error"]
LEVEL, JSON_LINES = "REBECA_LOG_LEVEL", "REBECA_LOG_JSON"  # environment variables of the command line


@dataclass(frozen=True)
class LogSettings:
    """How a process logs. It travels to workers."""

    level: Level = "info"
    json_lines: bool = False
    run_id: str | None = None


settings = LogSettings()
level_is_given = False  # by the command line


class RunId(logging.Filter):
    """Add the run id of this process to each record."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.run_id = settings.run_id
        return True


class StandardError(logging.StreamHandler[TextIO]):
    """Write to the standard error of the moment, which tests and Ray replace."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class HumanFormatter(logging.Formatter):
    """Format as `12:03:44 INFO run ID: message`."""

    def format(self, record: logging.LogRecord) -> str:
        run_id = getattr(record, "run_id", None)
        moment = time.strftime("%H:%M:%S", time.gmtime(record.created))
        line = f"{moment} {record.levelname}{f' run {run_id}' if run_id else ''}: {record.getMessage()}"
        return redacted(f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line)


class JsonFormatter(logging.Formatter):
    """Format as one JSON object: time, level, run_id, logger, message, and traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "run_id": getattr(record, "run_id", None),
            "logger": record.name,
            "message": redacted(record.getMessage()),
        }
        if record.exc_info:
            fields["traceback"] = redacted(self.formatException(record.exc_info))
        return json.dumps(fields, ensure_ascii=False)


def configure(level: Level | None = None, *, json_lines: bool = False) -> None:
    """Send the package's log to standard error, from `level` on. A second call replaces the first.

    Without `level` it is `info`, unless a config then gives another.
    """
    global level_is_given
    level_is_given = level is not None
    use(LogSettings(level or "info", json_lines, settings.run_id))


def set_level_of_config(level: Level | None) -> None:
    """Log from the level of a config on, unless the command line gave one."""
    if level and not level_is_given:
        use(replace(settings, level=level))


def use(new: LogSettings) -> None:
    """Log as another process does. In a worker, Ray forwards standard error to the driver."""
    global settings
    settings = new
    handler = StandardError()
    handler.setFormatter(JsonFormatter() if new.json_lines else HumanFormatter())
    handler.addFilter(RunId())
    package = logging.getLogger(PACKAGE)
    package.handlers = [handler]
    package.setLevel(new.level.upper())
    package.propagate = False  # a library may have set up the root logger, and each line would show twice
    enable()


def current_settings() -> LogSettings:
    """Return how this process logs, for its workers."""
    return settings


def enable() -> None:
    """Enable the package's loggers again, which a `dictConfig` of Ray's or a user's may have disabled."""
    for name in [PACKAGE, *logging.root.manager.loggerDict]:
        if name == PACKAGE or name.startswith(f"{PACKAGE}."):
            logging.getLogger(name).disabled = False


def set_run_id(run_id: str | None) -> None:
    """Put a run id on each line that this process and its workers log from now on; None removes it."""
    global settings
    settings = replace(settings, run_id=run_id)
