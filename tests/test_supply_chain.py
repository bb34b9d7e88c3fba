"""The code that is loaded: locked packages with hashes, no pickles, no code of a model's author."""

import re
import subprocess

import pytest

from tests.conftest import REPO

LOCK = (REPO / "requirements.lock").read_text()
SOURCES = {
    str(path.relative_to(REPO)): path.read_text()
    for folder in ("rebeca_ray", "serving", "jobs", "infra")
    for path in sorted((REPO / folder).rglob("*.py"))
}


def lines_with(pattern: str) -> list[str]:
    """Return the lines of the package that match, each with its file, a call with its lines as one."""
    calls = {name: re.sub(r"([(,])\s*\n\s*", r"\1 ", text) for name, text in SOURCES.items()}
    return [
        f"{name}: {line.strip()}"
        for name, text in calls.items()
        for line in text.splitlines()
        if re.search(pattern, line)
    ]


def test_every_locked_package_has_a_version_and_hashes_and_no_address() -> None:
    entries = re.split(r"\n(?=\S)", LOCK.strip())
    assert len(entries) > 200
    for entry in entries:
        head, *hashes = (line.strip(" \\") for line in entry.splitlines())
        assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*(\[[a-z0-9,-]+\])?==[\w.+!]+( ; .+)?", head), head
        assert hashes, head
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line) for line in hashes), head
    assert "://" not in LOCK
    assert "index-url" not in LOCK


def test_torch_loads_tensors_alone() -> None:
    loads = lines_with(r"\btorch\.load\(")
    assert len(loads) >= 5
    assert [line for line in loads if "weights_only=True" not in line] == []


@pytest.mark.parametrize(
    "pattern",
    [
        r"^\s*(import|from) (pickle|dill|marshal|shelve|joblib)\b(?! import UnpicklingError)",
        r"\b(pickle|cloudpickle)\.loads?\(",
        r"allow_pickle=True",
        r"trust_remote_code",
        r"use_safetensors=False",
        r"yaml\.(unsafe_load|full_load|load_all)",
        r"\b(eval|exec)\((?!\))",
        r"shell=True",
        r"verify=False",
    ],
)
def test_nothing_runs_what_a_file_says(pattern: str) -> None:
    lines = [line for line in lines_with(pattern) if not re.search(r"\w\.eval\(", line)]
    assert lines == []


def test_models_of_a_hub_are_loaded_from_safetensors() -> None:
    """Other calls of `from_pretrained` load tokenizers and processors, which hold no weights."""
    loads = lines_with(r"(Model\w*|AutoencoderKL|SafetyChecker|kind)\.from_pretrained\(|Pipeline\.download\(")
    of_others = [line for line in loads if not line.startswith("rebeca_ray/stickers/build/")]
    assert len(of_others) >= 3
    assert [line for line in of_others if "use_safetensors=True" not in line] == []


def test_the_bill_of_materials_and_the_audit_read_the_lock_file() -> None:
    for target, tool in (("sbom", "cyclonedx-py requirements"), ("audit", "pip-audit")):
        shown = subprocess.run(
            ["make", "--dry-run", target], cwd=REPO, capture_output=True, text=True, check=True
        )
        line = next(line for line in shown.stdout.splitlines() if tool in line)
        assert "requirements.lock" in line
