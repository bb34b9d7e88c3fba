"""The decoder's sections of a config: models, engine, server, safety."""

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from rebeca_ray.config.fields import (
    Cpus,
    Device,
    Few,
    Location,
    ModelName,
    Part,
    Pixels,
    Ratio,
    Scale,
    Settings,
    Size,
    Span,
)


class SafetySettings(Settings):
    """What is not fit to be shown, and what happens to it."""

    checker: Annotated[
        str | None,
        Field(
            description="stable-diffusion: the model's own; or module:function of uint8 images, giving probabilities"
        ),
    ] = None
    max_probability: Annotated[Part, Field(description="of being unsafe; above it an image is")] = 0.5
    policy: Annotated[
        Literal["regenerate", "drop", "flag"],
        Field(description="draw it anew with other noise, leave it out, or mark it safety_flag"),
    ] = "regenerate"
    max_attempts: Annotated[Few, Field(description="of drawing one image; then it is left out")] = 3


class TritonSettings(Settings):
    """The Triton Inference Server of the node that an actor runs on."""

    url: Annotated[str, Field(description="host:port of its gRPC")] = "127.0.0.1:8001"
    window: Annotated[
        Few, Field(description="requests under way at a time, so that the server's next batch is waiting")
    ] = 2
    deadline_seconds: Annotated[Span, Field(description="for one request of batch_size images")] = 120
    ready_seconds: Annotated[
        Span, Field(description="how long a server that starts, or starts again, is waited for")
    ] = 300


class DecoderSettings(Settings):
    """The decoder: a Stable Diffusion directory or hub id and its IP-Adapter file, and what runs it."""

    model: ModelName
    revision: Annotated[str | None, Field(description="commit of a hub model; default: its latest")] = None
    ip_adapter: Annotated[str, Field(description="path of the adapter inside `ip_adapter_repo`")] = (
        "ip_adapter/ip-adapter.safetensors"
    )
    ip_adapter_repo: Annotated[
        ModelName | None, Field(description="hub id or directory; default: the model's own")
    ] = None
    ip_adapter_revision: str | None = None
    vae: Annotated[
        ModelName | None,
        Field(description="another autoencoder, such as madebyollin/taesd; default: the model's own"),
    ] = None
    lora: Annotated[
        ModelName | None, Field(description="merged at load: a path, or owner/name/file.safetensors of a hub")
    ] = None
    backend: Annotated[
        Literal["local", "triton"], Field(description="decode in the actor, or in the server on its node")
    ] = "local"
    triton: TritonSettings = TritonSettings()
    engine: Annotated[Literal["torch", "onnx", "tensorrt"], Field(description="what runs the networks")] = (
        "torch"
    )
    engine_dir: Annotated[
        Location | None, Field(description="what `rebeca export` wrote; for onnx and tensorrt")
    ] = None
    scheduler: Literal["dpm_solver", "ddim", "unipc", "lcm", "tcd"] = "dpm_solver"
    num_inference_steps: Few = 20
    decoder_guidance_scale: Annotated[Scale, Field(description="1 means a single pass")] = 5.0
    ip_adapter_scale: Ratio = 1.0
    image_size: Annotated[
        Pixels | None, Field(multiple_of=8, description="pixels a side; default: the model's own")
    ] = None
    image_format: Literal["JPEG", "WEBP", "PNG"] = "WEBP"
    image_quality: Annotated[int, Field(ge=1, le=100)] = 90
    thumbnail_size: Pixels = 128
    safety: SafetySettings = SafetySettings()
    batch_size: Annotated[
        Size, Field(description="images decoded together; short batches are padded to it")
    ] = 16
    num_actors: Few = 1
    cpus_per_actor: Cpus = 1.0
    device: Device = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: Annotated[
        bool,
        Field(description="the UNet by torch.compile: minutes at start, faster after; engine torch only"),
    ] = False

    @model_validator(mode="after")
    def engines_lie_somewhere(self) -> Self:
        if (self.engine == "torch") != (self.engine_dir is None):
            raise ValueError(
                f"engine {self.engine} with engine_dir {self.engine_dir}; onnx and tensorrt need one, torch has none"
            )
        if self.compile and self.engine != "torch":
            raise ValueError(f"compile is for engine torch, this is {self.engine}")
        if self.engine == "tensorrt" and self.device != "cuda":
            raise ValueError("engine tensorrt needs device cuda")
        return self
