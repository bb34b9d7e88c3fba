"""Check rendered manifests: each by itself, and all of a variant together.

`DOCUMENT_CHECKS` and `check_together` raise for every key that is misspelt.
"""

import json
import re
import shlex
import tempfile
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import ray
from jsonschema import Draft202012Validator
from kubernetes_validate.utils import schema_contents
from ray.dashboard.modules.job.cli import submit
from ray.scripts.scripts import start
from referencing import Registry, Resource

from rebeca_ray.config.jobs import NightlyConfig
from rebeca_ray.config.load import load_config
from tests.conftest import REPO
from tests.infra.kuberay import KINDS
from tests.infra.kustomize import Document

INFRA = REPO / "infra"
DOCKERFILE = INFRA / "ray.Dockerfile"
SCHEMAS = "1.31"  # of Kubernetes
PART_OF = {"app.kubernetes.io/part-of": "rebeca"}
QUEUE = {"kueue.x-k8s.io/queue-name": "rebeca"}
HEAD_LABEL = {"ray.io/node-type": "head"}  # KubeRay adds it
THEIR_SUBMITTERS = {"rebeca-submits": "true"}  # pods of an orchestrator, which no manifest here makes
OTHER_NAMESPACES = ("kube-system", "ray-system")
RESOURCES = {"cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"}
CONFIGS = "/etc/rebeca"


def at(document: Any, pointer: str) -> Any:
    """Return the value at a JSON pointer."""
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        document = document[int(key)] if isinstance(document, list) else document[key]
    return document


def walk(value: Any) -> Iterator[Document]:
    """Yield every mapping inside `value`, the outermost first."""
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(child)


def pod_templates(document: Document) -> list[Document]:
    keys = ("template", "submitterPodTemplate")
    return [mapping[key] for mapping in walk(document) for key in keys if key in mapping]


def containers_of(pod: Document) -> list[Document]:
    return pod["spec"].get("initContainers", []) + pod["spec"]["containers"]


def containers(document: Document) -> list[Document]:
    return [container for pod in pod_templates(document) for container in containers_of(pod)]


def cluster_of(document: Document) -> Document:
    """Return the spec of the cluster in a resource of KubeRay."""
    (cluster,) = [mapping for mapping in walk(document) if "headGroupSpec" in mapping]
    return cluster


@cache
def schema_of(name: str) -> Any:
    return schema_contents(f"kubernetes-json-schema/v{SCHEMAS}.0-local-strict/{name}.json", SCHEMAS)


@cache
def validator_of(kind: str, api_version: str) -> Draft202012Validator:
    """Return the validator that `kubernetes_validate` makes again, some 20 ms, for each document."""
    group, _, version = api_version.rpartition("/")
    schema = schema_of("-".join([kind.lower(), *([group.split(".")[0]] if group else []), version]))
    resources = [Resource.from_contents(each) for each in (schema, schema_of("_definitions"))]
    return Draft202012Validator(schema, registry=resources @ Registry())


@lru_cache(maxsize=64)
def validate(text: str) -> None:
    """Raise jsonschema's ValidationError unless Kubernetes' strict schema takes the document."""
    document = json.loads(text)
    for error in validator_of(document["kind"], document["apiVersion"]).iter_errors(document):
        raise error


def check_schema(document: Document) -> None:
    if document["apiVersion"] != "ray.io/v1":
        validate(json.dumps(document))
        return
    KINDS[document["kind"]].model_validate(document)
    for template in pod_templates(document):
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "pod", **template.get("metadata", {})},
            "spec": template["spec"],
        }
        validate(json.dumps(pod))


