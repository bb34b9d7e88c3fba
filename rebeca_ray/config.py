"""What a job can be told: frozen, strict models, a YAML loader, and `key.sub=value` overrides.

An unknown key is an error that suggests the nearest known one. Every `Location` may be local or `s3://`.
"""

import datetime
import os
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from rebeca_ray.errors import UserError, did_you_mean

PACKAGE = Path(__file__).parent


def expand(location: str) -> str:
    """Resolve `~`, and `package:` (a folder inside the installed rebeca_ray), also behind open_clip's `local-dir:`."""
    scheme = "local-dir:" if location.startswith("local-dir:") else ""
    path = location.removeprefix(scheme)
    if path.startswith("package:"):
        return f"{scheme}{PACKAGE / path.removeprefix('package:')}"
    return f"{scheme}{Path(path).expanduser()}" if path.startswith("~") else location


def absolute(location: str) -> str:
    """A local path from the root, because the cluster's workers have another working directory; `s3://` as it is."""
    location = expand(location)
    return location if "://" in location else os.path.abspath(location)


Location = Annotated[str, AfterValidator(absolute)]
ModelName = Annotated[str, AfterValidator(expand)]  # a hub id, or a directory that every node sees
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", coerce_numbers_to_str=True)]
Positive = Annotated[int, Field(gt=0)]
MAX_IMAGES = 32_767  # a rank is an int16
Share = Annotated[float, Field(ge=0, lt=1)]
Cpus = Annotated[float, Field(gt=0, description="CPUs reserved an actor; leave one of the cluster's for reading")]
Device = Literal["cpu", "cuda"]


class Settings(BaseModel):
    """Base of every config section: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class InteractionSettings(Settings):
    """How ratings become likes, and who is kept (paper: like = rating >= 4)."""

    path: Location
    like_threshold: float = 4.0
    min_likes: Annotated[int, Field(ge=0)] = 1
    hold_out: Annotated[Share, Field(description="share of each user's interactions kept from training")] = 0.1


class NetworkSettings(Settings):
    """The prior network: the authors' later one (6 layers, 8 heads, width 128, 32 tokens)."""

    num_layers: Positive = 6
    num_heads: Positive = 8
    width: Positive = 128
    num_tokens: Positive = 32

    @model_validator(mode="after")
    def heads_share_the_width(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not divisible by num_heads {self.num_heads}; change one of them")
        return self


class DiffusionSettings(Settings):
    """The forward process and what the network predicts."""

    num_train_timesteps: Positive = 1000
    schedule: Literal["squaredcos_cap_v2", "linear", "laplace"] = "squaredcos_cap_v2"
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "sample"


class OptimizationSettings(Settings):
    """One training run: AdamW, plateau schedule, early stopping, exponential moving average."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    user_learning_rate: Annotated[
        float | None, Field(gt=0, description="of the user table, whose rows see few batches each; default: learning_rate")
    ] = None
    weight_decay: Annotated[float, Field(ge=0)] = 1e-5
    batch_size: Annotated[int, Field(gt=0, description="samples a step, over all workers")] = 64
    samples_per_user: Annotated[int, Field(gt=0, description="draws a user an epoch")] = 100
    max_epochs: Positive = 100
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    plateau_patience: Positive = 4
    early_stopping_patience: Positive = 10
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    user_dropout: Share = 0.15
    rating_dropout: Share = 0.15
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    seed: int = 0


class WorkerSettings(Settings):
    """The Ray Train workers: `cpu` talks gloo, `cuda` talks nccl."""

    num_workers: Positive = 1
    cpus_per_worker: Positive = 1
    device: Device = "cpu"
    max_failures: Annotated[int, Field(ge=0)] = 2


C = TypeVar("C", bound=Settings)


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

    interactions: InteractionSettings
    items: Location
    out: Location
    network: NetworkSettings = NetworkSettings()
    diffusion: DiffusionSettings = DiffusionSettings()
    optimization: OptimizationSettings = OptimizationSettings()
    workers: WorkerSettings = WorkerSettings()
    storage: Annotated[
        Location, Field(description="where Ray Train keeps checkpoints; the run resumes from here", validate_default=True)
    ] = "runs/train"
    run_name: Annotated[Identifier, Field(description="a hash of settings and data follows it, so that new data starts anew")] = "prior"


class SamplerSettings(Settings):
    """How the prior is sampled: DPM-Solver++(2M) by default, the paper's 1000-step DDPM as reference."""

    name: Literal["dpm_solver", "ddpm"] = "dpm_solver"
    num_inference_steps: Positive = 20
    prior_guidance_scale: Annotated[float, Field(ge=1)] = 4.0
    batch_size: Annotated[int, Field(gt=0, description="items a forward pass; short batches are padded to it")] = 256
    num_actors: Positive = 1
    cpus_per_actor: Cpus = 1.0
    device: Device = "cpu"


class DecoderSettings(Settings):
    """The decoder: a Stable Diffusion directory or hub id and its IP-Adapter file."""

    model: ModelName
    ip_adapter: Annotated[str, Field(description="path of the adapter inside `ip_adapter_repo`")] = "ip_adapter/ip-adapter.safetensors"
    ip_adapter_repo: Annotated[ModelName | None, Field(description="hub id or directory; default: the model's own")] = None
    scheduler: Literal["dpm_solver", "ddim"] = "dpm_solver"
    num_inference_steps: Positive = 20
    decoder_guidance_scale: Annotated[float, Field(ge=1, description="1 means a single pass")] = 5.0
    ip_adapter_scale: Annotated[float, Field(ge=0)] = 1.0
    image_size: Annotated[int | None, Field(gt=0, multiple_of=8, description="pixels a side; default: the model's own")] = None
    image_format: Literal["JPEG", "WEBP", "PNG"] = "WEBP"
    image_quality: Annotated[int, Field(ge=1, le=100)] = 90
    thumbnail_size: Positive = 128
    batch_size: Annotated[int, Field(gt=0, description="images decoded together; short batches are padded to it")] = 16
    num_actors: Positive = 1
    cpus_per_actor: Cpus = 1.0
    device: Device = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class GenerateConfig(Settings):
    """`rebeca generate`: prior + decoder + request -> a published snapshot."""

    prior: Location
    decoder: DecoderSettings
    request: Location
    root: Location
    items: Annotated[Location | None, Field(description="real items, for nearest_item_id")] = None
    sampler: SamplerSettings = SamplerSettings()
    num_images: Annotated[int, Field(gt=0, le=MAX_IMAGES, description="images a user, where the request does not say")] = 10
    run_date: Annotated[datetime.date | None, Field(description="default: today, UTC")] = None
    run_id: Annotated[Identifier | None, Field(description="default: the time and six random digits")] = None
    error_budget: Annotated[Share, Field(description="share of items that may fail; above it nothing is published")] = 0.001


def load_config(model: type[C], path: str | Path, overrides: list[str] | None = None) -> C:
    """Read `path` (YAML), apply `key.sub=value` overrides, and check everything.

    Raises UserError naming the key, what was found, and the nearest known key or the expected value.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"config {path}: cannot be read ({error.strerror}); give an existing YAML file to --config") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise UserError(f"config {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"config {path}: found {type(values).__name__} at the top, expected a mapping of settings")
    for override in overrides or []:
        apply_override(values, override)
    return parse_config(model, values, where=str(path))


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
        first = error.errors()[0]
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
        annotation: Any = model.model_fields[parent].annotation
        candidates = [annotation, *typing.get_args(annotation)]
        model = next(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, Settings))
    return model
