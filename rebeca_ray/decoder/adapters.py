"""Inspect an IP-Adapter by its header: all of its weights must find their place in the UNet."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from rebeca_ray.decoder.headers import Part, Shapes, read_shapes
from rebeca_ray.decoder.inspection import base_of, cross_attentions, cross_width
from rebeca_ray.errors import InputError

IMAGE_TOKENS = 4  # of a plain IP-Adapter
# Other adapters, by the start of a tensor that no earlier one has.
OTHERS = {
    "image_proj.perceiver_resampler.": "is a FaceID plus, which reads a face embedding and patch tokens",
    "image_proj.latents": "is called plus and reads patch tokens",
    "image_proj.proj.3.": "is called full and reads patch tokens",
    "image_proj.proj.0.": "is a FaceID, which reads a face embedding",
    "double_blocks.": "is of FLUX",
}


def read_embed_dim(file: Path) -> int:
    """Return D of an IP-Adapter from its header. Raises InputError for damaged and other adapters."""
    reason = "it is damaged"
    try:
        with safe_open(file, framework="numpy") as weights:
            names = list(weights.keys())
            reasons = [reason for start, reason in OTHERS.items() if any(n.startswith(start) for n in names)]
            reason = f"it {reasons[0]}" if reasons else "it has no such matrix"
            return int(weights.get_slice("image_proj.proj.weight").get_shape()[1])
    except (SafetensorError, IndexError):
        raise InputError(
            f"decoder.ip_adapter {file}: no image_proj.proj.weight to read ({reason}); "
            "expected a projection of one image embedding; give a plain adapter such as "
            "ip-adapter_sd15.safetensors, or ip-adapter_sdxl_vit-h.safetensors for SDXL"
        ) from None


def inspect_ip_adapter(name: str, file: Path, unet: Part) -> None:
    """Raise InputError for an adapter of another base than the UNet, or with weights it would not use."""
    what = f"decoder.ip_adapter {name}"
    shapes, width = read_shapes(what, file), cross_width(unet)
    adapter_width = next(iter(shapes.get("image_proj.norm.weight", ())), 0)
    if adapter_width != width:
        raise InputError(
            f"{what}: makes image tokens of width {adapter_width}{base_of(adapter_width)}, the model reads "
            f"{width}{base_of(width)}; expected the same; give the adapter of the model's base"
        )
    attentions = cross_attentions(unet)
    expected: Shapes = {
        "image_proj.proj.weight": (IMAGE_TOKENS * width, *shapes["image_proj.proj.weight"][1:]),
        "image_proj.proj.bias": (IMAGE_TOKENS * width,),
        "image_proj.norm.weight": (width,),
        "image_proj.norm.bias": (width,),
    }
    for index, attention in enumerate(attentions):
        hidden = unet.shapes[f"{attention}.to_k.weight"][0]
        expected |= {f"ip_adapter.{2 * index + 1}.to_{key}_ip.weight": (hidden, width) for key in "kv"}
    adapted = len([key for key in shapes if key.endswith(".to_k_ip.weight")])
    count = "" if adapted == len(attentions) else f" (it adapts {adapted} attentions of {len(attentions)})"
    for key in sorted(expected.keys() | shapes.keys()):
        if shapes.get(key) != expected.get(key):
            raise InputError(
                f"{what}: {key} is {in_words(shapes.get(key))}; "
                f"expected {in_words(expected.get(key))}, as the model's unet reads it{count}; "
                "give a plain adapter of the model's base"
            )


def in_words(shape: tuple[int, ...] | None) -> str:
    """Return a shape as an error shows it."""
    return "no tensor" if shape is None else " x ".join(map(str, shape))
