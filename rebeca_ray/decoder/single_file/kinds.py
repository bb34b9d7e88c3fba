"""Recognise the base of a single file by the names of its tensors. Bases that we cannot run are refused."""

from pathlib import Path
from typing import Literal

from rebeca_ray.decoder.headers import Shapes, read_shapes
from rebeca_ray.errors import InputError

UNET = "model.diffusion_model."
# The text encoder of each family, by the start of its tensors.
TEXT_ENCODERS: dict[str, Literal["sd", "sdxl"]] = {
    "cond_stage_model.transformer.": "sd",
    "conditioner.embedders.1.model.": "sdxl",
}
# Models in diffusers' layout with the configs of a family; diffusers takes the same.
CONFIGS = {
    "sd": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
EXPECTED = "expected a single file of Stable Diffusion 1.x or SDXL"
GIVE = "give one, or a diffusers directory of Stable Diffusion 1.x, 2.x or XL"
SIGLIP = "its image adapters read patch tokens of SigLIP"
VELOCITY = "give its diffusers directory, where the scheduler's config tells it"
# Other bases, by the start of a tensor that only they have.
OTHERS = {
    "joint_blocks.": f"is a Stable Diffusion 3: {SIGLIP}, an item has one embedding; {EXPECTED}; {GIVE}",
    "double_blocks.": f"is a FLUX: {SIGLIP}, an item has one embedding; {EXPECTED}; {GIVE}",
    "conditioner.embedders.0.model.": (
        f"is the SDXL refiner, which reads an aesthetics score; {EXPECTED}; give its base model"
    ),
    "edm_mean": f"is a Playground v2.5: its scheduler has no timesteps; {EXPECTED}; {GIVE}",
    "cond_stage_model.model.": (
        "is a Stable Diffusion 2.x, and single files of it do not tell whether they predict noise or "
        f"velocity; {EXPECTED}; {VELOCITY}"
    ),
    "v_pred": f"predicts velocity, and single files are read as models of noise; {EXPECTED}; {VELOCITY}",
}


def kind_of(what: str, checkpoint: Path) -> Literal["sd", "sdxl"]:
    """Return the family of a single file by its header.

    Raises InputError, naming `what`, for damaged files and other models.
    """
    shapes = read_shapes(what, checkpoint)
    names = {name.removeprefix(UNET) for name in shapes} | shapes.keys()
    for start, reason in OTHERS.items():
        if any(name.startswith(start) for name in names):
            raise InputError(f"{what}: {reason}")
    kinds = [kind for start, kind in TEXT_ENCODERS.items() if any(name.startswith(start) for name in names)]
    if len(kinds) != 1 or f"{UNET}input_blocks.0.0.weight" not in shapes:
        raise InputError(
            f"{what}: holds {', '.join(sorted(shapes)[:2]) or 'no tensors'} …, without a UNet ({UNET}*) or "
            f"one text encoder ({' or '.join(f'{start}*' for start in TEXT_ENCODERS)}); {EXPECTED}, in its "
            f"authors' layout; {GIVE}"
        )
    check_inputs(what, shapes)
    return kinds[0]


def check_inputs(what: str, shapes: Shapes) -> None:
    """Raise InputError for a UNet that reads more than latents."""
    inputs = shapes[f"{UNET}input_blocks.0.0.weight"][1:2]
    if inputs != (4,):
        raise InputError(
            f"{what}: its UNet reads {', '.join(map(str, inputs)) or 'no'} channels; expected 4: models for "
            f"inpainting, depth or editing read more; {GIVE}"
        )
