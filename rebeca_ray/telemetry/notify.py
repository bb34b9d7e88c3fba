"""Notify a command and a web address of ended attempts. Neither can change or hold up the job."""

import json
import logging
import os
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException, InvalidURL
from urllib.error import HTTPError, URLError

from rebeca_ray.config.telemetry import NotifySettings
from rebeca_ray.errors import describe
from rebeca_ray.storage.objects import JsonObject
from rebeca_ray.telemetry.sending import Sender, UndeliveredError
from rebeca_ray.telemetry.summary import Summary

log = logging.getLogger(__name__)

STANDARD_ERROR = 2
SHORT = (  # the keys of a summary that an address receives
    *("attempt_id", "job", "outcome", "events", "exit_code", "error", "out", "run_id", "run_date"),
    *("began_at", "ended_at", "seconds", "counts", "publish_by", "late_seconds", "snapshot"),
)


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuse redirects: another address must not get the header `Authorization`."""

    def redirect_request(self, *_: object) -> None:
        return None


class Notifier:
    """The receivers of a job's notifications. A missing variable is one warning when the job starts."""

    def __init__(self, settings: NotifySettings) -> None:
        self.settings = settings
        self.senders: list[Sender] = []
        self.url = self.secret("url", settings.url)
        self.authorization = self.secret("authorization", settings.authorization)

    def secret(self, name: str, value: str | None) -> str | None:
        """Return a value, that of a variable for `env:NAME`."""
        if value is None or not value.startswith("env:"):
            return value
        variable = value.removeprefix("env:")
        text = os.environ.get(variable, "").strip()  # a mounted secret ends with a line break
        if not text:
            log.warning("report.notify.%s: %s is not set here; set it to be notified", name, variable)
        return text or None

    def notify(self, summary: Summary, values: JsonObject) -> bool:
        """Send a summary to all receivers if one of its events is chosen; return whether somebody gets it."""
        if not set(summary.events) & set(self.settings.events):
            return False
        seconds = self.settings.timeout_seconds
        if command := self.settings.command:
            self.send("report.notify.command", lambda: run(command, json.dumps(values), seconds))
        if (url := self.url) and bool(self.settings.authorization) == bool(self.authorization):
            short = {"text": text_of(summary), **{key: values[key] for key in SHORT}}
            self.send("report.notify.url", lambda: post(url, self.authorization, short, seconds))
        return bool(self.senders)

    def send(self, receiver: str, deliver: Callable[[], object]) -> None:
        sender = Sender(receiver)
        sender.send(deliver)
        self.senders.append(sender)

    def close(self) -> None:
        """Return once all receivers answered, or their time is over."""
        for sender in self.senders:
            sender.close(self.settings.timeout_seconds + 1)  # they end by themselves


def text_of(summary: Summary) -> str:
    """Return one line for a person: chats show it."""
    line = f"rebeca {summary.job}: {summary.outcome.replace('_', ' ')}"
    line += f", run {summary.run_id} of {summary.run_date}" if summary.run_id else ""
    if summary.error:
        return f"{line}: {summary.error.message}"
    if summary.counts:
        line += f": items of {summary.counts.users:,} users"
        line += f", {summary.counts.stale_users:,} without new ones" if summary.counts.stale_users else ""
    return f"{line}, {summary.late_seconds:.0f} s late" if summary.late_seconds else line


def run(command: Sequence[str], text: str, seconds: float) -> None:
    """Run a command with a text as its standard input. Its output goes to the log's stream.

    Raises UndeliveredError if it fails. After its time, it is killed with everything that it started.
    """
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=STANDARD_ERROR, text=True, start_new_session=True
        )
    except OSError as error:
        raise UndeliveredError(f"cannot be started: {error.strerror}") from None
    try:
        process.communicate(text, timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise UndeliveredError(f"did not end within {seconds:g} s") from None
    if process.returncode:
        raise UndeliveredError(f"ended with exit code {process.returncode}")


def post(url: str, authorization: str | None, values: JsonObject, seconds: float) -> None:
    """Post JSON. Raises UndeliveredError, without the address, for any answer but a success."""
    if not url.startswith(("http://", "https://")):
        raise UndeliveredError("the address is none of http or https")
    headers = {"Content-Type": "application/json", "User-Agent": "rebeca-ray"}
    if authorization:
        headers["Authorization"] = authorization
    try:
        request = urllib.request.Request(url, json.dumps(values).encode(), headers)
        with urllib.request.build_opener(NoRedirects).open(request, timeout=seconds):
            pass
    except HTTPError as error:
        raise UndeliveredError(f"HTTP {error.code}") from None
    except (URLError, OSError) as error:
        raise UndeliveredError(describe(getattr(error, "reason", error)).replace(url, "***")) from None
    except (ValueError, InvalidURL):  # their texts may show the secret
        raise UndeliveredError("the address or the authorization has a form that HTTP refuses") from None
    except HTTPException as error:
        raise UndeliveredError(f"the answer is no HTTP ({type(error).__name__})") from None
