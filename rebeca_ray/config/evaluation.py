"""The config of `rebeca evaluate`: a catalog, the ratings that judge it, and the verifier."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.fields import (
    Device,
    Effect,
    Fraction,
    Location,
    ModelName,
    Positive,
    Scale,
    Seed,
    Settings,
    Size,
)
from rebeca_ray.config.jobs import JobConfig
from rebeca_ray.config.people import PeopleConfig
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.config.verifier import VerifierSettings

Prompt = Annotated[str, Field(min_length=1, max_length=1000)]
FigureBound = Annotated[str, Field(pattern=r"^\S.* [<>]= [-+.\deE]+$", max_length=200)]

MIN_USERS = 20  # of a permutation test
Method = Literal[
    "empty_prompt",
    "p1",
    "p2",
    "persona",
    "lora_shared",
    "lora_per_user",
    "fabric",
    "rebeca_p1",
    "rebeca_p2",
    "no_user",
    "mean_of_likes",
    "nearest_to_mean",
    "retrieval",
    "best_by_verifier",
    "most_popular",
    "random",
]


SUITES: dict[str, dict[str, list[str] | list[int]]] = {
    "paper": {
        "methods": ["empty_prompt", "p1", "p2", "rebeca_p1", "rebeca_p2", "nearest_to_mean", "retrieval"],
        "prior_guidance_tried": [3, 6, 9, 12, 15],
        "decoder_guidance_tried": [1, 3, 5, 7, 10],
    },
    "pipbench": {"methods": ["p1", "mean_of_likes", "nearest_to_mean", "retrieval", "random"]},
}


IMAGE_METHODS = frozenset({"lora_shared", "lora_per_user", "fabric"})  # they see images of real items


class LoraSettings(Settings):
    """The training of the LoRAs of `lora_shared` and `lora_per_user`."""

    steps: Annotated[Positive, Effect.ITEM] = 300
    """Training steps of each LoRA."""
    batch_size: Annotated[Size, Effect.ITEM] = 8
    """Images of a step."""
    learning_rate: Annotated[Fraction, Effect.ITEM] = 5e-4
    """Learning rate of AdamW. 1e-4 is usual for Stable Diffusion."""
    seed: Annotated[Seed, Effect.ITEM] = 0
    """Seed of weights, images and noise."""


class TrackingSettings(Settings):
    """The experiment tracker of an evaluation."""

    tracker: Annotated[Literal["mlflow", "wandb", "trackio"], Effect.NOTHING]
    """Tracker. It finds its server and its key in its usual environment variables."""
    project: Annotated[str, Field(min_length=1, max_length=200), Effect.NOTHING] = "rebeca-ray"
    """Project, or experiment in MLflow."""
    run: Annotated[str | None, Field(min_length=1, max_length=200), Effect.NOTHING] = None
    """Name of the run. By default, the tracker makes one up."""


class EvaluateConfig(PeopleConfig, JobConfig):
    """`rebeca evaluate`: one catalog, or two -> figures per user, metrics, plots and a report."""

    suite: Annotated[Literal["paper", "pipbench"] | None, Effect.ITEM] = None
    """Methods and guidance scales to start from, as in the paper, or those for the measure of
    PIPBench. The config's settings override them."""
    catalog: Annotated[Location, Effect.CONTENT]
    """Folder of the catalog to evaluate."""
    other: Annotated[Location | None, Effect.CONTENT] = None
    """Folder of a second catalog to compare with, user by user. By default, there is none."""
    items: Annotated[Location, Effect.CONTENT]
    """Folder of embedded real items, written by `rebeca embed`."""
    images: Annotated[Location | None, Effect.CONTENT] = None
    """Parquet file or folder of the real items with their images, for the report and for all figures and
    methods that see images. By default, the report shows generated images alone."""
    interactions: InteractionSettings
    """Ratings, with the `hold_out` and `test` of the training. The verifier reads these two parts alone."""
    training_seed: Annotated[Seed, Effect.ITEM] = 0
    """Value of `optimization.seed` in the training."""
    verifier_seed: Annotated[Seed, Effect.ITEM] = 42
    """Seed of a verifier that reads ratings. It must differ from those of the training's selectors, which
    start at `training_seed`. So must `verifier.seed`."""
    clip: Annotated[ModelName | None, Effect.CONTENT] = None
    """CLIP model that embedded the items, to embed generated images again. By default, only the planned
    embeddings are judged. `methods` needs it."""
    encoders: Annotated[tuple[ModelName, ...], Field(strict=False), Effect.CONTENT] = ()
    """Image encoders beside `clip`, each a feature space with a verifier of its own: `efficientnet-lite0`,
    `timm:MODEL` (`timm:vit_small_patch14_dinov2.lvd142m` is DINOv2), `inception` for FID, or a CLIP, such as
    `ViT-L-14-336/openai` for CMMD. They need `images`."""
    lpips: Annotated[Literal["alex", "squeeze", "vgg"] | None, Effect.ITEM] = None
    """Network of LPIPS, the distance to later likes as the eye sees it. It needs `images`, and torchvision's
    weights. By default, it is not measured."""
    caption_model: Annotated[ModelName | None, Effect.CONTENT] = None
    """Image-to-text model of transformers, for topic precision. It captions generated images, and real ones
    unless there are `captions`. By default, topics are not judged."""
    captions: Annotated[Location | None, Effect.CONTENT] = None
    """Parquet file or folder with the columns `item_id` and `caption` of the real items. By default,
    `caption_model` captions `images`."""
    content_prompt: Annotated[Prompt | None, Effect.ITEM] = None
    """Prompt to a chat model for the content of an image. By default, the caption model is no chat model, and
    writes one caption for everything."""
    style_prompt: Annotated[Prompt | None, Effect.ITEM] = None
    """Prompt to a chat model for the style of an image. By default, styles have no topics."""
    sentence_model: Annotated[ModelName | None, Effect.CONTENT] = None
    """Model of sentence-transformers that embeds captions. By default, their words are counted."""
    num_topics: Annotated[int, Field(ge=2, le=10_000), Effect.ITEM] = 100
    """Number of topics. If there are at most as many different captions, each is a topic."""
    methods: Annotated[tuple[Method, ...], Field(strict=False), Effect.ITEM] = ()
    """Methods to compare the catalog with: for the same users, as many items, by the same decoder. The
    documentation says how each makes them."""
    prior_guidance_tried: Annotated[tuple[Scale, ...], Field(strict=False), Effect.ITEM] = ()
    """Prior guidance scales of the guidance figure, each with each scale of `decoder_guidance_tried`."""
    decoder_guidance_tried: Annotated[tuple[Scale, ...], Field(strict=False), Effect.ITEM] = ()
    """Decoder guidance scales of the guidance figure. It needs `prior`, `decoder` and `clip`."""
    guidance_users: Annotated[Positive, Field(ge=MIN_USERS), Effect.PLAN] = 50
    """Most users of the guidance figure. More are thinned out evenly."""
    prior: Annotated[Location | None, Effect.CONTENT] = None
    """Folder of the catalog's prior. `methods` needs it."""
    without_users: Annotated[Location | None, Effect.CONTENT] = None
    """Folder of a prior that was trained with the user encoder `none`. The method `no_user` needs it."""
    decoder: DecoderSettings | None = None
    """Decoder of the catalog. `methods` needs it."""
    lora: LoraSettings = LoraSettings()
    """Training of the methods with a LoRA."""
    verifier: VerifierSettings | None = None
    """Verifier in one of the paper's forms, and its training. It fits numbers to each user, which takes
    dozens of ratings per user. By default, the verifier reads a user's ratings, and needs few of them."""
    num_factors_tried: Annotated[
        tuple[Annotated[int, Field(ge=0, le=65_536)], ...], Field(strict=False, min_length=1), Effect.ITEM
    ] = (
        0,
        20,
        80,
    )
    """Dimensions of a taste that validation chooses from. They replace `verifier.num_factors`."""
    weight_decay_tried: Annotated[tuple[Fraction, ...], Field(strict=False, min_length=1), Effect.ITEM] = (
        1e-4,
        1e-3,
        1e-2,
    )
    """Regularisations that validation chooses from. They replace `verifier.weight_decay`."""
    device: Annotated[Device, Effect.PLAN] = "cpu"
    """Device of the models that see images: CLIP, encoders, captioner, LPIPS."""
    num_users: Annotated[Positive, Field(ge=MIN_USERS), Effect.PLAN] = 1000
    """Most users that are judged. More are thinned out evenly."""
    max_item_similarity: Annotated[float, Field(gt=0, le=1), Effect.NOTHING] = 0.98
    """Generated items with a higher cosine similarity to a real item count as near-copies."""
    bounds: Annotated[tuple[FigureBound, ...], Field(strict=False), Effect.NOTHING] = ()
    """Bounds of figures, such as `catalog/clip/like_probability/mean >= 0.3`, with `>=` or `<=`. The command
    ends with code 4 if a figure lies outside, after it has written the report."""
    tracking: TrackingSettings | None = None
    """Experiment tracker that receives the figures. By default, there is none."""
    out: Annotated[Location, Effect.NOTHING]
    """Folder that receives `metrics.json`, `users.parquet`, `report.html` and the plots."""
    seed: Annotated[Seed, Effect.ITEM] = 1000
    """Seed of permutations, bootstrap samples, equal counts, topics, and samples of methods."""

    @model_validator(mode="before")
    @classmethod
    def start_from_the_suite(cls, values: Any) -> Any:
        suite = values.get("suite") if isinstance(values, dict) else None
        return {**SUITES[suite], **values} if isinstance(suite, str) and suite in SUITES else values

    @model_validator(mode="after")
    def check_needs(self) -> Self:
        if (self.encoders or self.lpips) and self.images is None:
            raise ValueError("encoders and lpips need `images`, the real items with their images; set it")
        if self.caption_model and self.captions is None and self.images is None:
            raise ValueError("caption_model needs `captions` or `images` of the real items; set one")
        prompts = self.content_prompt or self.style_prompt
        if self.captions and (self.caption_model is None or prompts):
            raise ValueError(
                "captions need a `caption_model` for generated images, and no prompts to it; set it"
            )
        if prompts and self.caption_model is None:
            raise ValueError("content_prompt and style_prompt need `caption_model`, a chat model; set it")
        if bool(self.prior_guidance_tried) != bool(self.decoder_guidance_tried):
            raise ValueError(
                "the guidance figure needs prior_guidance_tried and decoder_guidance_tried; set both, or none"
            )
        if (self.methods or self.prior_guidance_tried) and None in (self.prior, self.decoder, self.clip):
            raise ValueError(
                "methods and the guidance figure need `prior`, `decoder` and `clip` of the catalog; "
                "set all three"
            )
        if IMAGE_METHODS & set(self.methods) and self.images is None:
            raise ValueError(
                f"the methods {', '.join(sorted(IMAGE_METHODS & set(self.methods)))} need `images`, the real "
                "items with their images; set it, or leave them out"
            )
        if "no_user" in self.methods and self.without_users is None:
            raise ValueError(
                "the method no_user needs `without_users`, a prior of network.user_encoder=none; "
                "set it, or leave the method out"
            )
        return self
