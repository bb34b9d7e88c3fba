"""The network of the bundled safety checker: MobileNetV2 as Keras computes it, in torch alone.

    images [B, Y, X, 3] uint8 -> [0, 1] -> 224 x 224 -> MobileNetV2 -> three dense layers -> five classes

Letters of the shapes: B images, Y and X pixels, K classes.

A batch normalisation follows each convolution. Both are linear, so they are merged at load. Keras pads a
convolution of stride 2 at the bottom and on the right alone.
"""

import json

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from rebeca_ray.decoder.safety_model import CONFIG, WEIGHTS

# The depth-wise stride of each block after the first; a block of equal widths has a shortcut.
STRIDES = (2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
DENSE = ("dense_1", "dense_2", "dense_3")
# Images at a time. The batch is fixed, so that the bits of a row do not depend on others. For one image in
# one thread, torch takes a slow convolution. On a CPU, more than two are no faster.
TILE_CPU, TILE_GPU = 2, 16


class BundledChecker:
    """Return the probability that an image is unsafe: the sum of the classes Hentai, Porn and Sexy.

    Sexy counts, because the authors of nsfwjs describe the class as "sexually explicit images, not
    pornography", and a recommendation goes to people who did not ask for such images.
    """

    def __init__(self, device: str) -> None:
        config = json.loads(CONFIG.read_text())
        self.image_size: int = config["image_size"]
        self.unsafe = [config["classes"].index(name) for name in config["unsafe_classes"]]
        self.device = device
        self.tile = TILE_CPU if device == "cpu" else TILE_GPU
        self.network = load_network().to(device)
        # A third faster on a CPU.
        self.network.to(memory_format=torch.channels_last)

    def __call__(self, images_BYX3: np.ndarray) -> np.ndarray:
        return self.classify(images_BYX3)[:, self.unsafe].sum(1).clip(0, 1)

    @torch.inference_mode()
    def classify(self, images_BYX3: np.ndarray) -> np.ndarray:
        """Return the probability [B, K] of each class."""
        # The layers are small: with more threads than free cores, threads would wait for each other.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self.classify_tiles(images_BYX3)
        finally:
            torch.set_num_threads(threads)

    def classify_tiles(self, images_BYX3: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(images_BYX3), self.tile):
            images = images_BYX3[start : start + self.tile]
            count = len(images)
            padded = np.concatenate([images, np.repeat(images[:1], self.tile - count, axis=0)])
            pixels = torch.from_numpy(padded).to(self.device).permute(0, 3, 1, 2).float() / 255
            parts.append(self.network(resize(pixels, self.image_size))[:count].cpu().numpy())
        return np.concatenate(parts)


def resize(pixels_B3YX: Tensor, size: int) -> Tensor:
    """Return square images. Interpolation is bilinear between the centres of the corners, as in nsfwjs."""
    if pixels_B3YX.shape[2:] == (size, size):
        return pixels_B3YX
    return F.interpolate(pixels_B3YX, (size, size), mode="bilinear", align_corners=True)


class Network(nn.Module):
    """MobileNetV2 of width 1 with three dense layers; a stem, then blocks `expand, depthwise, project`."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the probabilities [B, K] of images [B, 3, Y, X] in [0, 1]."""
        x = relu6(self.layers["Conv1"](pad_after(x)))
        x = self.layers["expanded_conv_project"](relu6(self.layers["expanded_conv_depthwise"](x)))
        for number, stride in enumerate(STRIDES, start=1):
            name = f"block_{number}"
            inner = relu6(self.layers[f"{name}_expand"](x))
            inner = relu6(self.layers[f"{name}_depthwise"](pad_after(inner) if stride == 2 else inner))
            inner = self.layers[f"{name}_project"](inner)
            x = x + inner if inner.shape == x.shape else inner
        x = relu6(self.layers["Conv_1"](x)).mean(dim=(2, 3))
        for name in DENSE[:-1]:
            x = self.layers[name](x).relu()
        return self.layers[DENSE[-1]](x).softmax(dim=1)


def relu6(x: Tensor) -> Tensor:
    return F.relu6(x, inplace=True)


def pad_after(x: Tensor) -> Tensor:
    """Return images with a row of zeros below and a column of zeros on the right."""
    return F.pad(x, (0, 1, 0, 1))


def load_network() -> Network:
    """Return the network with its bundled weights, on the CPU."""
    weights, epsilon = load_weights(), json.loads(CONFIG.read_text())["batch_norm_epsilon"]
    names = ["Conv1", "expanded_conv_depthwise", "expanded_conv_project"]
    for number in range(1, len(STRIDES) + 1):
        names += [f"block_{number}_{part}" for part in ("expand", "depthwise", "project")]
    strides = {"Conv1": 2} | {f"block_{number}_depthwise": s for number, s in enumerate(STRIDES, start=1)}
    layers: dict[str, nn.Module] = {
        name: convolution(weights, name, strides.get(name, 1), epsilon) for name in [*names, "Conv_1"]
    }
    for name in DENSE:
        kernel, bias = weights[f"{name}/kernel"], weights[f"{name}/bias"]
        dense = nn.Linear(*kernel.shape)
        dense.weight.data, dense.bias.data = kernel.T.float().contiguous(), bias.float()
        layers[name] = dense
    return Network(layers).eval().requires_grad_(False)


def load_weights() -> dict[str, Tensor]:
    """Return the weights by their names in Keras, in float64, after rounding to float32 as in nsfwjs."""
    stored = load_file(WEIGHTS)
    ranges = stored.pop("quantization")
    return {
        name: (stored[name].double() * scale + minimum).float().double()
        for name, (scale, minimum) in zip(sorted(stored), ranges, strict=True)
    }


def convolution(weights: dict[str, Tensor], name: str, stride: int, epsilon: float) -> nn.Conv2d:
    """Return a convolution with its batch normalisation merged into it."""
    bn = {"Conv1": "bn_Conv1", "Conv_1": "Conv_1_bn"}.get(name, f"{name}_BN")
    scale = weights[f"{bn}/gamma"] / (weights[f"{bn}/moving_variance"] + epsilon).sqrt()
    bias = weights[f"{bn}/beta"] - weights[f"{bn}/moving_mean"] * scale
    # Keras keeps a kernel as [Y, X, in, out], and a depth-wise one as [Y, X, channels, 1].
    depthwise = weights.get(f"{name}/depthwise_kernel")
    kernel = (
        weights[f"{name}/kernel"].permute(3, 2, 0, 1) if depthwise is None else depthwise.permute(2, 3, 0, 1)
    )
    size = kernel.shape[-1]
    layer = nn.Conv2d(
        len(kernel) if depthwise is not None else kernel.shape[1],
        len(kernel),
        size,
        stride=stride,
        padding=size // 2 if stride == 1 else 0,
        groups=1 if depthwise is None else len(kernel),
    )
    layer.weight.data = (kernel * scale[:, None, None, None]).float().contiguous()
    layer.bias = nn.Parameter(bias.float())
    return layer
