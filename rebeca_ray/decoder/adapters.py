"""Inspect an IP-Adapter by its header: all of its weights must find their place in the UNet."""

from pathlib import Path

from rebeca_ray.decoder.headers import Part, Shapes, read_shapes
from rebeca_ray.decoder.inspection import base_of, cross_attentions, cross_width
from rebeca_ray.errors import InputError

IMAGE_TOKENS = 4  # of a plain IP-Adapter


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
    expected: Shapes = {
        "image_proj.proj.weight": (IMAGE_TOKENS * width, *shapes["image_proj.proj.weight"][1:]),
        "image_proj.proj.bias": (IMAGE_TOKENS * width,),
        "image_proj.norm.weight": (width,),
        "image_proj.norm.bias": (width,),
    }
    for index, attention in enumerate(cross_attentions(unet)):
        hidden = unet.shapes[f"{attention}.to_k.weight"][0]
        expected |= {f"ip_adapter.{2 * index + 1}.to_{key}_ip.weight": (hidden, width) for key in "kv"}
    for key in sorted(expected.keys() | shapes.keys()):
        if shapes.get(key) != expected.get(key):
            raise InputError(
                f"{what}: {key} is {in_words(shapes.get(key))}; "
                f"expected {in_words(expected.get(key))}, as the model's unet reads it; "
                "give a plain adapter of the model's base"
            )


def in_words(shape: tuple[int, ...] | None) -> str:
    """Return a shape as an error shows it."""
    return "no tensor" if shape is None else " x ".join(map(str, shape))
