"""What a job can be told: one frozen, strict model a job, a YAML loader, and `key.sub=value` overrides.

An unknown key is an error that suggests the nearest known one. The sections are in `settings.py`.
"""

import datetime
import re
import typing
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from rebeca_ray.errors import UserError, did_you_mean, shown
from rebeca_ray.presets import PRESETS
from rebeca_ray.settings import (
    MAX_IMAGES,
    Cpus,
    DecoderSettings,
    Device,
    DiffusionSettings,
    Few,
    GateSettings,
    Identifier,
    InteractionSettings,
    LayoutSettings,
    LearningRate,
    LimitSettings,
    Location,
    ModelName,
    NetworkSettings,
    OptimizationSettings,
    Positive,
    PriceSettings,
    Ratio,
    RefreshSettings,
    SamplerSettings,
    Seed,
    SelectionSettings,
    Settings,
    Share,
    Size,
    WorkerSettings,
)

C = TypeVar("C", bound=Settings)
Resume = Literal["auto", "require", "never"]
MAX_BYTES = 100_000  # of a config


class EmbedConfig(Settings):
    """`rebeca embed`: items with images -> the same items with `image_embeds`."""

    items: Location
    clip: Annotated[
        ModelName,
        Field(description="an open_clip name: local-dir:…, hf-hub:…, or architecture/pretrained-tag"),
    ]
    out: Location
    batch_size: Size = 256
    num_actors: Few = 1
    cpus_per_actor: Cpus = 1.0
    device: Device = "cpu"


class TrainConfig(Settings):
    """`rebeca train`: interactions + embedded items -> a prior directory."""

    preset: Annotated[
        Literal["paper-v1", "paper-v2", "stickers"] | None,
        Field(description="where the sections below start from; see presets.py"),
    ] = None
    interactions: InteractionSettings
    items: Location
    catalog: Annotated[
        Location | None,
        Field(description="root of a catalog whose generated items are rated too: they are found there"),
    ] = None
    out: Location
    network: NetworkSettings = NetworkSettings()
    diffusion: DiffusionSettings = DiffusionSettings()
    embed_clamp: Annotated[
        float,
        Field(
            gt=0,
            le=1000,
            description="embeddings of length sqrt(D) are clamped to ± this, then divided by it",
        ),
    ] = 5.0
    optimization: OptimizationSettings = OptimizationSettings()
    workers: WorkerSettings = WorkerSettings()
    storage: Annotated[
        Location,
        Field(
            description="where Ray Train keeps checkpoints; the run resumes from here", validate_default=True
        ),
    ] = "runs/train"
    run_name: Annotated[
        Identifier, Field(description="a hash of settings and data follows it, so that new data starts anew")
    ] = "prior"

    @model_validator(mode="before")
    @classmethod
    def start_from_the_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(preset, str) or preset not in PRESETS:
            return values
        told = {name: values.get(name, {}) for name in PRESETS[preset]}
        return {
            **values,
            **{name: {**PRESETS[preset][name], **own} for name, own in told.items() if isinstance(own, dict)},
        }


class DistillConfig(Settings):
    """`rebeca distill`: a trained prior -> one that needs a few passes an embedding."""

    prior: Location
    out: Location
    interactions: Annotated[
        InteractionSettings | None, Field(description="for a `history` prior: whose trajectories to learn")
    ] = None
    items: Location | None = None
    catalog: Annotated[
        Location | None,
        Field(description="root of a catalog whose generated items are rated too: they are found there"),
    ] = None
    storage: Annotated[Location, Field(description="where histories are kept", validate_default=True)] = (
        "runs/distill"
    )
    num_inference_steps: Annotated[Few, Field(description="passes of the student")] = 4
    num_users: Annotated[Positive, Field(description="users whose trajectories are drawn, at most")] = 20_000
    num_trajectories: Annotated[Positive, Field(ge=256)] = 20_000
    max_epochs: Positive = 10
    batch_size: Size = 512
    learning_rate: LearningRate = 5e-4
    min_quality: Annotated[
        Ratio, Field(description="of the teacher's mean like probability; below it nothing is written")
    ] = 0.98
    min_diversity: Annotated[
        Ratio, Field(description="of the teacher's mean distance between a user's samples; likewise")
    ] = 0.9
    device: Device = "cpu"
    seed: Seed = 0


class GenerateConfig(Settings):
    """`rebeca generate`: prior + decoder + request -> a published snapshot."""

    prior: Location
    decoder: DecoderSettings
    request: Location
    root: Location
    items: Annotated[
        Location | None, Field(description="real items: for nearest_item_id, and to draw no copy of one")
    ] = None
    interactions: Annotated[
        InteractionSettings | None,
        Field(description="what the users rated until now; a `history` prior needs it, and `items`"),
    ] = None
    sampler: SamplerSettings = SamplerSettings()
    selection: SelectionSettings = SelectionSettings()
    refresh: RefreshSettings = RefreshSettings()
    layout: LayoutSettings = LayoutSettings()
    limits: LimitSettings = LimitSettings()
    gate: GateSettings = GateSettings()
    prices: PriceSettings = PriceSettings()
    num_images: Annotated[
        int, Field(gt=0, le=MAX_IMAGES, description="images a user, where the request does not say")
    ] = 10
    run_date: Annotated[datetime.date | None, Field(description="default: today, UTC")] = None
    run_id: Annotated[Identifier | None, Field(description="default: the time and six random digits")] = None
    error_budget: Annotated[
        Share, Field(description="share of items that may fail; above it nothing is published")
    ] = 0.001

    def date(self) -> datetime.date:
        """The date the snapshot is for."""
        return self.run_date or datetime.datetime.now(datetime.UTC).date()


