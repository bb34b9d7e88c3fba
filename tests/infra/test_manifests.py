"""Every check of the manifests refuses a mistake, and the network admits nobody else."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.infra.kustomize import Document, one, rendered
from tests.infra.manifests import (
    THEIR_SUBMITTERS,
    at,
    check_auth,
    check_configs,
    check_images,
    check_labels,
    check_pods,
    check_ray_start,
    check_rights,
    check_schema,
    check_secrets,
    check_selectors,
    check_together,
    pod_templates,
)
from tests.infra.test_kustomize import REFUSALS

HEAD, WORKER = "/spec/headGroupSpec", "/spec/workerGroupSpecs/0"
CONTAINER = "/template/spec/containers/0"
POD = "/spec/jobTemplate/spec/template/spec"
CLUSTER_IN_JOB = "/spec/rayClusterSpec"
FIRST_RULE = "/spec/deletionStrategy/deletionRules/0"
MISTAKES: list[tuple[Callable[[Document], None], str, str, Any]] = [
    (check_schema, "RayCluster", f"{HEAD}/serviceTypes", "ClusterIP"),
    (check_schema, "RayCluster", f"{WORKER}/replicas", "2"),
    (check_schema, "RayCluster", f"{WORKER}{CONTAINER}/volumeMount", []),
    (check_schema, "RayCluster", f"{WORKER}{CONTAINER}/resources/limit", {}),
    (check_schema, "RayCluster", "/spec/networkPolicy", {"mode": "DenyEverything"}),
    (check_schema, "RayCluster", "/metadata/name", "rebeca_night"),
    (check_schema, "RayJob", "/spec/backoffLimits", 2),
    (check_schema, "RayJob", "/spec/submissionMode", "K8SJobMode"),
    (check_schema, "RayJob", "/spec/submitterPodTemplate/spec/restartpolicy", "Never"),
    (check_schema, "RayJob", "/spec/shutdownAfterJobFinishes", True),
    (check_schema, "RayJob", "/spec/ttlSecondsAfterFinished", 60),
    (check_schema, "RayJob", "/spec/suspend", True),
    (check_schema, "RayJob", f"{FIRST_RULE}/policy", "DeleteHead"),
    (check_schema, "RayJob", f"{FIRST_RULE}/policy", "DeleteSelf"),  # twice for one status
    (check_schema, "RayJob", f"{FIRST_RULE}/condition/ttlSeconds", 7200),  # after the job itself
    (check_schema, "RayJob", f"{FIRST_RULE}/condition/jobStatus", "STOPPED"),
    (check_schema, "RayJob", f"{FIRST_RULE}/condition/jobDeploymentStatus", "Failed"),
    (check_schema, "RayCronJob", "/spec/concurrencyPolicy", "Forbid"),
    (check_schema, "RayCronJob", "/spec/jobTemplate/spec", {}),
    (check_schema, "CronJob", "/spec/timezone", "Etc/UTC"),
    (check_schema, "CronJob", f"{POD}/containers/0/env/0/values", "x"),
    (check_schema, "NetworkPolicy", "/spec/ingres", []),
    (check_schema, "PodDisruptionBudget", "/spec/minAvailable", []),
    (check_labels, "RayJob", "/metadata/labels/kueue.x-k8s.io~1queue-name", "rebeca"),
    (check_auth, "RayCluster", "/spec/authOptions", {"mode": "disabled"}),
    (check_auth, "RayJob", f"{CLUSTER_IN_JOB}/authOptions", None),
    (check_auth, "RayCronJob", "/spec/jobTemplate/rayClusterSpec/authOptions/secretName", "other"),
    (check_auth, "CronJob", f"{POD}/volumes/0/secret/secretName", "other"),
    (check_auth, "CronJob", f"{POD}/containers/0/volumeMounts/0/mountPath", "/elsewhere"),
    (check_secrets, "CronJob", f"{POD}/containers/0/env/0", {"name": "RAY_AUTH_TOKEN", "value": "abc"}),
    (
        check_secrets,
        "RayCluster",
        f"{HEAD}{CONTAINER}/env/0",
        {"name": "AWS_SECRET_ACCESS_KEY", "value": "abc"},
    ),
    (check_secrets, "NetworkPolicy", "/kind", "Secret"),
    (check_rights, "NetworkPolicy", "/kind", "RoleBinding"),
    (check_rights, "ServiceAccount", "/automountServiceAccountToken", True),
    (check_rights, "RayCluster", f"{HEAD}/template/spec/automountServiceAccountToken", True),
    (check_rights, "RayCluster", f"{HEAD}/template/spec/serviceAccountName", "default"),
    (check_images, "RayCluster", f"{HEAD}{CONTAINER}/image", "rebeca-ray:latest"),
    (check_images, "RayJob", "/spec/submitterPodTemplate/spec/containers/0/image", "rebeca-client"),
    (
        check_images,
        "RayJob",
        "/spec/submitterPodTemplate/spec/containers/0/image",
        "host:50.00/rebeca-client",
    ),
    (check_pods, "RayCluster", f"{WORKER}/template/spec/securityContext/runAsUser", 0),
    (check_pods, "CronJob", f"{POD}/containers/0/resources/limits", {"cpu": "1"}),
    (check_pods, "CronJob", f"{POD}/containers/0/volumeMounts/0/name", "tokens"),
    (check_ray_start, "RayCluster", f"{WORKER}/rayStartParams/resources", '{"decoder_slot": 1}'),
    (check_ray_start, "RayCluster", f"{HEAD}/rayStartParams/dashboard-hosts", "0.0.0.0"),
    (check_ray_start, "RayCluster", "/spec/rayVersion", "2.59.0"),
    (check_ray_start, "RayCluster", f"{WORKER}{CONTAINER}/resources/limits/nvidia.com~1gpu", 1),  # no pool
]
TOGETHER: list[tuple[str, str, str, str, Any]] = [
    ("base", "RayCluster", "", f"{HEAD}/template/spec/volumes/0/configMap/name", "other"),
    ("base", "RayCluster", "", f"{HEAD}/template/spec/volumes/1/persistentVolumeClaim/claimName", "other"),
    ("base", "RayCluster", "", f"{HEAD}/template/spec/serviceAccountName", "rebeca-other"),
    ("base", "RayCluster", "", f"{HEAD}/template/metadata/labels/app", "other"),
    ("base", "PodDisruptionBudget", "", "/spec/selector/matchLabels/ray.io~1node-type", "master"),
    ("base", "NetworkPolicy", "rebeca-submitter", "/spec/podSelector/matchLabels/app", "rebeca-ray"),
    ("prod", "RayCluster", "", "/metadata/namespace", "default"),
    ("prod, Triton in its pods", "Service", "", "/metadata/name", "triton"),
]


def put(document: Document, pointer: str, value: Any) -> None:
    folder, _, key = pointer.rpartition("/")
    parent, key = at(document, folder), key.replace("~1", "/")
    parent[int(key) if isinstance(parent, list) else key] = value


@pytest.mark.parametrize(
    ("check", "kind", "pointer", "value"), MISTAKES, ids=lambda value: getattr(value, "__name__", None)
)
def test_every_check_catches_a_mistake(
    check: Callable[[Document], None], kind: str, pointer: str, value: Any
) -> None:
    document = copy.deepcopy(next(each for each in rendered("base") if each["kind"] == kind))
    check(document)
    put(document, pointer, value)
    with pytest.raises(REFUSALS):
        check(document)


@pytest.mark.parametrize(("variant", "kind", "name", "pointer", "value"), TOGETHER)
def test_documents_that_do_not_fit_are_refused(
    variant: str, kind: str, name: str, pointer: str, value: Any
) -> None:
    documents = copy.deepcopy(rendered(variant))
    check_together(documents)
    (document,) = [
        each for each in documents if each["kind"] == kind and name in ("", each["metadata"]["name"])
    ]
    put(document, pointer, value)
    with pytest.raises(AssertionError):
        check_together(documents)


def test_a_decoder_that_looks_for_no_server_is_refused() -> None:
    documents = copy.deepcopy(rendered("prod"))
    (config,) = [each for each in documents if each["kind"] == "ConfigMap"]
    config["data"]["generate.yaml"] = config["data"]["generate.yaml"].replace("127.0.0.1", "rebeca-triton")
    with pytest.raises(AssertionError):
        check_configs(documents)


def test_a_selector_of_no_pod_is_refused() -> None:
    check_selectors([{"podSelector": {"matchLabels": {"app": "a"}}}], [{"app": "a"}])
    with pytest.raises(AssertionError):
        check_selectors([{"podSelector": {"matchLabels": {"app": "b"}}}], [{"app": "a"}])


def test_the_submitter_reaches_the_service_of_the_head() -> None:
    """KubeRay derives the name of the head's service from the cluster's name."""
    submitter = at(one("base", "CronJob"), f"{POD}/containers/0")
    variables = {variable["name"]: variable.get("value") for variable in submitter["env"]}
    cluster = one("base", "RayCluster")["metadata"]["name"]
    assert variables["RAY_API_SERVER_ADDRESS"] == f"http://{cluster}-head-svc:8265"


def test_network_policies_select_our_pods_and_admit_no_others() -> None:
    cluster, submitter = (one("base", "NetworkPolicy", name) for name in ("rebeca-ray", "rebeca-submitter"))
    selected = [policy["spec"]["podSelector"]["matchLabels"] for policy in (cluster, submitter)]
    assert selected == [{"app": "rebeca-ray"}, {"app": "rebeca-submitter"}]
    for pod in (template for document in rendered("base") for template in pod_templates(document)):
        is_ray = pod["spec"]["containers"][0]["name"].startswith("ray-")
        assert pod["metadata"]["labels"] == selected[0 if is_ray else 1]
    between_ray_pods, dashboard = cluster["spec"]["ingress"]
    assert between_ray_pods == {"from": [{"podSelector": {"matchLabels": {"app": "rebeca-ray"}}}]}
    assert [rule["port"] for rule in dashboard["ports"]] == [8265]
    assert dashboard["from"][0] == {"podSelector": {"matchLabels": {"app": "rebeca-submitter"}}}
    assert dashboard["from"][1] == {"podSelector": {"matchLabels": THEIR_SUBMITTERS}}
    assert len(dashboard["from"]) == 3
    assert submitter["spec"]["ingress"] == []
    for policy in (cluster, submitter):
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        assert all(
            "to" in rule or rule["ports"] == [{"protocol": "TCP", "port": 443}]
            for rule in policy["spec"]["egress"]
        )
