"""The manifests in `infra/`, as Kubernetes gets them, and what must hold of each."""

import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import ray
import yaml
from ray.scripts.scripts import start

from tests.conftest import REPO
from tests.kuberay import KINDS

INFRA = REPO / "infra"
KUBERNETES = "1.31"
MANIFESTS = ("raycluster.yaml", "rayjob.yaml", "raycronjob.yaml", "cronjob.yaml", "networkpolicy.yaml")
CLUSTERS = {  # where each custom resource keeps its RayCluster's spec
    "raycluster.yaml": "/spec",
    "rayjob.yaml": "/spec/rayClusterSpec",
    "raycronjob.yaml": "/spec/jobTemplate/rayClusterSpec",
}
Document = dict[str, Any]


def documents(name: str) -> list[Document]:
    """The manifest as Kubernetes gets it: as JSON, in which aliases are copies."""
    return [json.loads(json.dumps(document)) for document in yaml.safe_load_all((INFRA / name).read_text())]


def at(document: Any, pointer: str) -> Any:
    """What a JSON pointer points at."""
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        document = document[int(key)] if isinstance(document, list) else document[key]
    return document


def patched(name: str) -> Document:
    """The manifest with the Triton patch, its paths put where this kind has its cluster; add and remove are all it uses."""
    (document,) = documents(name)
    for step in documents("triton-patch.yaml")[0]:
        folder, _, key = step["path"].replace("/spec/", CLUSTERS[name] + "/", 1).rpartition("/")
        parent, key = at(document, folder), key.replace("~1", "/")
        match step["op"], parent:
            case "add", list() if key == "-":
                parent.append(step["value"])
            case "add", dict():
                parent[key] = step["value"]
            case "remove", dict():
                del parent[key]
            case _:
                raise AssertionError(f"{step['op']} {step['path']}: neither add nor remove of what is there")
    return document


ALL = {name: documents(name) for name in MANIFESTS} | {
    f"{name}, patched": [patched(name)] for name in CLUSTERS
}
RAY = {name: found[0] for name, found in ALL.items() if found[0]["apiVersion"] == "ray.io/v1"}


def walk(value: Any) -> Iterator[Document]:
    """Every mapping in it, outermost first."""
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(child)


def pod_templates(document: Document) -> list[Document]:
    return [
        found
        for found in walk(document)
        if isinstance(found.get("spec"), dict) and "containers" in found["spec"]
    ]


def containers(document: Document) -> list[Document]:
    return [
        one
        for pod in pod_templates(document)
        for one in pod["spec"].get("initContainers", []) + pod["spec"]["containers"]
    ]


def check_schema(document: Document) -> None:
    if document["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    KINDS[document["kind"]].model_validate(document)
    for template in pod_templates(document):
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "pod", **template.get("metadata", {})},
            "spec": template["spec"],
        }
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def check_auth(document: Document) -> None:
    """A token from the Secret: by KubeRay for its own pods, by a mounted file for a submitter of ours."""
    if document["apiVersion"] == "ray.io/v1":
        (cluster,) = [found for found in walk(document) if "headGroupSpec" in found]
        assert cluster.get("authOptions") == {"mode": "token", "secretName": "rebeca-ray-token"}
        return
    for pod in pod_templates(document):
        told = {one["name"]: one.get("value") for one in pod["spec"]["containers"][0]["env"]}
        assert told["RAY_AUTH_MODE"] == "token"
        (volume,) = [
            one["name"]
            for one in pod["spec"]["volumes"]
            if one.get("secret", {}).get("secretName") == "rebeca-ray-token"
        ]
        (mount,) = [one for one in pod["spec"]["containers"][0]["volumeMounts"] if one["name"] == volume]
        assert mount["readOnly"] is True
        assert told["RAY_AUTH_TOKEN_PATH"] == f"{mount['mountPath']}/auth_token"


def check_secrets(document: Document) -> None:
    assert document["kind"] != "Secret", "a Secret is made by hand, not kept in a repository"
    for container in containers(document):
        for one in container.get("env", []):
            secret = re.search(r"TOKEN$|SECRET|PASSWORD|CREDENTIAL|_KEY", one["name"])
            assert not (secret and "value" in one), f"{one['name']}: a value; take it from a Secret"


def check_images(document: Document) -> None:
    for container in containers(document):
        tag = container["image"].partition(":")[2]
        assert re.search(r"\d+\.\d+", tag), f"{container['image']}: no version; name one"


def check_pods(document: Document) -> None:
    """Nobody is root, no container without requests and limits, every mount has its volume."""
    for pod in pod_templates(document):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["runAsUser"] == 1000
        assert pod["spec"]["automountServiceAccountToken"] is False
        volumes = {one["name"] for one in pod["spec"].get("volumes", [])}
        assert len(volumes) == len(pod["spec"].get("volumes", []))
        for container in pod["spec"].get("initContainers", []) + pod["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys() & container["resources"][
                "limits"
            ].keys()
            assert {one["name"] for one in container.get("volumeMounts", [])} <= volumes


def ray_start(group: Document, *more: str) -> dict[str, Any]:
    """`ray start` with a group's rayStartParams, by Ray's own parser; KubeRay writes them on a shell's command line."""
    line = " ".join(f"--{key}={value}" for key, value in group["rayStartParams"].items())
    return start.make_context("start", [*more, *shlex.split(line)]).params


def check_ray_start(document: Document) -> None:
    (cluster,) = [found for found in walk(document) if "headGroupSpec" in found]
    head = ray_start(cluster["headGroupSpec"], "--head")
    assert (head["dashboard_host"], head["num_cpus"]) == ("0.0.0.0", 0)
    (workers,) = cluster["workerGroupSpecs"]
    assert json.loads(ray_start(workers, "--address=head:6379")["resources"]) == {"decoder_slot": 1}
    slots = [
        one["resources"]["limits"].get("nvidia.com/gpu", 0)
        for one in workers["template"]["spec"]["containers"]
    ]
    assert sum(slots) == 1
    assert cluster["rayVersion"] == ray.__version__
