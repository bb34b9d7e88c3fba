"""Triton beside each GPU worker, and in pods of its own."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from rebeca_ray.decoder.triton_server import CLOSED_APIS
from tests.conftest import REPO
from tests.infra.kustomize import Document, one
from tests.infra.manifests import DOCKERFILE, pod_templates

SIDECAR, DEPLOYMENT = ("prod", "RayCluster"), ("prod, Triton in its pods", "Deployment")


def pod_of(variant: str, kind: str) -> Document:
    return pod_templates(one(variant, kind))[-1]["spec"]


def parts(variant: str, kind: str) -> tuple[Document, Document]:
    """Return the container of the server, and the one that writes its model repository."""
    pod = pod_of(variant, kind)
    (writer,) = pod["initContainers"]
    return pod["containers"][-1], writer


@pytest.mark.parametrize("where", [SIDECAR, DEPLOYMENT], ids=["sidecar", "deployment"])
def test_the_server_is_closed_and_reads_its_models_alone(where: tuple[str, str]) -> None:
    triton, writer = parts(*where)
    assert triton["command"] == ["tritonserver"]
    assert {"--model-control-mode=none", "--http-address=127.0.0.1"} <= set(triton["args"])
    # As `rebeca serve` does, behind a key that differs from pod to pod.
    assert {"name": "POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}} in triton["env"]
    closed = f"{CLOSED_APIS}:closed=$(POD_UID)"
    assert {f"--http-restricted-api={closed}", f"--grpc-restricted-protocol={closed}"} <= set(triton["args"])
    assert triton["securityContext"]["readOnlyRootFilesystem"] is True
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in triton["volumeMounts"]}
    assert mounts == {"/repository": True, "/models": True, "/tmp": False, "/dev/shm": False}
    assert f"--model-repository={writer['args'][2]}" in triton["args"]
    assert triton["resources"]["limits"]["nvidia.com/gpu"] == 1
    (base,) = re.findall(
        r"^FROM nvcr\.io/nvidia/tritonserver:(\d\d\.\d\d)-py3 AS triton$",
        DOCKERFILE.read_text(),
        re.MULTILINE,
    )
    assert tuple(map(int, base.split("."))) >= (26, 7)
    assert {writer["image"], triton["image"]} == {f"registry.example.com/rebeca-triton:{base}-0.1.0"}


def test_the_sidecar_is_the_deployment_on_loopback() -> None:
    (beside, writer), (alone, other_writer) = parts(*SIDECAR), parts(*DEPLOYMENT)
    assert writer == other_writer
    assert [option.replace("=0.0.0.0", "=127.0.0.1") for option in alone["args"]] == beside["args"]
    assert {option for option in alone["args"] if "0.0.0.0" in option} == {
        "--grpc-address=0.0.0.0",
        "--metrics-address=0.0.0.0",
    }
    ours: Any = ("args", "ports", "readinessProbe")
    assert {key: alone[key] for key in alone if key not in ours} == {
        key: beside[key] for key in beside if key not in ours
    }


def test_ray_stays_in_the_first_container_of_a_worker() -> None:
    worker, triton = pod_of(*SIDECAR)["containers"]
    assert (worker["name"], triton["name"]) == ("ray-worker", "triton")
    assert "nvidia.com/gpu" not in worker["resources"]["limits"]


def test_only_ray_reaches_the_deployment_and_it_reaches_nothing() -> None:
    policy = one(DEPLOYMENT[0], "NetworkPolicy", "rebeca-triton")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []
    assert policy["ingress"] == [
        {
            "from": [{"podSelector": {"matchLabels": {"app": "rebeca-ray"}}}],
            "ports": [{"protocol": "TCP", "port": 8001}],
        }
    ]
    rule = one(DEPLOYMENT[0], "NetworkPolicy", "rebeca-ray")["spec"]["egress"][-1]
    assert rule == {
        "to": [{"podSelector": {"matchLabels": {"app": "rebeca-triton"}}}],
        "ports": [{"protocol": "TCP", "port": 8001}],
    }
    (port,) = one(DEPLOYMENT[0], "Service")["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (8001, "grpc")
    assert {"containerPort": 8001, "name": "grpc"} in pod_of(*DEPLOYMENT)["containers"][0]["ports"]


def test_the_init_container_writes_the_model_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, writer = parts(*SIDECAR)
    config = REPO / "jobs" / "configs" / "generate_stickers.yaml"
    assert writer["command"] == ["python3", "-c"]
    code, _, models = writer["args"]
    monkeypatch.setattr(sys, "argv", ["-c", str(config), f"{tmp_path}{models}"])
    exec(code, {})
    assert (tmp_path / "repository/models/decoder/1/model.py").is_file()
    assert 'key: "fingerprint"' in (tmp_path / "repository/models/decoder/config.pbtxt").read_text()
