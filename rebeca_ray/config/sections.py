"""Sections of the jobs' configs: frozen, strict models, each bounded so that a slip of the keyboard is told at once.

Every `Location` may be local or `s3://`. Every number has a lower and an upper bound: take one of the kinds below.
"""

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from rebeca_ray.config.fields import (
    Count,
    Cpus,
    Device,
    Few,
    LearningRate,
    Location,
    Part,
    Positive,
    Price,
    Rating,
    Scale,
    Seed,
    Settings,
    Share,
    Size,
    Span,
)


class InteractionSettings(Settings):
    """How ratings become likes, and who is kept (paper: like = rating >= 4 of 1 to 5)."""

    path: Location
    rating_scale: Annotated[
        tuple[Rating, Rating],
        Field(
            strict=False, description="the lowest and the highest rating there can be"
        ),  # YAML has lists alone
    ] = (1.0, 5.0)
    like_threshold: Rating = 4.0
    min_likes: Count = 1
    hold_out: Annotated[Share, Field(description="share of each user's interactions kept from training")] = (
        0.1
    )
    unknown_items: Annotated[
        Literal["refuse", "drop"],
        Field(description="ratings of items that are not there; of generated ones they are always dropped"),
    ] = "refuse"

    @model_validator(mode="after")
    def threshold_is_on_the_scale(self) -> Self:
        low, high = self.rating_scale
        if not low < self.like_threshold <= high:
            raise ValueError(
                f"like_threshold {self.like_threshold:g} is outside rating_scale {low:g} to {high:g}; change one of them"
            )
        return self


class NetworkSettings(Settings):
    """The prior network and what it knows a user by; the defaults are the authors' later network, with histories.

    `cross_attention` is that one, `decoder_only` the paper's first. Users are told by `history` (what they rated; serves
    anyone, the production default), by `id` (a table of those it was trained on, as published), or not at all (`none`, the
    paper's NoUE ablation).
    """

    architecture: Literal["cross_attention", "decoder_only"] = "cross_attention"
    num_layers: Few = 6
    num_heads: Few = 8
    width: Size = 128
    num_tokens: Annotated[Size, Field(description="tokens an embedding is cut into")] = 32
    user_encoder: Literal["history", "id", "none"] = "history"
    num_user_tokens: Few = 1
    max_history: Annotated[Size, Field(description="the latest interactions that `history` looks at")] = 64

    @model_validator(mode="after")
    def heads_share_the_width(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} is not divisible by num_heads {self.num_heads}; change one of them"
            )
        return self


class DiffusionSettings(Settings):
    """The forward process and what the network predicts."""

    num_train_timesteps: Size = 1000
    schedule: Literal["squaredcos_cap_v2", "linear", "laplace"] = "squaredcos_cap_v2"
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "sample"


class PriorSampling(Settings):
    """How a trained prior is best sampled, found after training and saved with it."""

    prior_guidance_scale: Scale
    distilled_steps: Annotated[
        Size | None, Field(description="a distilled prior has its steps and its guidance built in")
    ] = None


class OptimizationSettings(Settings):
    """One training run: AdamW, early stopping, exponential moving average. Defaults are the authors' where they told them."""

    learning_rate: LearningRate = 1e-4
    user_learning_rate: Annotated[
        LearningRate, Field(description="of the `id` table's rows (row-wise AdaGrad)")
    ] = 0.1
    weight_decay: Part = 1e-5
    batch_size: Annotated[Size, Field(description="samples a step, over all workers")] = 64
    samples_per_user: Annotated[Positive, Field(description="draws a user an epoch")] = 100
    like_share: Annotated[
        Part | None,
        Field(
            description="share of likes among the draws, since likes are drawn later; default: as they come"
        ),
    ] = None
    steps_per_epoch: Annotated[
        Positive | None,
        Field(description="validate and checkpoint after so many; default: when every user had their draws"),
    ] = None
    max_epochs: Positive = 100
    schedule: Annotated[
        Literal["plateau", "linear"],
        Field(description="of the learning rate: down when validation stalls, or towards 0 at max_epochs"),
    ] = "plateau"
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    plateau_patience: Positive = 4
    early_stopping_patience: Positive = 10
    ema_decay: Share = 0.999
    user_dropout: Share = 0.15
    rating_dropout: Share = 0.15
    gradient_clip: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    seed: Seed = 0


class WorkerSettings(Settings):
    """The Ray Train workers: `cpu` talks gloo, `cuda` talks nccl."""

    num_workers: Few = 1
    cpus_per_worker: Annotated[
        Cpus, Field(description="reserved; leave some of the cluster's for reading")
    ] = 1.0
    threads_per_worker: Few = 1
    device: Device = "cpu"
    max_failures: Count = 2


