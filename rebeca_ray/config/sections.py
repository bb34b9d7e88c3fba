"""Sections of the jobs' configs: frozen, strict models with a bounded kind for every number.

A `Location` is a local path or the address of an object store. The kinds are in `fields.py`, the decoder's
sections in `decoder.py`.
"""

import datetime
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rebeca_ray.config.fields import (
    Count,
    Cpus,
    Device,
    Duration,
    Effect,
    Fraction,
    FractionBelow1,
    GuidanceWeight,
    HoldOut,
    KeySource,
    LearningRate,
    Location,
    Positive,
    Price,
    Rating,
    Scale,
    Seed,
    Settings,
    Size,
    SmallCount,
)
from rebeca_ray.config.people import ColumnNames


class InteractionSettings(Settings):
    """The rule that turns ratings into likes (paper: a like is a rating of 4 or 5 out of 1 to 5)."""

    path: Annotated[Location, Effect.CONTENT]
    """Parquet or CSV file, or folder of files, of ratings."""
    columns: ColumnNames = ColumnNames()
    """Names of the columns in the files."""
    user_key: Annotated[KeySource | None, Effect.NOTHING] = None
    """Key of the pseudonyms. It is that of the job, which fills it in."""
    max_age_days: Annotated[Positive | None, Effect.ITEM] = None
    """Days after which a rating is ignored, as is one without a time. By default, all ratings count."""
    until: Annotated[datetime.date | None, Effect.NOTHING] = None
    """Date that `max_age_days` counts back from. By default, it is the date of the run, or today in UTC."""
    # YAML has lists alone, so the pair is not strict.
    rating_scale: Annotated[tuple[Rating, Rating], Field(strict=False), Effect.ITEM] = (1.0, 5.0)
    """Lowest and highest possible rating. A rating outside is refused."""
    like_threshold: Annotated[Rating, Effect.ITEM] = 4.0
    """Ratings of at least this are likes, all others dislikes."""
    min_likes: Annotated[Count, Effect.ITEM] = 1
    """Likes that a user needs for training. Users with fewer are left out."""
    hold_out: Annotated[HoldOut, Effect.ITEM] = 0.1
    """Interactions per user that are kept from training, for validation: a fraction, or a whole number."""
    test: Annotated[HoldOut, Effect.ITEM] = 0.0
    """Interactions per user that training and validation never see, for tests: a fraction, or a number."""
    unknown_items: Annotated[Literal["refuse", "drop"], Effect.ITEM] = "refuse"
    """Treatment of ratings whose item has no embedding: `refuse` ends the job, `drop` leaves them out.
    Ratings of unknown generated items are always left out."""

    def for_serving(self, *, hide_hold_out: bool) -> Self:
        """Return the settings that keep every user, and all their ratings unless some are hidden."""
        splits = {} if hide_hold_out else {"hold_out": 0.0, "test": 0.0}
        return self.model_copy(update={"min_likes": 0, **splits})

    def since(self, now: datetime.datetime | None = None) -> datetime.date | None:
        """Return the first date on which ratings count; None if all do."""
        if self.max_age_days is None:
            return None
        last = self.until or (now or datetime.datetime.now(datetime.UTC)).date()
        return last - datetime.timedelta(days=min(self.max_age_days, last.toordinal() - 1))

    def hidden_shares(self, *, hide_hold_out: bool) -> str:
        """Return the hidden shares as text for an item's identity; empty if none is hidden."""
        return f"hidden: {self.hold_out:g} {self.test:g}" if hide_hold_out else ""

    @model_validator(mode="after")
    def check_splits(self) -> Self:
        if self.hold_out < 1 and self.test < 1 and self.hold_out + self.test >= 1:
            raise ValueError(
                f"hold_out {self.hold_out:g} and test {self.test:g} leave nothing for training; "
                "their sum must be below 1"
            )
        return self

    @model_validator(mode="after")
    def check_threshold(self) -> Self:
        low, high = self.rating_scale
        if not low < self.like_threshold <= high:
            raise ValueError(
                f"like_threshold {self.like_threshold:g} is outside rating_scale {low:g} to {high:g}; "
                "change one of them"
            )
        return self


