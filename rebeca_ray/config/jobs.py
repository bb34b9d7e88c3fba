"""The configs of the jobs: one frozen, strict model per job. `load.py` reads them from YAML."""

import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.fields import (
    MAX_IMAGES,
    Colour,
    Cpus,
    Device,
    Duration,
    Effect,
    FractionBelow1,
    Identifier,
    LearningRate,
    Location,
    ModelName,
    Positive,
    Seed,
    Settings,
    Size,
    SmallCount,
    Weight,
)
from rebeca_ray.config.load import C
from rebeca_ray.config.people import PeopleConfig
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
    ScalingSettings,
    SelectionSettings,
    WorkerSettings,
)
from rebeca_ray.config.telemetry import ReportSettings
from rebeca_ray.log import Level

Resume = Literal["auto", "require", "never"]


class JobConfig(Settings):
    """The base of the configs that `--config` takes."""

    log_level: Annotated[Level | None, Effect.NOTHING] = None
    """Least severe level of the log, unless `--log-level` or `REBECA_LOG_LEVEL` gives one. By default, it
    is `info`."""


class EmbedConfig(JobConfig):
    """`rebeca embed`: items with images -> the same items with `image_embeds`."""

    items: Annotated[Location, Effect.CONTENT]
    """Parquet file or folder of items with images."""
    clip: Annotated[ModelName, Effect.CONTENT]
    """CLIP model that embeds the images, by its open_clip name: `local-dir:…`, `hf-hub:…`, or
    `architecture/pretrained-tag`."""
    out: Annotated[Location, Effect.NOTHING]
    """Folder that receives a new version of the embedded items."""
    background: Annotated[Colour, Effect.ITEM] = "#ffffff"
    """Colour behind transparent images, as a name or as `'#rrggbb'` in quotes. Another colour embeds all
    items again, as another CLIP does."""
    bad_images: Annotated[Literal["refuse", "drop"], Effect.ITEM] = "refuse"
    """Treatment of items whose image cannot be read: `refuse` ends the job, `drop` leaves them out and lists
    them in `bad_images.json` beside the embedded items."""
    batch_size: Annotated[Size, Effect.PLAN] = 256
    """Images per forward pass."""
    num_actors: Annotated[SmallCount, Effect.SPEED] = 1
    """Embedding actors in the cluster."""
    cpus_per_actor: Annotated[Cpus, Effect.SPEED] = 1.0
    """CPUs that each embedding actor reserves. Leave some of the cluster's CPUs for reading."""
    device: Annotated[Device, Effect.PLAN] = "cpu"
    """Device that runs the CLIP model."""
    stall_minutes: Annotated[Duration | None, Effect.NOTHING] = 60
    """Minutes without a finished batch after which the job ends with exit code 75. Null means no limit."""