def check_labels(document: Document) -> None:
    """Require the labels we know: Kubernetes takes any."""
    metadata = document["metadata"]
    if document["kind"] == "Namespace":
        assert metadata["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
        return
    queue = QUEUE if document["kind"] == "RayJob" and is_queued(document) else {}
    assert metadata["labels"] == PART_OF | queue
    assert "annotations" not in metadata


def is_queued(job: Document) -> bool:
    """Return whether a RayJob waits for Kueue, which asks for a cluster that goes with the job."""
    return job["spec"].get("suspend", False)


def check_auth(document: Document) -> None:
    """Require the token of the Secret. KubeRay adds it to its pods, and our submitter mounts it as a file."""
    if document["apiVersion"] == "ray.io/v1":
        assert cluster_of(document).get("authOptions") == {"mode": "token", "secretName": "rebeca-ray-token"}
    if document["kind"] != "CronJob":
        return
    (pod,) = pod_templates(document)
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


def check_rights(document: Document) -> None:
    """Require that nothing has a right in the API of Kubernetes, and that no token of it is mounted."""
    assert document["kind"] not in ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
    if document["kind"] == "ServiceAccount":
        assert document["automountServiceAccountToken"] is False
    for pod in pod_templates(document):
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["serviceAccountName"].startswith("rebeca")


def check_images(document: Document) -> None:
    for container in containers(document):
        tag = container["image"].rpartition("/")[2].partition(":")[2]
        assert re.search(r"\d+\.\d+", tag), f"{container['image']}: no version; name one"


def check_pods(document: Document) -> None:
    """Require Kubernetes' restricted standard for pods, requests and limits, and volumes that exist."""
    for pod in pod_templates(document):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec.get("nodeSelector", {"pool": "gpu-spot"}) == {"pool": "gpu-spot"}
        volumes = [volume["name"] for volume in spec.get("volumes", [])]
        assert len(volumes) == len(set(volumes))
        for container in containers_of(pod):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            requests, limits = (container["resources"][part].keys() for part in ("requests", "limits"))
            assert {"cpu", "memory"} <= requests & limits
            assert requests | limits <= RESOURCES
            assert requests - {"nvidia.com/gpu"} == limits - {"nvidia.com/gpu"}
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= set(volumes)


def ray_start(group: Document, *more: str) -> dict[str, Any]:
    """Parse a group's rayStartParams with the parser of `ray start`, from a shell command as KubeRay's."""
    line = " ".join(f"--{key}={value}" for key, value in group["rayStartParams"].items())
    return start.make_context("start", [*more, *shlex.split(line)]).params


def check_ray_start(document: Document) -> None:
    if document["apiVersion"] != "ray.io/v1":
        return
    cluster = cluster_of(document)
    head = ray_start(cluster["headGroupSpec"], "--head")
    assert (head["dashboard_host"], head["num_cpus"]) == ("0.0.0.0", 0)
    assert cluster["rayVersion"] == ray.__version__
    (workers,) = cluster["workerGroupSpecs"]
    slots = json.loads(ray_start(workers, "--address=head:6379")["resources"]).get("decoder_slot", 0)
    by_name = {each["name"]: each for each in workers["template"]["spec"]["containers"]}
    gpus = {name: each["resources"]["limits"].get("nvidia.com/gpu", 0) for name, each in by_name.items()}
    if "triton" in by_name:  # one slot per server, and the server has the GPU
        assert (slots, gpus) == (1, {"ray-worker": 0, "triton": 1})
    else:
        assert by_name.keys() == {"ray-worker"}
        assert slots == 0 or gpus["ray-worker"] == 0
    has_pool = "nodeSelector" in workers["template"]["spec"]
    assert has_pool == bool(sum(gpus.values()))


def copies() -> dict[str, str]:
    """Return the folders that the image of head and workers copies from the checkout, by destination."""
    stage = DOCKERFILE.read_text().split(" AS ray\n")[1]
    (folder,) = re.findall(r"^WORKDIR (\S+)$", stage, re.MULTILINE)
    return {f"{folder}/{to}": source for source, to in re.findall(r"^COPY (\w+) (\w+)$", stage, re.MULTILINE)}


def check_entrypoint(words: list[str]) -> None:
    """Require that Ray's parser keeps the command, and that the image holds its job."""
    parsed = submit.make_context("submit", ["--submission-id", "night", "--", *words])
    assert parsed.params["entrypoint"] == tuple(words)
    python, path, option, config, *overrides = words
    folder = next(to for to in copies() if path.startswith(to + "/"))
    assert (python, option, config) == ("python", "--config", f"{CONFIGS}/nightly.yaml")
    assert path == f"{folder}/nightly.py"
    assert all(re.fullmatch(r"run_date=\d{4}-\d\d-\d\d", override) for override in overrides)


def entrypoints(document: Document) -> list[list[str]]:
    return [shlex.split(mapping["entrypoint"]) for mapping in walk(document) if "entrypoint" in mapping]


def check_entrypoints(document: Document) -> None:
    for words in entrypoints(document):
        check_entrypoint(words)


DOCUMENT_CHECKS = (
    check_schema, check_labels, check_auth, check_secrets, check_rights, check_images, check_pods,
    check_ray_start, check_entrypoints,
)  # fmt: skip


def check_together(documents: list[Document]) -> None:
    """Require that the documents of a variant name one another, and nothing that nobody makes."""
    pods = [pod for document in documents for pod in pod_templates(document)]
    for pod in pods:
        (label,) = pod["metadata"]["labels"].items()
        policies = [
            document["metadata"]["name"]
            for document in documents
            if document["kind"] == "NetworkPolicy" and selects(document["spec"]["podSelector"], dict([label]))
        ]
        assert len(policies) == 1, f"{label}: selected by {policies}"
    check_selectors(documents, [dict(pod["metadata"]["labels"]) for pod in pods])
    made = {(document["kind"], document["metadata"]["name"]) for document in documents}
    made |= {("Secret", "rebeca-ray-token"), ("PersistentVolumeClaim", "rebeca-models")}  # by people
    for pod in pods:
        assert ("ServiceAccount", pod["spec"]["serviceAccountName"]) in made
        for volume in pod["spec"].get("volumes", []):
            match volume:
                case {"configMap": {"name": name}}:
                    assert ("ConfigMap", name) in made
                case {"secret": {"secretName": name}}:
                    assert ("Secret", name) in made
                case {"persistentVolumeClaim": {"claimName": name}}:
                    assert ("PersistentVolumeClaim", name) in made
    namespaces = {document["metadata"].get("namespace") for document in documents} - {None}
    assert namespaces <= {name for kind, name in made if kind == "Namespace"}
    check_configs(documents)


def selects(selector: Document, labels: dict[str, str]) -> bool:
    assert selector.keys() == {"matchLabels"}
    return selector["matchLabels"].items() <= labels.items()


def check_selectors(documents: list[Document], pods: list[dict[str, str]]) -> None:
    """Require that every selector matches a pod. Kubernetes also takes one that matches none."""
    candidates = [*pods, *[labels | HEAD_LABEL for labels in pods], THEIR_SUBMITTERS]
    for mapping in walk(documents):
        if "namespaceSelector" in mapping:
            ((label, name),) = mapping["namespaceSelector"]["matchLabels"].items()
            assert (label, name in OTHER_NAMESPACES) == ("kubernetes.io/metadata.name", True)
            pod = mapping.get("podSelector", {}).get("matchLabels", {})
            assert pod in ({}, {"app.kubernetes.io/component": "kuberay-operator"})
            continue
        for key in ("podSelector", "selector"):
            if key not in mapping:
                continue
            selector = mapping[key] if "matchLabels" in mapping[key] else {"matchLabels": mapping[key]}
            assert any(selects(selector, labels) for labels in candidates), selector


def check_configs(documents: list[Document]) -> None:
    """Require a config of a night that our models take, and a Triton where its decoder looks for one."""
    (files,) = [document["data"] for document in documents if document["kind"] == "ConfigMap"]
    assert files.keys() == {"nightly.yaml", "embed.yaml", "train.yaml", "generate.yaml"}
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text)
        dates = [words[4:] for document in documents for words in entrypoints(document)] or [[]]
        for overrides in dates:
            config = load_config(NightlyConfig, Path(folder) / "nightly.yaml", overrides)
    decoder = config.generate.decoder
    services = {document["metadata"]["name"] for document in documents if document["kind"] == "Service"}
    sidecars = {each["name"] for document in documents for each in containers(document)} & {"triton"}
    if decoder.backend == "triton":
        assert decoder.triton.url in ({f"{name}:8001" for name in services} or {"127.0.0.1:8001"})
    assert bool(sidecars) == (decoder.backend == "triton")
    resources = [each["resources"] for document in documents for each in containers(document)]
    has_gpu = any("nvidia.com/gpu" in each["limits"] for each in resources)
    assert has_gpu == (decoder.device == "cuda"), "a GPU that is rented draws, and no other"
