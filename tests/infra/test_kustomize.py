"""Every overlay renders by the real kustomize, and passes the checks. A misspelt key never does."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.exceptions import ClickException
from pydantic import ValidationError

from rebeca_ray.errors import InputError
from tests.conftest import REPO
from tests.infra.kuberay import RayClusterSpec
from tests.infra.kustomize import KUBERNETES, VARIANTS, Document, copy_with, kustomize, one, rendered
from tests.infra.manifests import DOCUMENT_CHECKS, check_configs, check_together

REFUSALS = (
    AssertionError, ValidationError, jsonschema.ValidationError, ClickException, InputError,
    KeyError, ValueError, TypeError, StopIteration,
)  # fmt: skip
COPIED = "rayClusterSpec"  # equal to the spec of the RayCluster, by a test below
SPOILT = [
    ("base", kind, name)
    for kind, name in [
        ("ServiceAccount", "rebeca"),
        ("ServiceAccount", "rebeca-submitter"),
        ("ConfigMap", "rebeca-config"),
        ("NetworkPolicy", "rebeca-ray"),
        ("NetworkPolicy", "rebeca-submitter"),
        ("PodDisruptionBudget", "rebeca-head"),
        ("RayCluster", "rebeca"),
        ("CronJob", "rebeca-nightly"),
        ("RayJob", "rebeca-night"),
        ("RayCronJob", "rebeca-nightly"),
    ]
]
SPOILT += [
    ("prod", "RayCluster", "rebeca"),
    ("prod", "Namespace", "rebeca"),
    ("kueue", "RayJob", "rebeca-night"),
]
SPOILT += [
    ("prod, Triton in its pods", kind, "rebeca-triton")
    for kind in ("Deployment", "Service", "ServiceAccount", "NetworkPolicy", "PodDisruptionBudget")
]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_renders_and_passes_every_check(name: str) -> None:
    for document in rendered(name):
        for check in DOCUMENT_CHECKS:
            check(document)
    check_together(rendered(name))


def test_the_spoilt_documents_are_all_of_the_base() -> None:
    documents = {(document["kind"], document["metadata"]["name"]) for document in rendered("base")}
    assert documents == {(kind, name) for variant, kind, name in SPOILT if variant == "base"}


def keys(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every key of every mapping inside `value`."""
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        if isinstance(value, dict):
            yield (*path, key)
        if key != COPIED:
            yield from keys(child, (*path, key))


def misspell(value: Any, path: tuple[Any, ...]) -> Any:
    """Return a copy of `value` where the key at `path` has another letter."""
    spoilt = copy.deepcopy(value)
    parent = spoilt
    for key in path[:-1]:
        parent = parent[key]
    parent[f"{path[-1]}x"] = parent.pop(path[-1])
    return spoilt


def refused(document: Document, others: list[Document]) -> bool:
    """Return whether a check refuses the document, by itself or among the others."""
    try:
        for check in DOCUMENT_CHECKS:
            check(document)
        check_together([*others, document])
    except REFUSALS:
        return True
    return False


@pytest.mark.parametrize(("variant", "kind", "name"), SPOILT)
def test_no_key_can_be_misspelt(variant: str, kind: str, name: str) -> None:
    documents = rendered(variant)
    document = one(variant, kind, name)
    others = [other for other in documents if other is not document]
    assert not refused(document, others)
    paths = list(keys(document))
    assert len(paths) >= 5
    assert [path for path in paths if not refused(misspell(document, path), others)] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_key_of_a_job_config_can_be_misspelt(variant: str) -> None:
    document = one(variant, "ConfigMap")
    for file, text in document["data"].items():
        for path in keys(yaml.safe_load(text)):
            spoilt = copy.deepcopy(document)
            spoilt["data"][file] = yaml.safe_dump(misspell(yaml.safe_load(text), path))
            with pytest.raises(InputError, match=str(path[-1])):
                check_configs([*[other for other in rendered(variant) if other is not document], spoilt])


KUSTOMIZATIONS = sorted(KUBERNETES.rglob("kustomization.yaml"))


def test_no_key_of_a_kustomization_can_be_misspelt(tmp_path: Path) -> None:
    """Misspell one key of each file: the checks of kustomize are strict for all of them alike."""
    used = {"base": "base", "overlays": None, "components": "overlays/prod"}
    for number, path in enumerate(KUSTOMIZATIONS):
        relative = path.relative_to(KUBERNETES)
        folder = used[relative.parts[0]] or str(Path(*relative.parts[:2]))
        if relative.parts[1] not in VARIANTS["prod"][0] and relative.parts[0] == "components":
            folder = str(relative.parent)
        text = path.read_text()
        key = re.findall(r"^(resources|patches|replacements|components):", text, re.MULTILINE)[-1]
        copied = copy_with(tmp_path / str(number), folder, ())
        spoilt = tmp_path / str(number) / relative
        spoilt.write_text(text.replace(f"\n{key}:", f"\n{key}x:"))
        result = kustomize(copied)
        assert result.returncode != 0, relative
        assert f"{key}x" in result.stderr