class TrainConfig(PeopleConfig, JobConfig):
    """`rebeca train`: interactions + embedded items -> a prior."""

    preset: Annotated[Literal["paper-v1", "paper-v2", "stickers"] | None, Effect.ITEM] = None
    """Named starting point of the sections below. By default, they start from their own defaults."""
    interactions: InteractionSettings
    """Ratings to train on."""
    items: Annotated[Location, Effect.CONTENT]
    """Folder of embedded items, written by `rebeca embed`."""
    catalog: Annotated[Location | None, Effect.CONTENT] = None
    """Folder of a catalog whose generated items are rated too. Their embeddings are read there.
    By default, ratings of generated items are left out."""
    out: Annotated[Location, Effect.NOTHING]
    """Folder that receives a new version of the prior."""
    network: NetworkSettings = NetworkSettings()
    """Network of the prior."""
    diffusion: DiffusionSettings = DiffusionSettings()
    """Diffusion process of the prior."""
    scaling: ScalingSettings = ScalingSettings()
    """Space of the prior."""
    optimization: OptimizationSettings = OptimizationSettings()
    """Optimization of the prior."""
    workers: WorkerSettings = WorkerSettings()
    """Training workers in the cluster."""
    storage: Annotated[Location, Field(validate_default=True), Effect.NOTHING] = "runs/train"
    """Folder of checkpoints and histories. A killed run resumes from here."""
    run_name: Annotated[Identifier, Effect.ITEM] = "prior"
    """Prefix of the run's name. A hash of settings and data follows it, so that new data starts a new run."""
    stall_minutes: Annotated[Duration | None, Effect.NOTHING] = 60
    """Minutes without progress, such as a finished step, after which the job ends with exit code 75. The
    calibration is one step. Null means no limit."""
    report: ReportSettings = ReportSettings()
    """Reports at the end of a training."""

    @model_validator(mode="after")
    def check_workers(self) -> Self:
        if not self.optimization.with_replacement and self.workers.num_workers > 1:
            raise ValueError(
                f"workers.num_workers is {self.workers.num_workers}, but without replacement the users of "
                "different workers have different numbers of draws; set num_workers=1, "
                "or optimization.with_replacement=true"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def start_from_the_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(preset, str) or preset not in PRESETS:
            return values
        sections = {name: values.get(name, {}) for name in PRESETS[preset]}
        return {
            **values,
            **{
                name: {**PRESETS[preset][name], **section}
                for name, section in sections.items()
                if isinstance(section, dict)
            },
        }


class DistillConfig(PeopleConfig, JobConfig):
    """`rebeca distill`: a trained prior -> a prior that needs only a few passes per embedding."""

    prior: Annotated[Location, Effect.CONTENT]
    """Folder of the teacher, written by `rebeca train`."""
    out: Annotated[Location, Effect.NOTHING]
    """Folder that receives the student as a new version."""
    interactions: InteractionSettings | None = None
    """Ratings of the users to learn from. A teacher with the user encoder `history` needs them."""
    items: Annotated[Location | None, Effect.CONTENT] = None
    """Folder of embedded items. A teacher with the user encoder `history` needs it."""
    catalog: Annotated[Location | None, Effect.CONTENT] = None
    """Folder of a catalog whose generated items are rated too. Their embeddings are read there.
    By default, ratings of generated items are left out."""
    storage: Annotated[Location, Field(validate_default=True), Effect.NOTHING] = "runs/distill"
    """Folder of histories."""
    num_inference_steps: Annotated[SmallCount, Effect.ITEM] = 4
    """Network passes per embedding of the student."""
    num_users: Annotated[Positive, Effect.ITEM] = 20_000
    """Most users whose trajectories the student learns from."""
    num_trajectories: Annotated[Positive, Field(ge=256), Effect.ITEM] = 20_000
    """Trajectories that the teacher draws."""
    max_epochs: Annotated[Positive, Effect.ITEM] = 10
    """Epochs over all trajectories."""
    batch_size: Annotated[Size, Effect.ITEM] = 512
    """Samples per optimizer step."""
    learning_rate: Annotated[LearningRate, Effect.ITEM] = 5e-4
    """Learning rate of the student at the start."""
    min_quality: Annotated[Weight, Effect.NOTHING] = 0.98
    """Smallest ratio of the student's mean like probability to the teacher's.
    Below it, nothing is published."""
    min_diversity: Annotated[Weight, Effect.NOTHING] = 0.9
    """Smallest ratio of the student's mean distance between samples of a user to the teacher's.
    Below it, nothing is published."""
    device: Annotated[Device, Effect.PLAN] = "cpu"
    """Device that trains the student."""
    seed: Annotated[Seed, Effect.ITEM] = 0
    """Seed of trajectories and training."""


class GenerateConfig(PeopleConfig, JobConfig):
    """`rebeca generate`: prior + decoder + request -> a published snapshot of a catalog."""

    prior: Annotated[Location, Effect.CONTENT]
    """Folder of the prior, written by `rebeca train` or `rebeca distill`."""
    decoder: DecoderSettings
    """Decoder of the embeddings."""
    request: Annotated[Location, Effect.CONTENT]
    """Parquet file or folder of the users to generate for."""
    catalog: Annotated[Location, Effect.NOTHING]
    """Folder of the catalog that receives the snapshot."""
    items: Annotated[Location | None, Effect.CONTENT] = None
    """Folder of embedded real items, for `nearest_item_id`, for variants, and to avoid copies of them.
    A prior with the user encoder `history` needs it."""
    interactions: InteractionSettings | None = None
    """Ratings of the users until now. A prior with the user encoder `history` needs them."""
    hide_hold_out: Annotated[bool, Effect.ITEM] = False
    """Whether generation ignores the ratings of `interactions.hold_out` and `interactions.test`, which must
    be those of the training. Turn it on to judge the items by those ratings, and leave it off at night."""
    sampler: SamplerSettings = SamplerSettings()
    """Sampler of the prior."""
    selection: SelectionSettings = SelectionSettings()
    """Choice among a user's candidates."""
    refresh: RefreshSettings = RefreshSettings()
    """Choice of users whose items are generated again."""
    layout: LayoutSettings = LayoutSettings()
    """Division into buckets, shards and files."""
    limits: LimitSettings = LimitSettings()
    """Limits that stop rendering."""
    gate: GateSettings = GateSettings()
    """Conditions for publishing."""
    prices: PriceSettings = PriceSettings()
    """Prices for `rebeca estimate`."""
    report: ReportSettings = ReportSettings()
    """Reports at the end of an attempt, and of a night."""
    num_images: Annotated[int, Field(gt=0, le=MAX_IMAGES), Effect.PLAN] = 10
    """Images per user, unless the request gives a number."""
    run_date: Annotated[datetime.date | None, Effect.NOTHING] = None
    """Date of the snapshot. By default, it is today in UTC."""
    run_id: Annotated[Identifier | None, Effect.NOTHING] = None
    """Identifier of the run. By default, it is the time and six random digits."""
    error_budget: Annotated[FractionBelow1, Effect.NOTHING] = 0.001
    """Fraction of requested items that may fail. If more fail, nothing is published."""

    def date(self, now: datetime.datetime | None = None) -> datetime.date:
        """Return the date of the snapshot. Without one in the config it is that of `now`, in UTC."""
        return self.run_date or (now or datetime.datetime.now(datetime.UTC)).date()


class SampleConfig(PeopleConfig):
    """`rebeca sample`: prior + users -> embeddings, for a notebook or another decoder."""

    prior: Annotated[Location, Effect.CONTENT]
    """Folder of the prior, written by `rebeca train` or `rebeca distill`."""
    users: Annotated[Location | None, Effect.CONTENT] = None
    """Parquet file or folder of the users, in a column `user_id`, with `item_id` and `strength` for variants
    of real items. By default, it is all users of the prior's table, or all users with ratings."""
    out: Annotated[Location | None, Effect.NOTHING] = None
    """Parquet file that receives the embeddings. It may not exist yet. By default, they stay in memory, for
    `rebeca_ray.sample` in a notebook."""
    items: Annotated[Location | None, Effect.CONTENT] = None
    """Folder of embedded real items, for variants and to avoid copies of them.
    A prior with the user encoder `history` needs it."""
    interactions: InteractionSettings | None = None
    """Ratings of the users until now. A prior with the user encoder `history` needs them."""
    catalog: Annotated[Location | None, Effect.CONTENT] = None
    """Folder of a catalog whose generated items are rated too. Their embeddings are read there.
    By default, ratings of generated items are left out."""
    hide_hold_out: Annotated[bool, Effect.ITEM] = False
    """Whether the ratings of `interactions.hold_out` and `interactions.test` are ignored, which must be those
    of the training. Turn it on to judge the embeddings by those ratings."""
    storage: Annotated[Location, Field(validate_default=True), Effect.NOTHING] = "runs/sample"
    """Folder of histories. The next command with the same ratings reads them from there."""
    sampler: SamplerSettings = SamplerSettings()
    """Sampler of the prior. It runs in one process, whatever the number of actors."""
    selection: SelectionSettings = SelectionSettings()
    """Choice among a user's candidates."""
    num_images: Annotated[int, Field(gt=0, le=MAX_IMAGES), Effect.PLAN] = 10
    """Embeddings per user."""
    seed: Annotated[Seed, Effect.ITEM] = 0
    """Seed of the noise. At 0 it is that of a user's first items in a catalog, at 1 that of the items after
    the first rotation, and so on."""


class NightlyConfig(JobConfig):
    """`rebeca nightly`: embed, train, generate and collect for one date."""

    embed: EmbedConfig | None = None
    """Config of `rebeca embed`. By default, items come embedded."""
    train: TrainConfig | None = None
    """Config of `rebeca train`. By default, the prior comes from elsewhere."""
    generate: GenerateConfig
    """Config of `rebeca generate`."""
    run_date: Annotated[datetime.date | None, Effect.NOTHING] = None
    """Date of the snapshot. By default, it is today in UTC."""
    train_every_days: Annotated[SmallCount, Effect.NOTHING] = 1
    """Age of the prior in days at which it is trained again."""
    catch_up: Annotated[int, Field(ge=0, le=1000), Effect.NOTHING] = 3
    """Most missed dates that are backfilled first."""
    keep_snapshots: Annotated[SmallCount, Effect.NOTHING] = 7
    """Latest snapshots that garbage collection keeps."""
    grace_hours: Annotated[float, Field(ge=0, le=10**5), Effect.NOTHING] = 48
    """Hours that a replaced snapshot stays, so that its readers can finish."""
    keep_training_days: Annotated[Positive | None, Effect.NOTHING] = None
    """Days that histories and checkpoints stay below `train.storage` after their last change. By default,
    they stay for ever."""


def dated(config: C, date: datetime.date) -> C:
    """Return the config with `{run_date}` in its paths filled in, and the date of its ratings."""

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: fill(inner) for name, inner in value.items()}
        return value.replace("{run_date}", date.isoformat()) if isinstance(value, str) else value

    values = fill(config.model_dump())
    ratings = values.get("interactions")
    if ratings and ratings["max_age_days"] is not None and ratings["until"] is None:
        values["interactions"] = {**ratings, "until": date}
    return type(config).model_validate(values)