class SamplerSettings(Settings):
    """How the prior is sampled. The paper's sampler is `ddpm` with 1000 steps. A distilled prior has all three built in."""

    name: Annotated[
        Literal["ddpm", "ddim", "dpm_solver", "unipc"] | None, Field(description="default: dpm_solver")
    ] = None
    num_inference_steps: Annotated[Size | None, Field(description="default: 16")] = None
    prior_guidance_scale: Annotated[
        Scale | None, Field(description="default: what was chosen after training")
    ] = None
    batch_size: Annotated[
        Size, Field(ge=16, description="candidates a forward pass; short batches are padded to it")
    ] = 256
    num_actors: Few = 1
    cpus_per_actor: Cpus = 1.0
    device: Device = "cpu"

    def resolve(self, prior: PriorSampling, num_train_timesteps: int) -> Self:
        """The same with nothing left open. Raises ValueError for what this prior cannot do."""
        if prior.distilled_steps is not None:
            built_in = {
                "name": "ddim",
                "num_inference_steps": prior.distilled_steps,
                "prior_guidance_scale": 1.0,
            }
            told = [name for name in built_in if getattr(self, name) is not None]
            if told:
                raise ValueError(
                    f"sampler.{told[0]} is set, but a distilled prior has its steps and guidance built in; leave it out"
                )
            return self.model_copy(update=built_in)
        steps = self.num_inference_steps or min(16, num_train_timesteps)
        if steps > num_train_timesteps:
            raise ValueError(
                f"sampler.num_inference_steps is {steps}, it was trained on {num_train_timesteps}; take at most that many"
            )
        guidance = self.prior_guidance_scale or prior.prior_guidance_scale
        return self.model_copy(
            update={
                "name": self.name or "dpm_solver",
                "num_inference_steps": steps,
                "prior_guidance_scale": guidance,
            }
        )


class SelectionSettings(Settings):
    """Which of a user's candidates are decoded."""

    candidates_per_item: Annotated[Few, Field(description="1 keeps what is sampled, in its order")] = 4
    diversity: Annotated[
        Part, Field(description="weight of unlikeness to those chosen, against the like probability")
    ] = 0.3
    max_item_similarity: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="nearer to an existing item, by cosine, a candidate is a copy and comes last",
        ),
    ] = 0.98


class GateSettings(Settings):
    """What a snapshot must be like to be published; a null is no bound. Shares are of the items requested."""

    max_p_value: Annotated[
        float | None,
        Field(
            gt=0,
            le=1,
            description="that what is drawn pleases its own users more than others; told before rendering",
        ),
    ] = 0.01
    min_users: Count | None = None
    min_items: Count | None = None
    min_effect: Annotated[
        float | None, Field(ge=0, le=1, description="like probability for own users above that for others")
    ] = None
    min_like_probability: Annotated[
        float | None, Field(ge=0, le=1, description="mean, as the selector sees it")
    ] = None
    min_diversity: Annotated[
        float | None, Field(ge=0, le=2, description="mean cosine distance between a user's items")
    ] = None
    max_failed: Part | None = None
    max_filtered: Annotated[float | None, Field(ge=0, le=1, description="share not fit to be shown")] = 0.5
    max_duplicates: Annotated[
        float | None, Field(ge=0, le=1, description="share with the same embedding as another of its user's")
    ] = 0.05
    max_drop: Annotated[
        float | None,
        Field(
            gt=0,
            le=1,
            description="of users, items, effect, like probability, diversity: share of the last snapshot's",
        ),
    ] = 0.2
    max_rise: Annotated[
        float | None,
        Field(gt=0, le=1, description="of failed, filtered, duplicates: above the last snapshot's"),
    ] = 0.05
    min_sample: Annotated[
        Positive, Field(description="items judged, at least; the qualities of fewer stop nothing")
    ] = 100


class RefreshSettings(Settings):
    """Who is drawn anew tonight; everyone else keeps last night's items."""

    rotation: Annotated[
        Share, Field(description="share of users drawn anew a night though nothing changed, each in turn")
    ] = 0.0
    on_new_prior: Annotated[
        Literal["keep", "rescore", "replace"],
        Field(
            description="of users whose history did not change: keep as they are, judge and rank anew, or draw anew"
        ),
    ] = "keep"


class LayoutSettings(Settings):
    """How a catalog is cut: users into buckets, work into shards, images into files."""

    num_buckets: Annotated[
        int, Field(gt=0, le=65_536, description="some 10,000 users each; may change from night to night")
    ] = 1
    items_per_shard: Annotated[
        Positive, Field(description="items rendered under one marker, the most urgent first")
    ] = 2_000_000
    images_per_file: Annotated[
        int, Field(gt=0, le=10_000, description="what a crash may cost each actor")
    ] = 256


class LimitSettings(Settings):
    """When rendering stops. Who is not finished keeps last night's items; a null is no limit."""

    publish_by: Annotated[
        str | None,
        Field(
            pattern=r"^([01]\d|2[0-3]):[0-5]\d$",
            description='the first such time of day (UTC) after the run began: "HH:MM"',
        ),
    ] = None
    max_gpu_hours: Annotated[Span | None, Field(description="hours of all decoder actors together")] = None
    stall_minutes: Annotated[
        Span | None, Field(description="without any progress; then the job ends with 75")
    ] = 60
    lease_seconds: Annotated[Span, Field(description="after which a silent run is taken to be dead")] = 60


class PriceSettings(Settings):
    """What an estimate multiplies with."""

    gpu_hour: Annotated[Price, Field(description="of a decoder or sampler actor on a GPU")] = 0.0
    cpu_hour: Annotated[Price, Field(description="of a CPU that an actor reserves")] = 0.0
    gib_month: Annotated[Price, Field(description="of storage")] = 0.0
    million_requests: Annotated[Price, Field(description="of writes to the object store")] = 0.0