class NightlyConfig(Settings):
    """`rebeca nightly`: what one date needs. A section may be the name of a file beside this one; `{run_date}` in paths is filled in."""

    embed: Annotated[EmbedConfig | None, Field(description="null: items come embedded")] = None
    train: Annotated[TrainConfig | None, Field(description="null: the prior comes from elsewhere")] = None
    generate: GenerateConfig
    run_date: Annotated[datetime.date | None, Field(description="default: today, UTC")] = None
    train_every_days: Annotated[Few, Field(description="the prior is trained anew when it is as old")] = 1
    catch_up: Annotated[
        int, Field(ge=0, le=1000, description="dates without a snapshot that are made up for, at most")
    ] = 3
    keep_snapshots: Few = 7
    grace_hours: Annotated[
        float, Field(ge=0, le=10**5, description="how long a reader may hold a snapshot that was followed")
    ] = 48


def dated(config: C, date: datetime.date) -> C:
    """The config with `{run_date}` in its paths filled in."""

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(part) for name, part in value.items()}
        return value.replace("{run_date}", date.isoformat()) if isinstance(value, str) else value

    return type(config).model_validate(filled(config.model_dump()))


def load_config(model: type[C], path: str | Path, overrides: list[str] | None = None) -> C:
    """Read `path` (YAML), apply `key.sub=value` overrides, and check everything.

    Raises UserError naming the key, what was found, and the nearest known key or the expected value.
    """
    path = Path(path)
    values = read_values(path)
    for name, value in values.items():
        if isinstance(value, str) and name in model.model_fields and section_of(model, name) is not None:
            values[name] = read_values(path.parent / value)
    for override in overrides or []:
        apply_override(values, override)
    return parse_config(model, values, where=str(path))


def read_values(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode()
    except OSError as error:
        raise UserError(
            f"config {path}: cannot be read ({error.strerror}); give an existing YAML file to --config"
        ) from None
    except ValueError as error:
        raise UserError(f"config {path}: not valid YAML ({error}); save it as UTF-8 text") from None
    values = read_yaml(text, where=f"config {path}")
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(
            f"config {path}: found {type(values).__name__} at the top, expected a mapping of settings"
        )
    return values


class ConfigLoader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2 and dates, and without what a config has no use for: repeated keys and aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for billions of values
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="found an alias, write the value itself", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"key {shown(key.value)} is there twice, keep one",
                        problem_mark=key.start_mark,
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


SCALARS = (  # kind, what it looks like, what it begins with
    ("null", r"|~|null|Null|NULL", ["", *"~nN"]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+."]),
    ("timestamp", r"[0-9]{4}-[0-9]{2}-[0-9]{2}", [*"0123456789"]),
)
ConfigLoader.yaml_implicit_resolvers = {}
for scalar, pattern, beginnings in SCALARS:
    ConfigLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{scalar}", re.compile(f"^(?:{pattern})$"), beginnings
    )


def read_yaml(text: str, *, where: str) -> Any:
    """The values in a YAML text. Raises UserError, in one line, for anything that is none."""
    if len(text) > MAX_BYTES:
        raise UserError(f"{where}: is longer than {MAX_BYTES:,} characters; give a file of settings")
    try:
        return yaml.load(text, ConfigLoader)
    except RecursionError:
        raise UserError(
            f"{where}: not valid YAML (nested too deeply); sections go three levels down"
        ) from None
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
    ) as error:  # all but the first: a value its tag does not fit
        raise UserError(
            f"{where}: not valid YAML ({describe(error)}); mend that line, or quote the value"
        ) from None


def describe(error: Exception) -> str:
    """One line on what PyYAML did not like, and where."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else error
    return shorten(str(problem), 200, placeholder=" …") + (
        f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    )


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in a nested mapping; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {shown(override)}: expected key.sub=value")
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"override {shown(override)}: {parent} is a value, not a section")
    values[leaf] = read_yaml(text, where=f"override {shown(override)}")


def parse_config(model: type[C], values: dict[str, Any], *, where: str) -> C:
    """Build `model` from plain values; the first mistake becomes a one-line UserError."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = min(
            error.errors(), key=lambda found: found["type"] != "extra_forbidden"
        )  # a misspelt key before the one it leaves out
        path = [str(part) for part in first["loc"]]
        key, found = ".".join(path), shown(first["input"])
        if first["type"] == "extra_forbidden":
            *parents, leaf = path
            raise UserError(
                f"{where}: unknown key {shown(key)}; {did_you_mean(leaf, section_at(model, parents).model_fields)}"
            ) from None
        if first["type"] == "missing" and isinstance(first["loc"][-1], str):
            raise UserError(f"{where}: key {key!r} is missing; set it in the file or as {key}=…") from None
        if first["type"] == "model_type":
            keys = shorten(", ".join(section_at(model, path).model_fields), 200, placeholder=" …")
            raise UserError(
                f"{where}: {key} is a section, not the value {found}; set one of its keys ({keys})"
            ) from None
        raise UserError(
            f"{where}: {shown(key)[1:-1]} = {found}: {first['msg'].removeprefix('Value error, ').lower()}"
        ) from None


def section_at(model: type[Settings], parents: list[str]) -> type[Settings]:
    """The settings class found by walking `parents` down from `model`."""
    for parent in parents:
        model = typing.cast(type[Settings], section_of(model, parent))
    return model


def section_of(model: type[Settings], name: str) -> type[Settings] | None:
    """The settings class of a field; None if it is a value."""
    annotation: Any = model.model_fields[name].annotation
    candidates = [annotation, *typing.get_args(annotation)]
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, Settings)), None)
