"""The wheel and the source distribution: all files are inside, and the wheel works far from a checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPO


def build(source: Path, out: Path, target: str) -> Path:
    """Build one target with hatchling; return its file."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", out]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=240)
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(REPO, tmp_path_factory.mktemp("wheel"), "wheel")


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def tracked(folder: str) -> set[str]:
    """Return the files of a folder that git knows, or that it would not ignore."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder]
    paths = subprocess.run(listed, cwd=REPO, check=True, capture_output=True, text=True).stdout.split()
    return {path for path in paths if (REPO / path).is_file()}


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    expected = tracked("rebeca_ray")
    expected |= {path.replace("serving/", "rebeca_ray/") for path in tracked("serving/model_repository")}
    expected |= {path.replace("jobs/", "rebeca_ray/stickers/") for path in tracked("jobs/configs")}
    inside = {name for name in names(wheel) if ".dist-info/" not in name}
    assert inside == expected
    assert {"rebeca_ray/py.typed", "rebeca_ray/stickers/report.html.j2"} <= inside
    licenses = {name.partition(".dist-info/licenses/")[2] for name in names(wheel)} - {""}
    assert licenses == {
        "LICENSE",
        "rebeca_ray/stickers/assets/NOTICE",
        "rebeca_ray/decoder/safety_model/NOTICE",
    }


def test_the_source_distribution_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    archive = build(REPO, tmp_path / "sdist", "sdist")
    with tarfile.open(archive) as files:
        files.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("rebeca_ray-*")
    again = build(source, tmp_path / "again", "wheel")
    assert again.name == wheel.name
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(again) as theirs:
        assert {entry.filename: entry.CRC for entry in ours.infolist()} == {
            entry.filename: entry.CRC for entry in theirs.infolist()
        }


def test_the_unpacked_wheel_runs_without_a_checkout(wheel: Path, tmp_path: Path) -> None:
    package, empty = tmp_path / "package", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(package)
    empty.mkdir()
    # `-P` keeps the current folder out of the path. The site packages of this environment may name the
    # checkout, and come after PYTHONPATH.
    environment = {**os.environ, "PYTHONPATH": str(package), "HOME": str(empty)}
    config = package / "rebeca_ray" / "stickers" / "configs" / "generate_stickers.yaml"
    code = f"""
import rebeca_ray
assert rebeca_ray.__file__.startswith({str(package)!r}), rebeca_ray.__file__
from rebeca_ray.cli.commands import app
app(["demo", "--help"], standalone_mode=False)
app(["generate", "--config", {str(config)!r}, "--dry-run"], standalone_mode=False)
"""
    command = [sys.executable, "-P", "-c", code]
    ran = subprocess.run(
        command, cwd=empty, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert ran.returncode == 0, ran.stderr
    assert "Number of simulated users" in ran.stdout
    assert '"num_images": ' in ran.stdout
