"""The reports of ended attempts in a catalog: one JSON object each, named by its time.

No reader and no run needs them. Garbage collection removes them after KEPT, and an erasure removes those that
name a person.
"""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

from rebeca_ray.errors import InputError
from rebeca_ray.storage.filesystem import exists, join, list_files
from rebeca_ray.storage.objects import JsonObject, read_json, write_json

FOLDER = "reports"
KEPT = timedelta(days=90)
TIME = "%Y%m%dT%H%M%S"
NAME = re.compile(r"(\d{8}T\d{6})-[a-z]+-[0-9a-f]+\.json")
SHOWN = 40  # characters of an id that an error shows at least


def report_uri(root: str, ended_at: datetime, job: str, attempt_id: str) -> str:
    return join(root, FOLDER, f"{ended_at.astimezone(UTC):{TIME}}-{job}-{attempt_id[:8]}.json")


def write_report(root: str, report: JsonObject, uri: str) -> bool:
    """Write a report into a catalog; return False, and write nothing, where there is no catalog."""
    if not exists(join(root, "latest.json")):
        return False
    write_json(report, uri)
    return True


def list_reports(root: str) -> list[str]:
    """Return the reports of a catalog, the oldest first."""
    files = list_files(join(root, FOLDER))
    return sorted(uri for uri in files if NAME.fullmatch(uri.rpartition("/")[2]))


def old_reports(root: str, now: datetime) -> list[str]:
    """Return the reports of attempts that ended more than KEPT before `now`."""
    first = f"{now - KEPT:{TIME}}"
    return [uri for uri in list_reports(root) if uri.rpartition("/")[2] < first]


def reports_naming(root: str, users: Iterable[str]) -> list[str]:
    """Return the reports with a text that names one of these users, and damaged reports."""
    with ThreadPoolExecutor(16) as pool:
        reports = list_reports(root)
        texts = dict(zip(reports, pool.map(texts_of, reports), strict=True))
    texts = {uri: text for uri, text in texts.items() if text != ""}
    return [uri for uri, text in texts.items() if text is None or any(names(text, user) for user in users)]


def texts_of(uri: str) -> str | None:
    """Return the texts of a report that come from inputs; None for a damaged report."""
    try:
        report = read_json(uri)
    except InputError:
        return None
    error, failures = (report or {}).get("error"), (report or {}).get("failures")
    parts = [str(error.get("message"))] if isinstance(error, dict) else []
    return "\n".join([*parts, *(failures if isinstance(failures, dict) else [])])


def names(text: str, user: str) -> bool:
    """Return whether a text names a user. An error shortens a long id, and escapes an unusual one."""
    for spelling in {user, repr(user)[1:-1]}:
        beginning = spelling[:SHOWN]
        if beginning in text and re.search(
            rf"(?<!\w){re.escape(beginning)}" + (r"(?!\w)" if beginning == spelling else ""), text
        ):
            return True
    return False
