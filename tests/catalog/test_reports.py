"""The reports of attempts in a catalog: old ones are collected, and those that name a person are erased."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from rebeca_ray.catalog.gc import collect
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.catalog.reports import list_reports, report_uri, reports_naming, write_report
from rebeca_ray.catalog.verify import verify
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.forget import Places, forget
from rebeca_ray.storage.objects import JsonObject
from tests.conftest import USERS, snapshot_of

NOW = datetime.now(UTC)


def write(root: str, days_ago: float, report: JsonObject, attempt_id: str = "1a2b3c4d-5e6f") -> str:
    uri = report_uri(root, NOW - timedelta(days=days_ago), "generate", attempt_id)
    assert write_report(root, report, uri)
    return uri


def failed(message: str) -> JsonObject:
    return {"error": {"type": "InputError", "message": message}, "failures": {}}


def test_old_reports_are_collected_and_those_that_name_a_person_are_erased(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = config.catalog
    snapshot_of(config)
    (first,) = list_reports(root)
    old, young = write(root, 91, failed("a: b; c")), write(root, 89, failed("a: b; c"))
    foreign = Path(root, "reports", "notes.txt")
    foreign.write_text("theirs")
    assert list_reports(root) == [old, young, first]
    assert collect(root, keep=1, grace_hours=0, dry_run=True).files == [old]
    collect(root, keep=1, grace_hours=0)
    assert list_reports(root) == [young, first]
    assert foreign.exists()
    assert verify(read_catalog(root), "full") == []

    monkeypatch.setenv("REBECA_ERASURE_KEY", "a secret of 16 characters")
    named = write(root, 1, failed(f"request: user_id {USERS[0]!r} comes twice; list each user once"))
    counts = forget(root, [USERS[0]], Places()).removed.counts
    assert counts["reports of attempts"] == 1
    assert list_reports(root) == [young, first]
    assert not Path(named).exists()


@pytest.mark.parametrize(
    ("text", "user", "is_named"),
    [
        ("user_id 'ann' comes twice", "ann", True),
        ("user_id 'annabel' comes twice", "ann", False),
        ("row 1: user 1 is unknown", "2", False),
        (f"user {'x' * 40} is unknown", "x" * 90, True),
        (r"user_id 'a\nb' has a line break", "a\nb", True),
    ],
)
def test_a_person_is_named_by_a_whole_or_a_shortened_id(
    tmp_path: Path, text: str, user: str, is_named: bool
) -> None:
    (tmp_path / "latest.json").write_text("{}")
    uri = write(str(tmp_path), 1, failed(text))
    assert reports_naming(str(tmp_path), [user]) == ([uri] if is_named else [])


def test_reasons_of_failed_items_and_damaged_reports_count_too(tmp_path: Path) -> None:
    (tmp_path / "latest.json").write_text("{}")
    reasons = write(str(tmp_path), 1, {"error": None, "failures": {"render: no image of ann": 1}}, "aaaaaaaa")
    damaged = write(str(tmp_path), 1, failed("a: b; c"), "bbbbbbbb")
    Path(damaged).write_text("{")
    write(str(tmp_path), 1, {"error": None, "failures": {}, "run_id": "ann"}, "cccccccc")
    assert reports_naming(str(tmp_path), ["ann"]) == [reasons, damaged]


def test_without_a_catalog_there_is_no_report(tmp_path: Path) -> None:
    root = str(tmp_path / "catalog")
    assert not write_report(root, {}, report_uri(root, NOW, "generate", "1a2b3c4d"))
    assert not Path(root).exists()