class NetworkSettings(Settings):
    """The prior network and its user encoder. The defaults have the size of the authors' later network."""

    architecture: Annotated[Literal["cross_attention", "paper_v1", "paper_v2"], Effect.ITEM] = (
        "cross_attention"
    )
    """Architecture of the prior: `cross_attention`, or the paper's, bugs included: `paper_v1`, `paper_v2`."""
    num_layers: Annotated[SmallCount, Effect.ITEM] = 6
    """Transformer layers of the prior."""
    num_heads: Annotated[SmallCount, Effect.ITEM] = 8
    """Attention heads per layer. They must divide `width`."""
    width: Annotated[Size, Effect.ITEM] = 128
    """Width of the transformer's hidden states."""
    num_tokens: Annotated[Size, Effect.ITEM] = 32
    """Tokens that represent one embedding. Each holds an equal slice of it."""
    user_encoder: Annotated[Literal["history", "id", "none"], Effect.ITEM] = "history"
    """Encoder of a user: `history` reads the ratings and serves any user, `id` looks up a trained table
    (as published), `none` ignores the user (the paper's NoUE ablation)."""
    num_user_tokens: Annotated[SmallCount, Effect.ITEM] = 1
    """Tokens that represent one user."""
    max_history: Annotated[Size, Effect.ITEM] = 64
    """Latest interactions per user that the encoder `history` reads. Older ones are ignored."""

    @model_validator(mode="after")
    def check_heads(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} is not divisible by num_heads {self.num_heads}; change one of them"
            )
        return self


class DiffusionSettings(Settings):
    """The forward process and the prediction target of the prior."""

    num_train_timesteps: Annotated[Size, Effect.ITEM] = 1000
    """Timesteps of the forward process."""
    schedule: Annotated[Literal["squaredcos_cap_v2", "linear", "laplace"], Effect.ITEM] = "squaredcos_cap_v2"
    """Noise schedule of the forward process."""
    prediction_type: Annotated[Literal["epsilon", "sample", "v_prediction"], Effect.ITEM] = "sample"
    """Prediction target of the network: the noise, the clean embedding, or the velocity."""


class ScalingSettings(Settings):
    """The space of the prior: how embeddings are scaled for the network."""

    normalise: Annotated[bool, Effect.ITEM] = True
    """Whether embeddings are L2-normalised and multiplied by sqrt(D). If not, they are taken as they are."""
    clamp: Annotated[float | None, Field(gt=0, le=1000), Effect.ITEM] = 5.0
    """Bound of an entry before it is scaled. Null means no bound."""
    scale: Annotated[float, Field(gt=0, le=1000), Effect.ITEM] = 1.0
    """Factor after the clamp. At 1, normalised embeddings have the deviation of the noise."""
    clip_sample: Annotated[float | None, Field(gt=0, le=1000), Effect.ITEM] = None
    """Bound of the denoised embedding at every step of sampling. By default, it is `clamp` times `scale`."""


class PriorSampling(Settings):
    """The sampling settings that are chosen after training and saved with the prior."""

    prior_guidance_scale: Annotated[Scale, Effect.ITEM]
    """Classifier-free guidance scale that calibration chose."""
    selector_guidance_scale: Annotated[GuidanceWeight, Effect.ITEM] = 0.0
    """Selector guidance scale that calibration chose."""
    distilled_steps: Annotated[Size | None, Effect.ITEM] = None
    """Sampling steps built into a distilled prior. By default, the prior is not distilled."""


