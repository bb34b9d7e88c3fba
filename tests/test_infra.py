"""The manifests and the Dockerfile pass the schemas, option parsers and linters of their readers.

Every check is also tested with a mistake that it must catch.
"""

import copy
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import kubernetes_validate
import pytest
from click.exceptions import ClickException
from pydantic import ValidationError
from ray.dashboard.modules.job.cli import logs, status, submit

from rebeca_ray.decoder.triton_server import CLOSED_APIS
from tests.conftest import REPO
from tests.manifests import (
    ALL,
    CLUSTERS,
    DOCKERFILE,
    RAY,
    Document,
    at,
    check_auth,
    check_images,
    check_pods,
    check_ray_start,
    check_schema,
    check_secrets,
    patched,
    pod_templates,
    walk,
)

SUBMITTER = at(ALL["cronjob.yaml"][0], "/spec/jobTemplate/spec/template/spec/containers/0")
CHECKS = (check_schema, check_auth, check_secrets, check_images, check_pods)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("check", CHECKS)
def test_every_manifest_passes_every_check(name: str, check: Callable[[Document], None]) -> None:
    for document in ALL[name]:
        check(document)


@pytest.mark.parametrize("name", RAY)
def test_ray_accepts_the_start_parameters(name: str) -> None:
    check_ray_start(RAY[name])


HEAD, WORKER = "/spec/headGroupSpec", "/spec/workerGroupSpecs/0"
POD = "/spec/jobTemplate/spec/template/spec"
MISTAKES: list[tuple[Callable[[Document], None], str, str, Any]] = [
    (check_schema, "raycluster.yaml", f"{HEAD}/serviceTypes", "ClusterIP"),
    (check_schema, "raycluster.yaml", f"{WORKER}/replicas", "2"),
    (check_schema, "raycluster.yaml", f"{WORKER}/template/spec/containers/0/volumeMount", []),
    (check_schema, "raycluster.yaml", f"{WORKER}/template/spec/containers/0/resources/limit", {}),
    (check_schema, "rayjob.yaml", "/spec/backoffLimits", 2),
    (check_schema, "rayjob.yaml", "/spec/submissionMode", "K8SJobMode"),
    (check_schema, "rayjob.yaml", "/spec/submitterPodTemplate/spec/restartpolicy", "Never"),
    (check_schema, "raycronjob.yaml", "/spec/concurrencyPolicy", "Forbid"),
    (check_schema, "raycronjob.yaml", "/spec/jobTemplate/spec", {}),
    (check_schema, "cronjob.yaml", "/spec/timezone", "Etc/UTC"),
    (check_schema, "cronjob.yaml", f"{POD}/containers/0/env/0/values", "x"),
    (check_schema, "networkpolicy.yaml", "/spec/ingres", []),
    (check_auth, "raycluster.yaml", "/spec/authOptions", {"mode": "disabled"}),
    (check_auth, "rayjob.yaml", "/spec/rayClusterSpec/authOptions", None),
    (check_auth, "raycronjob.yaml", "/spec/jobTemplate/rayClusterSpec/authOptions/secretName", "other"),
    (check_auth, "cronjob.yaml", f"{POD}/volumes/0/secret/secretName", "other"),
    (check_auth, "cronjob.yaml", f"{POD}/containers/0/volumeMounts/0/mountPath", "/elsewhere"),
    (check_secrets, "cronjob.yaml", f"{POD}/containers/0/env/0", {"name": "RAY_AUTH_TOKEN", "value": "abc"}),
    (
        check_secrets,
        "raycluster.yaml",
        f"{HEAD}/template/spec/containers/0/env/0",
        {"name": "AWS_SECRET_ACCESS_KEY", "value": "abc"},
    ),
    (check_secrets, "networkpolicy.yaml", "/kind", "Secret"),
    (check_images, "raycluster.yaml", f"{HEAD}/template/spec/containers/0/image", "rebeca-ray:latest"),
    (check_images, "rayjob.yaml", "/spec/submitterPodTemplate/spec/containers/0/image", "rebeca-client"),
    (check_pods, "raycluster.yaml", f"{WORKER}/template/spec/securityContext/runAsUser", 0),
    (check_pods, "cronjob.yaml", f"{POD}/containers/0/resources/limits", {"cpu": "1"}),
    (check_pods, "cronjob.yaml", f"{POD}/containers/0/volumeMounts/0/name", "tokens"),
    (check_ray_start, "raycluster.yaml", f"{WORKER}/rayStartParams/resources", '{"decoder_slot": 1}'),
    (check_ray_start, "raycluster.yaml", f"{HEAD}/rayStartParams/dashboard-hosts", "0.0.0.0"),
    (check_ray_start, "raycluster.yaml", "/spec/rayVersion", "2.59.0"),
]


