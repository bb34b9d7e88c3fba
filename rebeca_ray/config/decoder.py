"""The decoder's sections of a config: models, engine, server, safety."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rebeca_ray.config.fields import (
    Cpus,
    Device,
    Duration,
    Effect,
    Fraction,
    Location,
    ModelName,
    Pixels,
    Scale,
    Settings,
    Size,
    SmallCount,
    Weight,
)


class SafetySettings(Settings):
    """The check for unsafe images, and the policy for them."""

    checker: Annotated[str | None, Effect.ITEM] = None
    """Safety checker of generated images: `stable-diffusion` takes the model's checker, and
    `module:function` maps uint8 images to probabilities. By default, no image is checked."""
    max_probability: Annotated[Fraction, Effect.ITEM] = 0.5
    """Images whose unsafe probability exceeds this are treated as unsafe."""
    policy: Annotated[Literal["regenerate", "drop", "flag"], Effect.ITEM] = "regenerate"
    """Treatment of unsafe images: `regenerate` draws with other noise, `drop` leaves the image out,
    `flag` keeps it and sets `safety_flag`."""
    max_attempts: Annotated[SmallCount, Effect.ITEM] = 3
    """Attempts per image under the policy `regenerate`. An image that stays unsafe is left out."""


class TritonSettings(Settings):
    """The Triton Inference Server on the node of an actor."""

    url: Annotated[str, Effect.SPEED] = "127.0.0.1:8001"
    """Address of the server's gRPC port, as `host:port`."""
    window: Annotated[SmallCount, Effect.SPEED] = 2
    """Concurrent requests per actor. With two or more, the server's next batch is always waiting."""
    deadline_seconds: Annotated[Duration, Effect.SPEED] = 120
    """Seconds that one request of a full batch may take."""
    ready_seconds: Annotated[Duration, Effect.SPEED] = 300
    """Seconds that an actor waits for a server that starts or restarts."""


class DecoderSettings(Settings):
    """The decoder: a Stable Diffusion model, its IP-Adapter, and the engine that runs them."""

    model: Annotated[ModelName, Effect.CONTENT]
    """Stable Diffusion model: a directory in diffusers' layout, or a hub id."""
    revision: Annotated[str | None, Effect.CONTENT] = None
    """Commit of a hub model. By default, the latest commit is taken."""
    ip_adapter: Annotated[str, Effect.CONTENT] = "ip_adapter/ip-adapter.safetensors"
    """Path of the adapter file inside `ip_adapter_repo`."""
    ip_adapter_repo: Annotated[ModelName | None, Effect.CONTENT] = None
    """Hub id or directory of the adapter. By default, the adapter lies in `model`."""
    ip_adapter_revision: Annotated[str | None, Effect.CONTENT] = None
    """Commit of a hub adapter. By default, the latest commit is taken."""
    vae: Annotated[ModelName | None, Effect.CONTENT] = None
    """Replacement for the model's autoencoder, such as `madebyollin/taesd`.
    By default, the model's autoencoder is taken."""
    lora: Annotated[ModelName | None, Effect.CONTENT] = None
    """LoRA weights that are merged into the UNet and the text encoder at load: a path, or
    `owner/name/file.safetensors` of a hub. By default, none are merged."""
    backend: Annotated[Literal["local", "triton"], Effect.CLIENT] = "local"
    """Process that decodes: `local` is the render actor, `triton` the server on its node."""
    triton: TritonSettings = TritonSettings()
    """Connection to the Triton server, read only if `backend` is `triton`."""
    engine: Annotated[Literal["torch", "onnx", "tensorrt"], Effect.PLAN] = "torch"
    """Engine that runs the networks: `torch`, or an exported model in `onnx` or `tensorrt`."""
    engine_dir: Annotated[Location | None, Effect.CONTENT] = None
    """Folder that `rebeca export` wrote. The engines `onnx` and `tensorrt` need it."""
    scheduler: Annotated[Literal["dpm_solver", "ddim", "unipc", "lcm", "tcd"], Effect.ITEM] = "dpm_solver"
    """Sampler of the decoder. `lcm` and `tcd` are for few-step adapters."""
    num_inference_steps: Annotated[SmallCount, Effect.ITEM] = 20
    """Denoising steps per image. More steps are slower and more exact."""
    decoder_guidance_scale: Annotated[Scale, Effect.ITEM] = 5.0
    """Classifier-free guidance scale of the decoder. At 1, each step needs a single pass."""
    guidance_interval: Annotated[tuple[Fraction, Fraction], Field(strict=False), Effect.ITEM] = (0.0, 1.0)
    """Start and stop of the decoder's guidance, as shares of the steps. Steps outside need a single pass."""
    ip_adapter_scale: Annotated[Weight, Effect.ITEM] = 1.0
    """Weight of the embedding beside the text prompt. At 0, the text alone decides."""
    image_size: Annotated[Pixels | None, Field(multiple_of=8), Effect.ITEM] = None
    """Image width and height in pixels. By default, the model's size is taken."""
    image_format: Annotated[Literal["JPEG", "WEBP", "PNG"], Effect.ITEM] = "WEBP"
    """File format of the images."""
    image_quality: Annotated[int, Field(ge=1, le=100), Effect.ITEM] = 90
    """Quality of JPEG and WebP images, from 1 (small file) to 100 (best)."""
    thumbnail_size: Annotated[Pixels, Effect.PLAN] = 128
    """Thumbnail width and height in pixels."""
    safety: SafetySettings = SafetySettings()
    """Check for unsafe images."""
    batch_size: Annotated[Size, Effect.PLAN] = 16
    """Images that are decoded together. Short batches are padded to this size."""
    num_actors: Annotated[SmallCount, Effect.SPEED] = 1
    """Render actors in the cluster."""
    cpus_per_actor: Annotated[Cpus, Effect.SPEED] = 1.0
    """CPUs that each render actor reserves. Leave some of the cluster's CPUs for reading."""
    device: Annotated[Device, Effect.PLAN] = "cpu"
    """Device that runs the networks."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], Effect.ITEM] = "float32"
    """Number format of weights and activations."""
    compile: Annotated[bool, Effect.PLAN] = False
    """Compilation of the UNet by `torch.compile`, for the engine `torch` only.
    It adds minutes at start and speeds up each step."""

    @model_validator(mode="after")
    def check_engine(self) -> Self:
        if (self.engine == "torch") != (self.engine_dir is None):
            raise ValueError(
                f"engine {self.engine} with engine_dir {self.engine_dir}; onnx and tensorrt need a folder, "
                "torch takes none"
            )
        start, stop = self.guidance_interval
        if start > stop:
            raise ValueError(f"guidance_interval starts at {start:g} and stops at {stop:g}; swap them")
        if self.compile and self.engine != "torch":
            raise ValueError(f"compile is for engine torch, this is {self.engine}")
        if self.engine == "tensorrt" and self.device != "cuda":
            raise ValueError("engine tensorrt needs device cuda")
        return self
