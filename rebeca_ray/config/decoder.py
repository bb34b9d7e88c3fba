"""The decoder's sections of a config: models, engine, server, safety, provenance."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from rebeca_ray.config.fields import (
    Cpus,
    Duration,
    Effect,
    Fraction,
    KeySource,
    Location,
    ModelName,
    Pixels,
    Scale,
    Settings,
    Size,
    SmallCount,
    Weight,
)


def web_address(value: str) -> str:
    """Return an address of http or https. Raises ValueError for any other text."""
    if not re.fullmatch(r"https?://[^\s/@]+(/\S*)?", value):
        raise ValueError("is no address; give one such as http://timestamp.example.com")
    return value


WebAddress = Annotated[str, AfterValidator(web_address)]


class SafetySettings(Settings):
    """The check for unsafe images, and the policy for them."""

    checker: Annotated[str | None, Effect.ITEM] = None
    """Safety checker of generated images: `bundled`, `stable-diffusion` for the model's checker,
    `module:function` for a function from uint8 images to probabilities, or `none` for no check. By default,
    the model's checker is taken if the model has one, and the bundled one otherwise."""
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


class C2paSettings(Settings):
    """The signature of C2PA manifests, read only if `provenance` is `c2pa`."""

    certificate: Annotated[KeySource | None, Effect.NOTHING] = None
    """Certificate chain in PEM, with the signing certificate first: a file on every node, or `env:NAME` for
    the text in an environment variable."""
    key: Annotated[KeySource | None, Effect.NOTHING] = None
    """Private key in PEM (PKCS#8, unencrypted): a file on every node, or `env:NAME`."""
    signer: Annotated[str | None, Effect.NOTHING] = None
    """Function that signs instead of `key`, such as a client of a key management service:
    `module:function` maps bytes to their signature."""
    time_stamp_url: Annotated[WebAddress | None, Effect.NOTHING] = None
    """Address of a time-stamp authority (RFC 3161), asked once per image. By default, none is asked."""
    algorithm: Annotated[
        Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"], Effect.NOTHING
    ] = "es256"
    """Algorithm of the signature, the same as that of the key."""