class OptimizationSettings(Settings):
    """One training run: AdamW, early stopping, moving average. Defaults are the authors', where published."""

    learning_rate: Annotated[LearningRate, Effect.ITEM] = 1e-4
    """Learning rate of the network at the start (AdamW)."""
    user_learning_rate: Annotated[LearningRate, Effect.ITEM] = 0.1
    """Learning rate of the user table's rows, for the user encoder `id` only."""
    user_optimizer: Annotated[Literal["adagrad", "adamw"], Effect.ITEM] = "adagrad"
    """Optimizer of the user table's rows, for the user encoder `id` only: `adagrad` by row, which touches the
    users of a batch alone, or `adamw` over the whole table, as published."""
    weight_decay: Annotated[Fraction, Effect.ITEM] = 1e-5
    """Decoupled weight decay of the network (AdamW), and of the user table's rows if they use AdamW."""
    batch_size: Annotated[Size, Effect.ITEM] = 64
    """Samples per optimizer step, over all workers."""
    samples_per_user: Annotated[Positive, Effect.ITEM] = 100
    """Draws per user and epoch."""
    with_replacement: Annotated[bool, Effect.ITEM] = True
    """Whether one interaction may be drawn again in an epoch, so that every user has the same weight. If not,
    users with fewer interactions than `samples_per_user` have less, and there can be one worker only."""
    like_share: Annotated[Fraction | None, Effect.ITEM] = None
    """Fraction of likes among a user's draws. By default, likes and dislikes come as they were rated."""
    steps_per_epoch: Annotated[Positive | None, Effect.ITEM] = None
    """Most optimizer steps per epoch. A validation and a checkpoint end each epoch.
    By default, an epoch ends after all draws."""
    max_epochs: Annotated[Positive, Effect.ITEM] = 100
    """Most epochs of a training run."""
    schedule: Annotated[Literal["plateau", "linear"], Effect.ITEM] = "plateau"
    """Schedule of the learning rates: `plateau` lowers them when validation stalls, `linear` keeps them for
    the first three eighths of `max_epochs`, then lowers them in equal steps to nearly 0."""
    plateau_factor: Annotated[float, Field(gt=0, lt=1), Effect.ITEM] = 0.5
    """Factor by which the schedule `plateau` multiplies the learning rates."""
    plateau_patience: Annotated[Positive, Effect.ITEM] = 4
    """Epochs without a better validation loss that the schedule `plateau` tolerates."""
    early_stopping_patience: Annotated[Positive, Effect.ITEM] = 10
    """Epochs without a better validation loss after which training ends."""
    ema_decay: Annotated[FractionBelow1, Effect.ITEM] = 0.999
    """Decay per step of the weights' exponential moving average, which is saved as the prior. At 0, the
    weights themselves are saved."""
    user_dropout: Annotated[FractionBelow1, Effect.ITEM] = 0.15
    """Probability that training hides the user."""
    rating_dropout: Annotated[FractionBelow1, Effect.ITEM] = 0.15
    """Probability that training hides the rating, independently of the user."""
    joint_dropout: Annotated[FractionBelow1, Effect.ITEM] = 0.0
    """Probability that training hides user and rating together. A prior that never saw both hidden has no
    classifier-free guidance."""
    gradient_clip: Annotated[float | None, Field(gt=0, le=1e6), Effect.ITEM] = 1.0
    """Largest norm of the gradient. Longer gradients are scaled down to it. Null means no limit."""
    seed: Annotated[Seed, Effect.ITEM] = 0
    """Seed of initial weights, draws and noise."""

    @model_validator(mode="after")
    def check_draws(self) -> Self:
        if not self.with_replacement and self.like_share is not None:
            raise ValueError(
                "like_share is set, but draws without replacement take interactions as they come; "
                "leave like_share out, or set with_replacement to true"
            )
        return self

    @property
    def condition_dropout(self) -> float:
        """The probability that training hides both user and rating."""
        return self.joint_dropout + (1 - self.joint_dropout) * self.user_dropout * self.rating_dropout


class WorkerSettings(Settings):
    """The Ray Train workers. They communicate by gloo on `cpu` and by nccl on `cuda`."""

    num_workers: Annotated[SmallCount, Effect.SPEED] = 1
    """Training workers in the cluster. They share each batch."""
    cpus_per_worker: Annotated[Cpus, Effect.SPEED] = 1.0
    """CPUs that each training worker reserves. Leave some of the cluster's CPUs for reading."""
    threads_per_worker: Annotated[SmallCount, Effect.SPEED] = 1
    """Torch threads of each training worker."""
    device: Annotated[Device, Effect.SPEED] = "cpu"
    """Device that trains the prior."""
    max_failures: Annotated[Count, Effect.SPEED] = 2
    """Lost workers that a training run survives. It resumes from the last checkpoint."""


