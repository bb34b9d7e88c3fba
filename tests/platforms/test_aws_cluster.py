"""The config of Ray's cluster launcher: Ray's schema and parsers accept it, and it keeps our rules.

Every rule is also tested with a mistake that it must catch.
"""

import copy
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from click.exceptions import ClickException
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from tests.conftest import REPO
from tests.infra.manifests import at
from tests.platforms import terraform

Config = dict[str, Any]
TEXT = (REPO / "infra" / "aws-cluster.yaml").read_text()
LOCK = (REPO / "requirements.lock").read_text()
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def load() -> Config:
    """Return the config with YAML aliases copied."""
    return json.loads(json.dumps(yaml.safe_load(TEXT)))


def commands_of(config: Config) -> Iterator[str]:
    for name in config:
        if name.endswith("_commands"):
            yield from config[name]


def ray_start(config: Config, name: str) -> dict[str, Any]:
    """Parse the last command of a node with the parser of `ray start`."""
    words = shlex.split(config[name][-1].replace("$RAY_HEAD_IP", "10.0.0.1"))
    path = "PATH=$HOME/rebeca/bin:$PATH"
    assert words[3:7] == ["RAY_AUTH_MODE=token", path, "~/rebeca/bin/ray", "start"]
    return dict(start.make_context("start", words[7:]).params)


def check_schema(config: Config) -> None:
    """As `ray up` does: fill in the defaults of AWS, then validate."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert prepared["available_node_types"]["gpu"]["max_workers"] == config["max_workers"]


def check_start(config: Config) -> None:
    head, worker = (
        ray_start(config, "head_start_ray_commands"),
        ray_start(config, "worker_start_ray_commands"),
    )
    assert (head["head"], head["dashboard_host"]) == (True, "127.0.0.1")
    assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    assert (worker["head"], worker["address"]) == (False, "10.0.0.1:6379")


def check_token(config: Config) -> None:
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    for command in commands_of(config):
        assert "bin/ray" not in command or "RAY_AUTH_MODE=token " in command


def check_closed(config: Config) -> None:
    """Require that no port is open. Ray opens SSH to the world for any node type without a group."""
    assert "security_group" not in config["provider"]
    assert config["provider"]["use_internal_ips"] is True
    assert config["auth"]["ssh_proxy_use_node_id"] is True
    assert "--document-name AWS-StartSSHSession" in config["auth"]["ssh_proxy_command"]
    for node in config["available_node_types"].values():
        machine = node["node_config"]
        assert machine["SecurityGroupIds"]
        assert "NetworkInterfaces" not in machine
        assert machine["MetadataOptions"]["HttpTokens"] == "required"
        assert all(device["Ebs"]["Encrypted"] for device in machine["BlockDeviceMappings"])


def check_keys(config: Config) -> None:
    """Require a role and no key. Ray would give a head without a profile all rights on EC2 and S3."""
    assert not re.search(r"(?i)secret|access_key|aws_credentials|AKIA", json.dumps(config))
    profiles = {
        name: node["node_config"]["IamInstanceProfile"]["Name"]
        for name, node in config["available_node_types"].items()
    }
    plan = terraform.recorded()
    assert profiles == {
        "head": plan["aws_iam_instance_profile.head"]["name"],
        "gpu": plan["aws_iam_instance_profile.worker"]["name"],
    }
    # The head may only start and end instances with this tag.
    assert f"{config['cluster_name']}-ray" == plan["aws_security_group.cluster"]["name"]


def check_versions(config: Config) -> None:
    """Require a version for each package, and those of the lock file where it has them."""
    wheel = f"rebeca_ray-{PROJECT['version']}-py3-none-any.whl"
    assert config["file_mounts"][f"~/install/{wheel}"] == f"dist/{wheel}"
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", LOCK, re.MULTILINE))
    installs = [command for command in commands_of(config) if "pip install" in command]
    assert len(installs) == 4
    assert installs[1].endswith("--no-deps --require-hashes -r ~/install/locked.txt")
    assert installs[2].endswith(f"--no-deps ~/install/{wheel}")
    for command in (installs[0], installs[3]):
        packages = re.split(r" (?:&&|;) ", command.split("pip install")[1])[0].split()
        packages = [word for word in packages if not word.startswith("-")]
        assert packages
        for package in packages:
            name, _, version = package.partition("==")
            assert version, f"{package}: no version"
            assert locked.get("botocore" if name == "boto3" else name, version) == version
    for node in config["available_node_types"].values():
        assert re.fullmatch(r"ami-[0-9a-f]{17}", node["node_config"]["ImageId"])


def check_workers(config: Config) -> None:
    head, gpu = config["available_node_types"]["head"], config["available_node_types"]["gpu"]
    assert head["resources"] == {"CPU": 0}
    assert gpu["resources"] == {"decoder_slot": 1}
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert config["provider"]["cache_stopped_nodes"] is False


CHECKS = (check_schema, check_start, check_token, check_closed, check_keys, check_versions, check_workers)
NODE = "/available_node_types/gpu/node_config"
MISTAKES: list[tuple[Callable[[Config], None], str, Any]] = [
    (check_schema, "/max_worker", 2),
    (check_schema, "/head_node_type", "master"),
    (check_schema, "/available_node_types/gpu/resources/decoder_slot", "1"),
    (check_schema, "/available_node_types/gpu/min_workers", 5),
    (
        check_start,
        "/head_start_ray_commands/1",
        "ulimit -n 1; RAY_AUTH_MODE=token ~/rebeca/bin/ray start --heads",
    ),
    (check_start, "/worker_start_ray_commands/1", "~/rebeca/bin/ray start --address=$RAY_HEAD_IP:6379"),
    (check_token, "/file_mounts/~0~1.ray~1auth_token", "/dev/null"),
    (check_token, "/head_start_ray_commands/0", "~/rebeca/bin/ray stop"),
    (check_closed, "/provider/security_group", {"GroupName": "open"}),
    (check_closed, f"{NODE}/SecurityGroupIds", []),
    (check_closed, "/provider/use_internal_ips", False),
    (check_keys, "/provider/aws_credentials", {"aws_access_key_id": "AKIA0"}),
    (check_keys, f"{NODE}/IamInstanceProfile", {"Name": "ray-autoscaler-v1"}),
    (check_versions, f"{NODE}/ImageId", "latest_dlami"),
    (check_versions, "/head_setup_commands/0", "~/rebeca/bin/pip install boto3"),
    (check_workers, f"{NODE}/InstanceMarketOptions", {}),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_config_passes_every_check(check: Callable[[Config], None]) -> None:
    check(load())


@pytest.mark.parametrize(("check", "pointer", "value"), MISTAKES)
def test_every_check_catches_a_mistake(check: Callable[[Config], None], pointer: str, value: Any) -> None:
    config = load()
    folder, _, key = pointer.rpartition("/")
    key = key.replace("~1", "/").replace("~0", "~")
    parent = at(config, folder)
    parent[int(key) if isinstance(parent, list) else key] = value
    with pytest.raises((AssertionError, ValidationError, ClickException, ValueError)):
        check(config)