@pytest.mark.parametrize(
    ("check", "name", "pointer", "value"), MISTAKES, ids=lambda value: getattr(value, "__name__", None)
)
def test_every_check_catches_a_mistake(
    check: Callable[[Document], None], name: str, pointer: str, value: Any
) -> None:
    document = copy.deepcopy(ALL[name][0])
    folder, _, key = pointer.rpartition("/")
    parent = at(document, folder)
    parent[int(key) if isinstance(parent, list) else key] = value
    with pytest.raises(
        (AssertionError, ValidationError, kubernetes_validate.ValidationError, ClickException, ValueError)
    ):
        check(document)


def test_all_three_manifests_have_the_same_cluster() -> None:
    assert at(ALL["rayjob.yaml"][0], CLUSTERS["rayjob.yaml"]) == ALL["raycluster.yaml"][0]["spec"]
    assert at(ALL["raycronjob.yaml"][0], CLUSTERS["raycronjob.yaml"]) == ALL["raycluster.yaml"][0]["spec"]


def test_manifests_refer_to_the_same_objects() -> None:
    named: dict[str, set[str]] = {
        "secretName": set(),
        "configMap": set(),
        "serviceAccountName": set(),
        "claimName": set(),
    }
    for mapping in walk([document for manifest in ALL.values() for document in manifest]):
        for key in named.keys() & mapping.keys():
            named[key].add(mapping[key]["name"] if key == "configMap" else mapping[key])
    assert named == {
        "secretName": {"rebeca-ray-token"},
        "configMap": {"rebeca-config"},
        "serviceAccountName": {"rebeca"},
        "claimName": {"rebeca-models"},
    }
    variables = {variable["name"]: variable.get("value") for variable in SUBMITTER["env"]}
    # KubeRay derives the name of the head's service from the cluster's name.
    cluster = ALL["raycluster.yaml"][0]["metadata"]["name"]
    assert variables["RAY_API_SERVER_ADDRESS"] == f"http://{cluster}-head-svc:8265"


def test_network_policies_select_our_pods_and_admit_no_others() -> None:
    cluster, submitter = ALL["networkpolicy.yaml"]
    selected = [policy["spec"]["podSelector"]["matchLabels"] for policy in (cluster, submitter)]
    assert selected == [{"app": "rebeca-ray"}, {"app": "rebeca-submitter"}]
    for name, manifest in ALL.items():
        for pod in (template for document in manifest for template in pod_templates(document)):
            is_ray = pod["spec"]["containers"][0]["name"].startswith("ray-")
            assert pod["metadata"]["labels"] == selected[0 if is_ray else 1], name
    between_ray_pods, dashboard = cluster["spec"]["ingress"]
    assert between_ray_pods == {"from": [{"podSelector": {"matchLabels": {"app": "rebeca-ray"}}}]}
    assert [rule["port"] for rule in dashboard["ports"]] == [8265]
    assert dashboard["from"][0] == {"podSelector": {"matchLabels": {"app": "rebeca-submitter"}}}
    assert len(dashboard["from"]) == 2
    assert submitter["spec"]["ingress"] == []
    for policy in (cluster, submitter):
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        assert all(
            "to" in rule or rule["ports"] == [{"protocol": "TCP", "port": 443}]
            for rule in policy["spec"]["egress"]
        )


