"""The fields of the Compose specification that `infra/compose.yaml` uses. These models refuse any other."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tests.conftest import REPO

FILE = REPO / "infra" / "compose.yaml"
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]
Text = Annotated[str, Field(min_length=1)]
Span = Annotated[str, Field(pattern=r"^\d+[sm]$")]
Bytes = Annotated[str, Field(pattern=r"^\d+[mg]b?$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Build(Strict):
    context: Text
    dockerfile: Text
    target: Text


class Bind(Strict):
    create_host_path: bool


class Mount(Strict):
    type: Literal["bind", "volume"]
    source: Text
    target: Annotated[str, Field(pattern=r"^/")]
    read_only: bool = False
    bind: Bind | None = None


class Healthcheck(Strict):
    test: Annotated[list[Text], Field(min_length=2)]
    interval: Span
    timeout: Span
    retries: Annotated[int, Field(ge=1)]
    start_period: Span | None = None

    @model_validator(mode="after")
    def is_a_command(self) -> Self:
        if self.test[0] != "CMD":
            raise ValueError("the test of a healthcheck begins with CMD")
        return self


class Condition(Strict):
    condition: Literal["service_started", "service_healthy", "service_completed_successfully"]


class Options(Strict):
    max_size: Annotated[Bytes, Field(alias="max-size")]
    max_file: Annotated[str, Field(alias="max-file")]


class Logging(Strict):
    driver: Literal["json-file"]
    options: Options


class Limits(Strict):
    cpus: Annotated[str, Field(pattern=r"^\d+$")]
    memory: Bytes


class Resources(Strict):
    limits: Limits


class Deploy(Strict):
    resources: Resources


class Service(Strict):
    image: Text
    build: Build | None = None
    profiles: list[Name] = []
    restart: Literal["no", "unless-stopped"]
    read_only: Literal[True]
    user: Annotated[str, Field(pattern=r"^\d+:\d+$")]
    cap_drop: list[Literal["ALL"]]
    security_opt: list[Literal["no-new-privileges:true"]]
    pids_limit: int
    shm_size: Bytes | None = None
    logging: Logging
    entrypoint: list[Text] = []
    command: list[Text] = []
    environment: dict[Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")], str] = {}
    depends_on: dict[Name, Condition] = {}
    networks: Annotated[list[Name], Field(min_length=1)]
    ports: list[str] = []
    secrets: list[Name] = []
    tmpfs: list[Annotated[str, Field(pattern=r"^/")]] = []
    volumes: list[Mount] = []
    healthcheck: Healthcheck | None = None
    deploy: Deploy


class Secret(Strict):
    file: Annotated[str, Field(pattern=r"^\./secrets/")]


class Empty(Strict):
    """A network or a volume with the defaults."""


class Compose(Strict):
    name: Name
    services: dict[Name, Service]
    networks: dict[Name, Empty]
    volumes: dict[Name, Empty]
    secrets: dict[Name, Secret]

    @model_validator(mode="after")
    def names_its_parts(self) -> Self:
        """Refuse a service that names another service, network, volume or secret than those of the file."""
        for name, service in self.services.items():
            named = {
                "services": set(service.depends_on),
                "networks": set(service.networks),
                "secrets": set(service.secrets),
                "volumes": {mount.source for mount in service.volumes if mount.type == "volume"},
            }
            for part, names in named.items():
                if unknown := names - getattr(self, part).keys():
                    raise ValueError(f"{name}: {part} has no {sorted(unknown)}")
        return self


def read_compose(path: Path = FILE) -> dict[str, Any]:
    """Return the file as Compose reads it: anchors are copied, and templates (`x-`) are left out."""
    values = yaml.safe_load(path.read_text())
    return {key: value for key, value in values.items() if not key.startswith("x-")}


def script_of(service: Service) -> str:
    """Return the shell script of a service, as bash gets it."""
    text = service.command[-1].replace("$$", "\0")
    assert not re.search(r"\$", text), "Compose would fill in a single $"
    return text.replace("\0", "$")