class SamplerSettings(Settings):
    """The sampler of the prior (paper: `ddpm`, 1000 steps). A distilled prior has its sampler built in."""

    name: Annotated[Literal["ddpm", "ddim", "dpm_solver", "unipc"] | None, Effect.ITEM] = None
    """Sampler of the prior. By default, it is `dpm_solver`."""
    num_inference_steps: Annotated[Size | None, Effect.ITEM] = None
    """Denoising steps per candidate. By default, 8 steps are taken."""
    prior_guidance_scale: Annotated[Scale | None, Effect.ITEM] = None
    """Classifier-free guidance scale of the prior. By default, the scale chosen after training is taken."""
    selector_guidance_scale: Annotated[GuidanceWeight | None, Effect.ITEM] = None
    """Strength by which each step moves a candidate to what the selector says the user likes. It costs no
    network pass, and 0 turns it off. By default, the scale chosen after training is taken."""
    variant: Annotated[Literal["slerp", "noise"], Effect.VARIANT] = "slerp"
    """Method that makes an item personal: `slerp` towards a sample of the user, or partial `noise`."""
    batch_size: Annotated[Size, Field(ge=16), Effect.PLAN] = 256
    """Candidates per forward pass. Short batches are padded to this size."""
    num_actors: Annotated[SmallCount, Effect.SPEED] = 1
    """Planning actors in the cluster."""
    cpus_per_actor: Annotated[Cpus, Effect.SPEED] = 1.0
    """CPUs that each planning actor reserves. Leave some of the cluster's CPUs for reading."""
    device: Annotated[Device, Effect.PLAN] = "cpu"
    """Device that samples the prior."""

    def resolve(self, prior: PriorSampling, num_train_timesteps: int) -> Self:
        """Return the settings with defaults filled in. Raises ValueError if the prior cannot follow them."""
        if prior.distilled_steps is not None:
            built_in = {
                "name": "ddim",
                "num_inference_steps": prior.distilled_steps,
                "prior_guidance_scale": 1.0,
            }
            for name in built_in:
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"sampler.{name} is set, but a distilled prior has its steps and guidance built in; "
                        "leave it out"
                    )
            if self.selector_guidance_scale is None:
                built_in["selector_guidance_scale"] = prior.selector_guidance_scale
            return self.model_copy(update=built_in)
        steps = self.num_inference_steps or min(8, num_train_timesteps)
        if steps > num_train_timesteps:
            raise ValueError(
                f"sampler.num_inference_steps is {steps}, it was trained on {num_train_timesteps}; "
                "take at most that many"
            )
        guidance, selector_guidance = self.prior_guidance_scale, self.selector_guidance_scale
        return self.model_copy(
            update={
                "name": self.name or "dpm_solver",
                "num_inference_steps": steps,
                "prior_guidance_scale": guidance or prior.prior_guidance_scale,
                "selector_guidance_scale": (
                    prior.selector_guidance_scale if selector_guidance is None else selector_guidance
                ),
            }
        )


class SelectionSettings(Settings):
    """The choice among a user's candidates before decoding."""

    candidates_per_item: Annotated[SmallCount, Effect.ITEM] = 16
    """Candidates that are sampled per decoded item. At 1, all samples are kept in their order."""
    diversity: Annotated[Fraction, Effect.ITEM] = 0.15
    """Weight of the distance to chosen candidates against the like probability. At 0, liking decides."""
    max_item_similarity: Annotated[float, Field(gt=0, le=1), Effect.ITEM] = 0.98
    """Candidates with a higher cosine similarity to an existing item are copies and are chosen last."""
    share_within: Annotated[float | None, Field(gt=0, le=1), Effect.PLAN] = None
    """Cosine distance below which users of a bucket with the same prompts share an image; null: none do."""


class RefreshSettings(Settings):
    """The choice of users whose items are generated again. All others keep their previous items."""

    rotation: Annotated[FractionBelow1, Effect.PLAN] = 0.0
    """Fraction of unchanged users that each run generates again, in turn. At 0, nobody is."""
    on_new_prior: Annotated[Literal["keep", "rescore", "replace"], Effect.PLAN] = "keep"
    """Treatment of unchanged users after a new prior: `keep` their items, `rescore` or `replace` them."""


