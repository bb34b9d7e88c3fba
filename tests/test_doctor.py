"""`rebeca doctor`: every part has a state, and a remedy where something is missing."""

import json
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rebeca_ray import doctor
from rebeca_ray.cli.commands import app
from rebeca_ray.doctor import examine

Usage = namedtuple("Usage", "total used free")


def state_of(part: str, catalog: str | None = None) -> tuple[str, str, str]:
    (finding,) = (finding for finding in examine(catalog) if finding.part == part)
    return finding.state, finding.detail, finding.remedy


def test_a_machine_that_runs_these_tests_runs_every_job() -> None:
    findings = examine()
    assert [finding.part for finding in findings if finding.state == "broken"] == []
    assert all(finding.remedy for finding in findings if finding.state != "ok")
    assert not [finding for finding in findings if finding.state == "ok" and finding.remedy]
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    assert [row["part"] for row in json.loads(result.output)] == [finding.part for finding in findings]


def test_a_full_disk_an_old_python_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(doctor.GIB, doctor.GIB, 0))
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: None)
    assert state_of("Python")[0] == "broken"
    assert state_of("Ray") == (
        "broken",
        state_of("Ray")[1],
        "free some space there, or set RAY_TMPDIR to another folder",
    )
    assert state_of("shared memory")[2] == "Ray becomes slow; in a container, set --shm-size=2g or more"
    assert state_of("extra onnx")[2] == "pip install 'rebeca-ray[onnx]'"
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 2
    assert "pip install 'rebeca-ray[c2pa]'" in result.output


def test_a_check_that_fails_and_a_small_container_are_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "absent"))
    assert state_of("Ray")[0] == "ok"
    (tmp_path / "memory.max").write_text(str(2 * doctor.GIB))
    monkeypatch.setattr(doctor, "MEMORY_LIMIT", tmp_path / "memory.max")
    assert (state_of("machine")[0], "2 GiB of memory" in state_of("machine")[1]) == ("missing", True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: os.stat(f"{path}/absent"))
    assert state_of("disk")[0] == "missing"
    assert "absent" in state_of("disk")[1]


def test_an_old_java_is_no_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert state_of("Java")[:2] == ("missing", "is not on PATH")
    (tmp_path / "java").write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
    (tmp_path / "java").chmod(0o755)
    assert state_of("Java")[:2] == ("missing", 'openjdk version "11.0.2"')
    (tmp_path / "java").write_text("#!/bin/sh\necho 'openjdk version \"21.0.2\"' >&2\n")
    assert state_of("Java")[0] == "ok"


def test_the_store_of_a_catalog_is_tried(
    s3_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    assert state_of("store", "s3://rebeca/doctor")[0] == "ok"
    (tmp_path / "file").touch()
    state, _, remedy = state_of("store", str(tmp_path / "file" / "catalog"))
    assert (state, remedy) == ("broken", "choose another place or mend its permissions")
    assert state_of("store", str(tmp_path / "catalog"))[0] == "ok"
    assert os.listdir(tmp_path) == ["file"]
