"""What a job can be told: one frozen, strict model a job, a YAML loader, and `key.sub=value` overrides.

An unknown key is an error that suggests the nearest known one. The sections are in `settings.py`.
"""

import datetime
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from rebeca_ray.errors import UserError, did_you_mean
from rebeca_ray.presets import PRESETS
from rebeca_ray.settings import (
    MAX_IMAGES,
    Cpus,
    DecoderSettings,
    Device,
    DiffusionSettings,
    GateSettings,
    Identifier,
    InteractionSettings,
    LayoutSettings,
    LimitSettings,
    Location,
    ModelName,
    NetworkSettings,
    OptimizationSettings,
    Positive,
    PriceSettings,
    RefreshSettings,
    SamplerSettings,
    SelectionSettings,
    Settings,
    Share,
    WorkerSettings,
)

C = TypeVar("C", bound=Settings)
Resume = Literal["auto", "require", "never"]


class EmbedConfig(Settings):
    """`rebeca embed`: items with images -> the same items with `image_embeds`."""

    items: Location
    clip: Annotated[ModelName, Field(description="an open_clip name: local-dir:…, hf-hub:…, or architecture/pretrained-tag")]
    out: Location
    batch_size: Positive = 256
    num_actors: Positive = 1
    cpus_per_actor: Cpus = 1.0
    device: Device = "cpu"


class TrainConfig(Settings):
    """`rebeca train`: interactions + embedded items -> a prior directory."""

    preset: Annotated[
        Literal["paper-v1", "paper-v2", "stickers"] | None, Field(description="where the sections below start from; see presets.py")
    ] = None
    interactions: InteractionSettings
    items: Location
    out: Location
    network: NetworkSettings = NetworkSettings()
    diffusion: DiffusionSettings = DiffusionSettings()
    embed_clamp: Annotated[float, Field(gt=0, description="embeddings of length sqrt(D) are clamped to ± this, then divided by it")] = 5.0
    optimization: OptimizationSettings = OptimizationSettings()
    workers: WorkerSettings = WorkerSettings()
    storage: Annotated[
        Location, Field(description="where Ray Train keeps checkpoints; the run resumes from here", validate_default=True)
    ] = "runs/train"
    run_name: Annotated[Identifier, Field(description="a hash of settings and data follows it, so that new data starts anew")] = "prior"

    @model_validator(mode="before")
    @classmethod
    def start_from_the_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        if preset not in PRESETS:
            return values
        told = {name: values.get(name) or {} for name in PRESETS[preset]}
        return {**values, **{name: {**PRESETS[preset][name], **own} for name, own in told.items() if isinstance(own, dict)}}


class DistillConfig(Settings):
    """`rebeca distill`: a trained prior -> one that needs a few passes an embedding."""

    prior: Location
    out: Location
    interactions: Annotated[InteractionSettings | None, Field(description="for a `history` prior: whose trajectories to learn")] = None
    items: Location | None = None
    storage: Annotated[Location, Field(description="where histories are kept", validate_default=True)] = "runs/distill"
    num_inference_steps: Annotated[int, Field(gt=0, description="passes of the student")] = 4
    num_users: Annotated[int, Field(gt=0, description="users whose trajectories are drawn, at most")] = 20_000
    num_trajectories: Annotated[int, Field(ge=256)] = 20_000
    max_epochs: Positive = 10
    batch_size: Positive = 512
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    min_quality: Annotated[float, Field(ge=0, description="of the teacher's mean like probability; below it nothing is written")] = 0.98
    min_diversity: Annotated[float, Field(ge=0, description="of the teacher's mean distance between a user's samples; likewise")] = 0.9
    device: Device = "cpu"
    seed: Annotated[int, Field(ge=0)] = 0


class GenerateConfig(Settings):
    """`rebeca generate`: prior + decoder + request -> a published snapshot."""

    prior: Location
    decoder: DecoderSettings
    request: Location
    root: Location
    items: Annotated[Location | None, Field(description="real items: for nearest_item_id, and to draw no copy of one")] = None
    interactions: Annotated[
        InteractionSettings | None, Field(description="what the users rated until now; a `history` prior needs it, and `items`")
    ] = None
    sampler: SamplerSettings = SamplerSettings()
    selection: SelectionSettings = SelectionSettings()
    refresh: RefreshSettings = RefreshSettings()
    layout: LayoutSettings = LayoutSettings()
    limits: LimitSettings = LimitSettings()
    gate: GateSettings = GateSettings()
    prices: PriceSettings = PriceSettings()
    num_images: Annotated[int, Field(gt=0, le=MAX_IMAGES, description="images a user, where the request does not say")] = 10
    run_date: Annotated[datetime.date | None, Field(description="default: today, UTC")] = None
    run_id: Annotated[Identifier | None, Field(description="default: the time and six random digits")] = None
    error_budget: Annotated[Share, Field(description="share of items that may fail; above it nothing is published")] = 0.001

    def date(self) -> datetime.date:
        """The date the snapshot is for."""
        return self.run_date or datetime.datetime.now(datetime.UTC).date()


class NightlyConfig(Settings):
    """`rebeca nightly`: what one date needs. A section may be the name of a file beside this one; `{run_date}` in paths is filled in."""

    embed: Annotated[EmbedConfig | None, Field(description="null: items come embedded")] = None
    train: Annotated[TrainConfig | None, Field(description="null: the prior comes from elsewhere")] = None
    generate: GenerateConfig
    run_date: Annotated[datetime.date | None, Field(description="default: today, UTC")] = None
    train_every_days: Annotated[int, Field(gt=0, description="the prior is trained anew when it is as old")] = 1
    catch_up: Annotated[int, Field(ge=0, description="dates without a snapshot that are made up for, at most")] = 3
    keep_snapshots: Positive = 7
    grace_hours: Annotated[float, Field(ge=0, description="how long a reader may hold a snapshot that was followed")] = 48


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
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"config {path}: cannot be read ({error.strerror}); give an existing YAML file to --config") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise UserError(f"config {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"config {path}: found {type(values).__name__} at the top, expected a mapping of settings")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in a nested mapping; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: expected key.sub=value")
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section")
    try:
        values[leaf] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise UserError(f"override {override!r}: {text!r} is not valid YAML ({' '.join(str(error).split())}); quote it") from None


def parse_config(model: type[C], values: dict[str, Any], *, where: str) -> C:
    """Build `model` from plain values; the first mistake becomes a one-line UserError."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")  # a misspelt key before the one it leaves out
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            *parents, leaf = [str(part) for part in first["loc"]]
            hint = did_you_mean(leaf, section_at(model, parents).model_fields)
            raise UserError(f"{where}: unknown key {key!r}; {hint}") from None
        if first["type"] == "missing":
            raise UserError(f"{where}: key {key!r} is missing; set it in the file or as {key}=…") from None
        if first["type"] == "model_type":
            keys = ", ".join(f"{key}.{name}" for name in section_at(model, [str(part) for part in first["loc"]]).model_fields)
            raise UserError(f"{where}: {key} is a section, not the value {first['input']!r}; set one of its keys ({keys})") from None
        raise UserError(f"{where}: {key} = {first['input']!r}: {first['msg'].removeprefix('Value error, ').lower()}") from None


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
