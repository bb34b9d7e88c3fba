"""The log of the package: time, level and run id on each line, for a person or as JSON lines.

Modules log with `logging.getLogger(__name__)`. The command line calls `configure`; Ray's workers call
`configure_worker`. A program that imports the package configures `logging` itself. Lines go to standard
error, with times in UTC.
"""

import json
import logging
import os
import sys
import time
from datetime import UTC, datetime
from typing import TextIO

PACKAGE = "rebeca_ray"
LEVELS = ("debug", "info", "warning", "error")
LEVEL, JSON_LINES = "REBECA_LOG_LEVEL", "REBECA_LOG_JSON"  # environment variables; workers read them too
RUN_ID_KEY = "rebeca_run_id"  # in the context that Ray Data sends to its workers


class RunId(logging.Filter):
    """Add the run id of this process to each record."""

    run_id: str | None = None
    in_worker = False

    def filter(self, record: logging.LogRecord) -> bool:
        record.run_id = self.run_id or (dataset_run_id() if self.in_worker else None)
        return True


RUN_ID = RunId()


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
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """Format as one JSON object: time, level, run_id, logger, message, and traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "run_id": getattr(record, "run_id", None),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def configure(level: str = "info", *, json_lines: bool = False) -> None:
    """Send the package's log to standard error, from `level` on.

    Processes started from here inherit both settings. A second call replaces them.
    """
    os.environ[LEVEL], os.environ[JSON_LINES] = level, "1" if json_lines else "0"
    handler = StandardError()
    handler.setFormatter(JsonFormatter() if json_lines else HumanFormatter())
    handler.addFilter(RUN_ID)
    package = logging.getLogger(PACKAGE)
    package.handlers = [handler]
    package.setLevel(level.upper())
    package.propagate = False  # a library may have set up the root logger, and each line would show twice
    enable()


def configure_worker() -> None:
    """Configure the log of a Ray worker from the environment. Ray forwards standard error to the driver."""
    level = os.environ.get(LEVEL, "").lower()
    RUN_ID.in_worker = True
    configure(level if level in LEVELS else "info", json_lines=os.environ.get(JSON_LINES) == "1")


def enable() -> None:
    """Enable the package's loggers again, which a `dictConfig` of Ray's or a user's may have disabled."""
    for name in [PACKAGE, *logging.root.manager.loggerDict]:
        if name == PACKAGE or name.startswith(f"{PACKAGE}."):
            logging.getLogger(name).disabled = False


def set_run_id(run_id: str | None) -> None:
    """Put a run id on each line that this process logs from now on; None removes it."""
    RUN_ID.run_id = run_id


def get_run_id() -> str | None:
    """Return the run id of this process's lines."""
    return RUN_ID.run_id


def dataset_run_id() -> str | None:
    """Return the run id that the driver gave the Ray Data context of this worker. Never imports Ray."""
    data = sys.modules.get("ray.data")
    value = data.DataContext.get_current().get_config(RUN_ID_KEY, None) if data else None
    return None if value is None else str(value)