class DecoderSettings(Settings):
    """The decoder: a Stable Diffusion model, its IP-Adapter, and the engine that runs them."""

    model: Annotated[ModelName, Effect.CONTENT]
    """Stable Diffusion model 1.x, 2.x or XL: a directory in diffusers' layout, or a hub id. A model of 1.x or
    XL may be a single file `NAME.safetensors` in its authors' layout. Its configs lie in the folder `NAME`
    beside it. Otherwise, those of its base are fetched from the hub."""
    revision: Annotated[str | None, Effect.CONTENT] = None
    """Commit of a hub model, or of a single file's configs in the hub. By default, the latest commit is
    taken."""
    ip_adapter: Annotated[str, Effect.CONTENT] = "ip_adapter/ip-adapter.safetensors"
    """Path of the adapter file inside `ip_adapter_repo`."""
    ip_adapter_repo: Annotated[ModelName | None, Effect.CONTENT] = None
    """Hub id or directory of the adapter. By default, the adapter lies in `model`, or in the folder `NAME`
    beside a single file."""
    ip_adapter_revision: Annotated[str | None, Effect.CONTENT] = None
    """Commit of a hub adapter. By default, the latest commit is taken."""
    vae: Annotated[ModelName | None, Effect.CONTENT] = None
    """Replacement for the model's autoencoder, such as `madebyollin/taesd`, or
    `madebyollin/sdxl-vae-fp16-fix` for SDXL. By default, the model's autoencoder is taken."""
    lora: Annotated[ModelName | None, Effect.CONTENT] = None
    """LoRA weights that are merged into the UNet and the text encoders at load: a path, or
    `owner/name/file.safetensors` of a hub. By default, none are merged."""
    backend: Annotated[Literal["local", "triton"], Effect.CLIENT] = "local"
    """Process that decodes: `local` is the render actor, `triton` the server on its node."""
    triton: TritonSettings = TritonSettings()
    """Connection to the Triton server, read only if `backend` is `triton`."""
    engine: Annotated[Literal["torch", "onnx", "openvino", "tensorrt"], Effect.PLAN] = "torch"
    """Engine that runs the networks: `torch`, or an exported model by `onnx`, `openvino` or `tensorrt`."""
    engine_dir: Annotated[Location | None, Effect.CONTENT] = None
    """Folder that `rebeca export` wrote. Every engine but `torch` needs it."""
    scheduler: Annotated[Literal["dpm_solver", "ddim", "unipc", "lcm", "tcd"], Effect.ITEM] = "dpm_solver"
    """Sampler of the decoder. `lcm` and `tcd` are for few-step adapters."""
    num_inference_steps: Annotated[SmallCount, Effect.ITEM] = 20
    """Denoising steps per image. More steps are slower and more exact."""
    decoder_guidance_scale: Annotated[Scale, Effect.ITEM] = 5.0
    """Classifier-free guidance scale of the decoder. At 1, each step needs a single pass."""
    guidance_interval: Annotated[tuple[Fraction, Fraction], Field(strict=False), Effect.ITEM] = (0.0, 1.0)
    """Start and stop of the decoder's guidance, as shares of the steps. Steps outside need a single pass."""
    cache_interval: Annotated[SmallCount, Effect.ITEM] = 1
    """Steps from one whole pass of the UNet to the next. The steps between run its outer blocks alone
    (DeepCache). The engines `onnx` and `tensorrt` need an export with a value above 1. At 1, all passes are
    whole."""
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
    provenance: Annotated[Literal["none", "xmp", "c2pa"], Effect.PLAN] = "xmp"
    """Mark that a machine made the image: `none`, `xmp` states it in the metadata, and `c2pa` also signs the
    image. The pixels and ids of items stay the same, and carried images keep the mark they have."""
    c2pa: C2paSettings = C2paSettings()
    """Certificate and key of the signatures."""
    safety: SafetySettings = SafetySettings()
    """Check for unsafe images."""
    batch_size: Annotated[Size, Effect.PLAN] = 16
    """Images that are decoded together. Short batches are padded to this size."""
    num_actors: Annotated[SmallCount, Effect.SPEED] = 1
    """Render actors in the cluster."""
    cpus_per_actor: Annotated[Cpus, Effect.SPEED] = 1.0
    """CPUs that each render actor reserves. Leave some of the cluster's CPUs for reading."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Effect.PLAN] = "cpu"
    """Device that runs the networks. `auto` takes a GPU where there is one."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16", "int8"], Effect.ITEM] = "float32"
    """Number format of weights and activations. `auto` takes the fastest one that the machine computes, once
    for a run: float16 on a GPU, bfloat16 on a processor that has it, or that of the export. `int8` needs an
    export made with `--int8`."""
    compile: Annotated[bool, Effect.PLAN] = False
    """Compilation of the UNet by `torch.compile`, for the engine `torch` with whole passes only.
    It adds minutes at start and speeds up each step."""

    @model_validator(mode="after")
    def check_engine(self) -> Self:
        if (self.engine == "torch") != (self.engine_dir is None):
            raise ValueError(
                f"engine {self.engine} with engine_dir {self.engine_dir}; torch takes no folder, "
                "every other engine needs one"
            )
        start, stop = self.guidance_interval
        if start > stop:
            raise ValueError(f"guidance_interval starts at {start:g} and stops at {stop:g}; swap them")
        # The CUDA graph of a compiled UNet may overwrite an output that a later step still needs.
        if self.cache_interval > 1 and self.compile:
            raise ValueError(
                f"cache_interval {self.cache_interval} with compile; a compiled UNet has whole passes alone; "
                "set cache_interval to 1, or compile to false"
            )
        if self.compile and self.engine != "torch":
            raise ValueError(f"compile is for engine torch, this is {self.engine}")
        if self.engine == "tensorrt" and self.device != "cuda":
            raise ValueError("engine tensorrt needs device cuda")
        if self.engine == "openvino" and (self.device == "cuda" or self.dtype == "float16"):
            raise ValueError(
                f"engine openvino runs on the cpu in float32, bfloat16 or int8, this is {self.device} and "
                f"{self.dtype}; set device=cpu and dtype=auto"
            )
        if self.dtype == "int8" and self.engine not in ("onnx", "openvino"):
            raise ValueError(f"dtype int8 is for the engines onnx and openvino, this is {self.engine}")
        if self.backend == "triton" and "auto" in (self.device, self.dtype):
            raise ValueError(
                "device and dtype cannot be auto with backend triton, whose server has chosen; "
                "set those that `rebeca serve` prints"
            )
        return self

    @model_validator(mode="after")
    def check_provenance(self) -> Self:
        if self.provenance == "c2pa":
            if self.c2pa.certificate is None:
                raise ValueError("provenance c2pa needs c2pa.certificate; set it")
            if (self.c2pa.key is None) == (self.c2pa.signer is None):
                raise ValueError("provenance c2pa needs one of c2pa.key and c2pa.signer; set exactly one")
        return self