class LayoutSettings(Settings):
    """The division of users into buckets, work into shards and images into files."""

    num_buckets: Annotated[int, Field(gt=0, le=65_536), Effect.PLAN] = 1
    """Buckets of users, for about 10,000 users each. The number may change between runs."""
    items_per_shard: Annotated[Positive, Effect.PLAN] = 2_000_000
    """Items per render shard. Shards are rendered by priority and resumed one by one."""
    images_per_file: Annotated[int, Field(gt=0, le=10_000), Effect.SPEED] = 256
    """Images per file. A crash costs each actor at most one file."""


class LimitSettings(Settings):
    """The limits that stop rendering. Unfinished users keep their previous items, and null means no limit."""

    publish_by: Annotated[str | None, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$"), Effect.NOTHING] = None
    """Time of day (UTC) as `"HH:MM"` by which the snapshot is published, next after the run's start."""
    max_gpu_hours: Annotated[Duration | None, Effect.NOTHING] = None
    """Most hours of all decoder actors together. Rendering stops when they are spent."""
    stall_minutes: Annotated[Duration | None, Effect.NOTHING] = 60
    """Minutes without progress after which the job ends with exit code 75, in any step under the lease. The
    permutation test is one step."""
    lease_seconds: Annotated[Duration, Effect.NOTHING] = 60
    """Seconds of silence after which another run may take over the catalog's lease."""


class GateSettings(Settings):
    """The conditions for publishing a snapshot. Fractions are of requested items, and null means no bound."""

    max_p_value: Annotated[float | None, Field(gt=0, le=1), Effect.NOTHING] = 0.01
    """Largest p-value of the permutation test, before rendering. It tests that users like their candidates
    more than those of others."""
    min_users: Annotated[Count | None, Effect.NOTHING] = None
    """Fewest users of a snapshot."""
    min_items: Annotated[Count | None, Effect.NOTHING] = None
    """Fewest items of a snapshot."""
    min_effect: Annotated[float | None, Field(ge=0, le=1), Effect.NOTHING] = None
    """Smallest difference between the like probability of a user's candidates and that of other users'."""
    min_like_probability: Annotated[float | None, Field(ge=0, le=1), Effect.NOTHING] = None
    """Smallest mean like probability of the items, as the selector predicts it."""
    min_diversity: Annotated[float | None, Field(ge=0, le=2), Effect.NOTHING] = None
    """Smallest mean cosine distance between the items of a user."""
    max_failed: Annotated[Fraction | None, Effect.NOTHING] = None
    """Largest fraction of items that failed."""
    max_filtered: Annotated[float | None, Field(ge=0, le=1), Effect.NOTHING] = 0.5
    """Largest fraction of items that the safety policy left out."""
    max_duplicates: Annotated[float | None, Field(ge=0, le=1), Effect.NOTHING] = 0.05
    """Largest fraction of items with the embedding of another item of the same user."""
    max_drop: Annotated[float | None, Field(gt=0, le=1), Effect.NOTHING] = 0.2
    """Largest relative drop of users, items, effect, like probability or diversity since last time."""
    max_rise: Annotated[float | None, Field(gt=0, le=1), Effect.NOTHING] = 0.05
    """Largest absolute rise of the failed, filtered or duplicate fraction since the previous snapshot."""
    min_sample: Annotated[Positive, Effect.NOTHING] = 100
    """Fewest judged items at which their quality can stop a run."""


class PriceSettings(Settings):
    """The prices that an estimate multiplies by, in any currency."""

    gpu_hour: Annotated[Price, Effect.NOTHING] = 0.0
    """Price per hour of a decoder or planning actor on a GPU."""
    cpu_hour: Annotated[Price, Effect.NOTHING] = 0.0
    """Price per hour of a CPU that an actor reserves."""
    gib_month: Annotated[Price, Effect.NOTHING] = 0.0
    """Price per GiB and month of storage."""
    million_requests: Annotated[Price, Effect.NOTHING] = 0.0
    """Price per million writes to the object store."""
