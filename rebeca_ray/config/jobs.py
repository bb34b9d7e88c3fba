"""What a job can be told: one frozen, strict model a job, a YAML loader, and `key.sub=value` overrides.

An unknown key is an error that suggests the nearest known one. The sections are in `settings.py`.
"""

import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.fields import (
    MAX_IMAGES,
    Cpus,
    Device,
    Few,
    Identifier,
    LearningRate,
    Location,
    ModelName,
    Positive,
    Ratio,
    Seed,
    Settings,
    Share,
    Size,
)
from rebeca_ray.config.load import C
from rebeca_ray.config.presets import PRESETS
from rebeca_ray.config.sections import (
    DiffusionSettings,
    GateSettings,
    InteractionSettings,
    LayoutSettings,
    LimitSettings,
    NetworkSettings,
    OptimizationSettings,
    PriceSettings,
    RefreshSettings,
    SamplerSettings,
    SelectionSettings,
    WorkerSettings,
)

Resume = Literal["auto", "require", "never"]


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
    catalog: Location
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
