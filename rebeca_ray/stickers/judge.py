"""The judge: a network that reads style and subcategory off an image, and shares nothing with the CLIP."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from rebeca_ray.stickers import JUDGE


class JudgeNetwork(nn.Module):
    """A plain VGG-like classifier of 64x64 images with two heads; images [B, 3, 64, 64] in [-1, 1]."""

    def __init__(
        self, num_styles: int, num_subcategories: int, widths: Sequence[int] = (24, 48, 96, 128)
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in widths:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False),
                nn.BatchNorm2d(width),
                nn.SiLU(),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.2)
        self.style = nn.Linear(2 * channels, num_styles)
        self.subcategory = nn.Linear(2 * channels, num_subcategories)

    def forward(self, image_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of style [B, S] and subcategory [B, C]."""
        features = self.features(image_BCHW)
        pooled = self.dropout(torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1))
        return self.style(pooled), self.subcategory(pooled)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Probabilities of every style [N, S] and subcategory [N, C] for N images."""

    style: np.ndarray
    subcategory: np.ndarray


class Judge:
    """The shipped judge.

    `styles` and `subcategories` have the order of its outputs. `held_out_accuracy` is measured on held-out
    names.
    """

    def __init__(self, directory: Path = JUDGE) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        self.styles: list[str] = self.config["styles"]
        self.subcategories: list[str] = self.config["subcategories"]
        self.category_of: dict[str, str] = self.config["category_of"]
        self.held_out_accuracy: dict[str, float] = self.config["held_out_accuracy"]
        self.network = JudgeNetwork(len(self.styles), len(self.subcategories))
        weights = load_file(directory / "model.safetensors")
        self.network.load_state_dict(
            {
                name: tensor.float() if tensor.is_floating_point() else tensor
                for name, tensor in weights.items()
            }
        )
        self.network.eval()

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, batch_size: int = 256) -> Judgement:
        """Judge uint8 images [N, 64, 64, 3], and return their probabilities."""
        styles, subcategories = [], []
        for start in range(0, len(images), batch_size):
            batch = (
                torch.from_numpy(images[start : start + batch_size]).permute(0, 3, 1, 2).float() / 127.5 - 1
            )
            style, subcategory = self.network(batch)
            styles.append(F.softmax(style, dim=1))
            subcategories.append(F.softmax(subcategory, dim=1))
        return Judgement(style=torch.cat(styles).numpy(), subcategory=torch.cat(subcategories).numpy())

    def category(self, judgement: Judgement) -> list[str]:
        """Return the likeliest category of each image, by the sum over its subcategories."""
        categories = sorted(set(self.category_of.values()))
        member = np.array(
            [[self.category_of[sub] == category for category in categories] for sub in self.subcategories]
        )
        return [categories[best] for best in (judgement.subcategory @ member).argmax(1)]

    def style(self, judgement: Judgement) -> list[str]:
        """Return the likeliest style of each image."""
        return [self.styles[best] for best in judgement.style.argmax(1)]

    @property
    def accuracy_line(self) -> str:
        """Return one line on the accuracy of the judge, to print beside its judgements."""
        parts = ", ".join(f"{name} {value:.1%}" for name, value in self.held_out_accuracy.items())
        return f"Accuracy of the judge on real images of held-out names: {parts}"