def test_all_three_ways_have_the_same_cluster() -> None:
    spec = one("base", "RayCluster")["spec"]
    assert one("base", "RayJob")["spec"][COPIED] == spec
    assert one("base", "RayCronJob")["spec"]["jobTemplate"][COPIED] == spec
    nightly = one("prod, a cluster per night", "RayCronJob")["spec"]["jobTemplate"]
    assert nightly[COPIED] == one("prod", "RayCluster")["spec"]


def test_an_overlay_starts_nights_in_one_way() -> None:
    ways = {
        name: {document["kind"] for document in rendered(name)} & {"CronJob", "RayJob", "RayCronJob"}
        for name in VARIANTS
    }
    assert ways == {
        "base": {"CronJob", "RayJob", "RayCronJob"},
        "dev": {"RayJob"},
        "prod": {"CronJob"},
        "prod, a cluster per night": {"RayCronJob"},
        "prod, Triton in its pods": {"CronJob"},
        "kueue": {"RayJob"},
    }
    for name in VARIANTS:
        stands = any(document["kind"] == "RayCluster" for document in rendered(name))
        assert stands == ("CronJob" in ways[name])


def test_dev_needs_no_gpu_and_no_claim() -> None:
    text = str(rendered("dev"))
    assert "nvidia.com/gpu" not in text
    assert "persistentVolumeClaim" not in text


def test_the_workers_of_prod_are_spot_nodes_and_its_head_is_not() -> None:
    spec = one("prod", "RayCluster")["spec"]
    (workers,) = spec["workerGroupSpecs"]
    assert workers["template"]["spec"]["nodeSelector"] == {"pool": "gpu-spot"}
    assert [each["key"] for each in workers["template"]["spec"]["tolerations"]] == ["pool", "nvidia.com/gpu"]
    assert not {"nodeSelector", "tolerations"} & spec["headGroupSpec"]["template"]["spec"].keys()


def test_images_get_the_registry_of_the_overlay() -> None:
    images = set(re.findall(r"'image': '([^']+)'", str(rendered("prod"))))
    assert images == {
        "registry.example.com/rebeca-ray:0.1.0",
        "registry.example.com/rebeca-client:0.1.0",
        "registry.example.com/rebeca-triton:26.07-0.1.0",
    }


def test_a_job_in_a_queue_waits_and_takes_its_cluster_with_it() -> None:
    job = one("kueue", "RayJob")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "rebeca"
    assert (job["spec"]["suspend"], job["spec"]["shutdownAfterJobFinishes"]) == (True, True)
    assert "deletionStrategy" not in job["spec"]  # KubeRay refuses it beside shutdownAfterJobFinishes


@pytest.mark.parametrize("kind", ["RayJob", "RayCronJob"])
def test_a_failed_night_keeps_its_head_for_two_days_and_a_good_one_goes(kind: str) -> None:
    spec = one("base", kind)["spec"]
    rules = (spec["jobTemplate"] if kind == "RayCronJob" else spec)["deletionStrategy"]["deletionRules"]
    seconds = {
        (next(iter(rule["condition"].values())), rule["policy"]): rule["condition"]["ttlSeconds"]
        for rule in rules
    }
    assert seconds == {
        ("SUCCEEDED", "DeleteCluster"): 0,
        ("SUCCEEDED", "DeleteSelf"): 3600,
        ("FAILED", "DeleteWorkers"): 0,
        ("FAILED", "DeleteSelf"): 172800,
        ("Failed", "DeleteWorkers"): 0,
        ("Failed", "DeleteSelf"): 172800,
    }


def test_the_commented_options_are_options_of_kuberay() -> None:
    lines = re.findall(
        r"^  # (\w+: \{.*\})  # \w+: ", (KUBERNETES / "base" / "raycluster.yaml").read_text(), re.M
    )
    spec: Document = one("base", "RayCluster")["spec"]
    assert len(lines) == 4
    for line in lines:
        RayClusterSpec.model_validate(spec | yaml.safe_load(line))
        with pytest.raises(ValidationError):
            RayClusterSpec.model_validate(spec | yaml.safe_load(line.replace(":", "x:", 1)))


def test_the_page_names_every_component_and_overlay() -> None:
    page = (REPO / "infra" / "docs" / "cluster.md").read_text()
    for folder in ("components", "overlays"):
        for path in (KUBERNETES / folder).iterdir():
            assert f"| `{path.name}` |" in page, path
    paths = re.findall(r"infra/kubernetes/[\w/-]+", page)
    assert len(paths) == 2
    assert all((REPO / path / "kustomization.yaml").is_file() for path in paths)