def copies() -> dict[str, str]:
    """Return the folders that the image of head and workers copies from the checkout, by destination."""
    stage = DOCKERFILE.read_text().split(" AS ray\n")[1]
    (folder,) = re.findall(r"^WORKDIR (\S+)$", stage, re.MULTILINE)
    return {f"{folder}/{to}": source for source, to in re.findall(r"^COPY (\w+) (\w+)$", stage, re.MULTILINE)}


def check_entrypoint(words: list[str]) -> None:
    """Require that Ray's parser keeps the command, and that the image and the ConfigMap hold its files."""
    parsed = submit.make_context("submit", ["--submission-id", "night", "--", *words])
    assert parsed.params["entrypoint"] == tuple(words)
    python, path, option, config, *overrides = words
    folder = next(to for to in copies() if path.startswith(to + "/"))
    assert (python, option, config) == ("python", "--config", "/etc/rebeca/nightly.yaml")
    assert path == f"{folder}/nightly.py"
    assert all(re.fullmatch(r"run_date=\d{4}-\d\d-\d\d", override) for override in overrides)


def test_entrypoints_are_jobs_in_the_image() -> None:
    assert copies() == {"/opt/rebeca/jobs": "jobs"}
    check_entrypoint(shlex.split(at(ALL["rayjob.yaml"][0], "/spec/entrypoint")))
    check_entrypoint(shlex.split(at(ALL["raycronjob.yaml"][0], "/spec/jobTemplate/entrypoint")))
    with pytest.raises(StopIteration):
        check_entrypoint(["python", "/opt/jobs/nightly.py", "--config", "/etc/rebeca/nightly.yaml"])


def test_the_job_of_the_entrypoints_exists() -> None:
    assert (REPO / "jobs" / "nightly.py").is_file()


def test_every_attempt_runs_the_date_of_its_night() -> None:
    """A RayJob has its date in its command. RayCronJob and CronJob end all attempts on the same day."""
    assert re.search(r" run_date=\d{4}-\d\d-\d\d$", at(ALL["rayjob.yaml"][0], "/spec/entrypoint"))
    nightly = ALL["raycronjob.yaml"][0]["spec"]
    minute, hour = map(int, nightly["schedule"].split()[:2])
    attempts = 1 + nightly["jobTemplate"]["backoffLimit"]
    assert nightly["timeZone"] == "Etc/UTC"
    assert hour * 3600 + minute * 60 + attempts * nightly["jobTemplate"]["activeDeadlineSeconds"] < 24 * 3600
    plain = ALL["cronjob.yaml"][0]["spec"]
    assert (plain["concurrencyPolicy"], plain["schedule"], plain["timeZone"]) == (
        "Forbid",
        "0 1 * * *",
        "Etc/UTC",
    )
    assert ZoneInfo(plain["timeZone"]).key == "Etc/UTC"
    assert plain["jobTemplate"]["spec"]["activeDeadlineSeconds"] < 24 * 3600


STUB = """#!/bin/bash
# Replaces `ray` and `sleep`, and records its arguments in $CALLS. $ENDS has one word per attempt: its end.
[ "$(basename "$0")" = sleep ] && exit 0
printf '%s\\0' "$@" >> "$CALLS"; printf '\\n' >> "$CALLS"
for last; do :; done
[ "$2" = status ] || exit 0
end=$(cut -d' ' -f"${last##*-}" <<< "$ENDS")
case $end in
  0) echo "INFO cli.py:76 -- Job '$last' succeeded" ;;
  lost) exit 1 ;;
  *) echo "INFO cli.py:89 -- Status message: Job entrypoint command failed with exit code $end, last" ;;
esac
"""


