"""Load the manifests in `infra/` as Kubernetes gets them, and check the rules for each of them."""

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
DOCKERFILE = INFRA / "ray.Dockerfile"
KUBERNETES = "1.31"
MANIFESTS = ("raycluster.yaml", "rayjob.yaml", "raycronjob.yaml", "cronjob.yaml", "networkpolicy.yaml")
CLUSTERS = {  # the JSON pointer to the RayCluster spec inside each custom resource
    "raycluster.yaml": "/spec",
    "rayjob.yaml": "/spec/rayClusterSpec",
    "raycronjob.yaml": "/spec/jobTemplate/rayClusterSpec",
}
Document = dict[str, Any]


def documents(name: str) -> list[Document]:
    """Return the documents of a manifest as Kubernetes gets them: JSON, with YAML aliases copied."""
    return [json.loads(json.dumps(document)) for document in yaml.safe_load_all((INFRA / name).read_text())]


def at(document: Any, pointer: str) -> Any:
    """Return the value at a JSON pointer."""
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        document = document[int(key)] if isinstance(document, list) else document[key]
    return document


def patched(name: str) -> Document:
    """Return the manifest with the Triton patch applied to its cluster. The patch only adds and removes."""
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
                raise AssertionError(
                    f"{step['op']} {step['path']}: expected add, or remove of an existing key"
                )
    return document


ALL = {name: documents(name) for name in MANIFESTS} | {
    f"{name}, patched": [patched(name)] for name in CLUSTERS
}
RAY = {name: manifest[0] for name, manifest in ALL.items() if manifest[0]["apiVersion"] == "ray.io/v1"}


def walk(value: Any) -> Iterator[Document]:
    """Yield every mapping inside `value`, the outermost first."""
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(child)


def pod_templates(document: Document) -> list[Document]:
    return [
        mapping
        for mapping in walk(document)
        if isinstance(mapping.get("spec"), dict) and "containers" in mapping["spec"]
    ]


def containers(document: Document) -> list[Document]:
    return [
        container
        for pod in pod_templates(document)
        for container in pod["spec"].get("initContainers", []) + pod["spec"]["containers"]
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
    """Require the token of the Secret. KubeRay adds it to its pods, and our submitter mounts it as a file."""
    if document["apiVersion"] == "ray.io/v1":
        (cluster,) = [mapping for mapping in walk(document) if "headGroupSpec" in mapping]
        assert cluster.get("authOptions") == {"mode": "token", "secretName": "rebeca-ray-token"}
        return
    for pod in pod_templates(document):
        variables = {entry["name"]: entry.get("value") for entry in pod["spec"]["containers"][0]["env"]}
        assert variables["RAY_AUTH_MODE"] == "token"
        (volume,) = [
            candidate["name"]
            for candidate in pod["spec"]["volumes"]
            if candidate.get("secret", {}).get("secretName") == "rebeca-ray-token"
        ]
        mounts = pod["spec"]["containers"][0]["volumeMounts"]
        (mount,) = [candidate for candidate in mounts if candidate["name"] == volume]
        assert mount["readOnly"] is True
        assert variables["RAY_AUTH_TOKEN_PATH"] == f"{mount['mountPath']}/auth_token"


def check_secrets(document: Document) -> None:
    assert document["kind"] != "Secret", "create the Secret by hand; a repository must not hold it"
    for container in containers(document):
        for variable in container.get("env", []):
            secret = re.search(r"TOKEN$|SECRET|PASSWORD|CREDENTIAL|_KEY", variable["name"])
            assert not (secret and "value" in variable), f"{variable['name']}: a value; take it from a Secret"


def check_images(document: Document) -> None:
    for container in containers(document):
        tag = container["image"].partition(":")[2]
        assert re.search(r"\d+\.\d+", tag), f"{container['image']}: no version; name one"


def check_pods(document: Document) -> None:
    """Require that no pod runs as root, that containers have requests and limits, and mounts a volume."""
    for pod in pod_templates(document):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["runAsUser"] == 1000
        assert pod["spec"]["automountServiceAccountToken"] is False
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        assert len(volumes) == len(pod["spec"].get("volumes", []))
        for container in pod["spec"].get("initContainers", []) + pod["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys() & container["resources"][
                "limits"
            ].keys()
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes


def ray_start(group: Document, *more: str) -> dict[str, Any]:
    """Parse a group's rayStartParams with the parser of `ray start`, from a shell command as KubeRay's."""
    line = " ".join(f"--{key}={value}" for key, value in group["rayStartParams"].items())
    return start.make_context("start", [*more, *shlex.split(line)]).params


def check_ray_start(document: Document) -> None:
    (cluster,) = [mapping for mapping in walk(document) if "headGroupSpec" in mapping]
    head = ray_start(cluster["headGroupSpec"], "--head")
    assert (head["dashboard_host"], head["num_cpus"]) == ("0.0.0.0", 0)
    (workers,) = cluster["workerGroupSpecs"]
    assert json.loads(ray_start(workers, "--address=head:6379")["resources"]) == {"decoder_slot": 1}
    gpus = [
        container["resources"]["limits"].get("nvidia.com/gpu", 0)
        for container in workers["template"]["spec"]["containers"]
    ]
    assert sum(gpus) == 1  # one decoder slot per GPU
    assert cluster["rayVersion"] == ray.__version__