def run_submitter(
    folder: Path, ends: str, job_name: str = "rebeca-nightly-29496060"
) -> tuple[int, list[list[str]]]:
    """Run the script of the CronJob with a stub for `ray`. Return its exit code and the calls of the stub."""
    for name in ("ray", "sleep"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    environment = {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "CALLS": str(calls),
        "ENDS": ends,
        "JOB_NAME": job_name,
    }
    script = [*SUBMITTER["command"], *SUBMITTER["args"]]
    ran = subprocess.run(script, env=environment, capture_output=True, check=False, timeout=60)
    return ran.returncode, [line.split("\0")[:-1] for line in calls.read_text().splitlines()]


@pytest.mark.parametrize(
    ("ends", "code", "attempts"),
    [
        ("0", 0, 1),
        ("75 0", 0, 2),
        ("1 5 75", 75, 3),
        ("2", 2, 1),
        ("75 3", 3, 2),
        ("4", 4, 1),
        ("lost lost lost", 1, 3),
    ],
)
def test_the_submitter_retries_and_ends_with_the_exit_code_of_the_job(
    tmp_path: Path, ends: str, code: int, attempts: int
) -> None:
    exit_code, calls = run_submitter(tmp_path, ends)
    assert exit_code == code
    assert [call[1] for call in calls] == ["submit", "logs", "status"] * attempts
    for call in calls:
        parser = {"submit": submit, "logs": logs, "status": status}[call[1]]
        parser.make_context(call[1], call[2:])  # raises if Ray does not accept the options
    submitted = [submit.make_context("submit", call[2:]).params for call in calls if call[1] == "submit"]
    assert [options["submission_id"] for options in submitted] == [
        f"rebeca-2026-01-30-{number}" for number in range(1, attempts + 1)
    ]
    for options in submitted:
        check_entrypoint(list(options["entrypoint"]))
        assert options["entrypoint"][-1] == "run_date=2026-01-30"
        assert options["no_wait"] is True


def test_permanent_failures_end_the_kubernetes_job() -> None:
    rule = at(ALL["cronjob.yaml"][0], "/spec/jobTemplate/spec/podFailurePolicy/rules/0")
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "submitter", "operator": "In", "values": [2, 3, 4]},
    }


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_patch_adds_a_triton_server_to_each_worker(name: str) -> None:
    worker, triton = at(patched(name), CLUSTERS[name] + "/workerGroupSpecs/0/template/spec/containers")
    (writer,) = at(patched(name), CLUSTERS[name] + "/workerGroupSpecs/0/template/spec/initContainers")
    assert worker["name"] == "ray-worker"  # KubeRay expects Ray in the first container
    assert "nvidia.com/gpu" not in worker["resources"]["limits"]
    assert triton["command"] == ["tritonserver"]
    assert {"--model-control-mode=none", "--grpc-address=127.0.0.1", "--http-address=127.0.0.1"} <= set(
        triton["args"]
    )
    # As `rebeca serve` does, behind a key that differs from pod to pod.
    assert {"name": "POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}} in triton["env"]
    closed = f"{CLOSED_APIS}:closed=$(POD_UID)"
    assert {f"--http-restricted-api={closed}", f"--grpc-restricted-protocol={closed}"} <= set(triton["args"])
    assert triton["securityContext"]["readOnlyRootFilesystem"] is True
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in triton["volumeMounts"]}
    assert mounts == {"/repository": True, "/models": True, "/tmp": False, "/dev/shm": False}
    assert f"--model-repository={writer['args'][2]}" in triton["args"]
    (base,) = re.findall(
        r"^FROM nvcr\.io/nvidia/tritonserver:(\d\d\.\d\d)-py3 AS triton$",
        DOCKERFILE.read_text(),
        re.MULTILINE,
    )
    assert tuple(map(int, base.split("."))) >= (26, 7)
    assert {writer["image"], triton["image"]} == {f"rebeca-triton:{base}-0.1.0"}


def test_the_patch_writes_the_model_repository_of_triton(tmp_path: Path) -> None:
    (writer,) = at(patched("raycluster.yaml"), WORKER + "/template/spec/initContainers")
    config = REPO / "jobs" / "configs" / "generate_stickers.yaml"
    command = [sys.executable, *writer["command"][1:], writer["args"][0], config, tmp_path / "models"]
    subprocess.run(command, check=True, timeout=240, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPO)})
    assert (tmp_path / "models" / "decoder" / "1" / "model.py").is_file()
    assert 'key: "fingerprint"' in (tmp_path / "models" / "decoder" / "config.pbtxt").read_text()
