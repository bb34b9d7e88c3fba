"""Shared by the training scripts of the bundled models: items in memory, augmentation, resumable state."""

import csv
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from rebeca_ray.pixels import see_image
from rebeca_ray.stickers import ITEMS, is_held_out

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Stickers:
    """All items: `image_NCHW` uint8, one list per column, and a mask of the rows withheld from training."""

    image_NCHW: torch.Tensor
    item_id: list[str]
    style: list[str]
    category: list[str]
    subcategory: list[str]
    name: list[str]
    held_out: np.ndarray

    @property
    def train_rows(self) -> np.ndarray:
        return np.flatnonzero(~self.held_out)


def load_stickers(path: Path = ITEMS) -> Stickers:
    """Decode every item of `items.parquet` into memory (about 100 MB)."""
    table = pq.read_table(path)
    columns = {
        name: table[name].to_pylist() for name in ("item_id", "style", "category", "subcategory", "name")
    }
    return Stickers(
        image_NCHW=torch.from_numpy(to_pixels([image["bytes"].as_py() for image in table["image"]]))
        .permute(0, 3, 1, 2)
        .contiguous(),
        held_out=np.array([is_held_out(name) for name in columns["name"]]),
        **columns,
    )


def to_pixels(encoded: list[bytes]) -> np.ndarray:
    """Decode images of one size, uint8 [N, H, W, 3]."""
    return np.stack([np.asarray(see_image(image)) for image in encoded])


def class_ids(values: list[str]) -> tuple[torch.Tensor, list[str]]:
    """Return the integer class of every value, and the class names in order."""
    classes = sorted(set(values))
    index = {value: number for number, value in enumerate(classes)}
    return torch.tensor([index[value] for value in values]), classes


def shift_and_flip(image_BCHW: torch.Tensor, generator: torch.Generator, *, pixels: int = 4) -> torch.Tensor:
    """Shift each image by up to `pixels` on white, and mirror half of them. Values are in [0, 1]."""
    size = image_BCHW.shape[-1]
    padded = torch.nn.functional.pad(image_BCHW, (pixels,) * 4, value=1.0)
    offsets = torch.randint(0, 2 * pixels + 1, (len(image_BCHW), 2), generator=generator).tolist()
    flips = (torch.rand(len(image_BCHW), generator=generator) < 0.5).tolist()
    crops = []
    for image, (top, left), flip in zip(padded, offsets, flips, strict=True):
        crop = image[:, top : top + size, left : left + size]
        crops.append(crop.flip(-1) if flip else crop)
    return torch.stack(crops)


def batches(rows: np.ndarray, batch_size: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield full batches of `rows` without end, reshuffled every epoch."""
    while True:
        order = random.permutation(rows)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def autocast(device: str) -> torch.autocast:
    """Return mixed precision where it is faster.

    Without AVX-512, a processor computes bfloat16 some hundred times slower than float32.
    """
    return torch.autocast(
        device,
        torch.bfloat16,
        enabled=device == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512",
    )


class Progress:
    """The resumable state of one training script: a checkpoint in `work`, a loss curve beside the weights."""

    def __init__(self, work: Path, curve: Path, columns: list[str]) -> None:
        work.mkdir(parents=True, exist_ok=True)
        curve.parent.mkdir(parents=True, exist_ok=True)
        self.checkpoint, self.curve, self.columns = work / "state.pt", curve, columns

    def resume(self) -> dict[str, Any] | None:
        """Return the last saved state, or None. Cut the loss curve back to that step."""
        state = torch.load(self.checkpoint, weights_only=True) if self.checkpoint.exists() else None
        last = state["step"] if state else 0
        kept = []
        if self.curve.exists():
            with self.curve.open() as file:
                kept = [row for row in csv.reader(file) if row[0].isdigit() and int(row[0]) <= last]
        with self.curve.open("w", newline="") as file:
            csv.writer(file).writerows([["step", *self.columns], *kept])
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint in one move, so that a kill leaves the old one or the new one."""
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def log(self, step: int, *values: float) -> None:
        with self.curve.open("a", newline="") as file:
            csv.writer(file).writerow([step, *(f"{value:.5f}" for value in values)])
        named = " ".join(f"{name} {value:.4f}" for name, value in zip(self.columns, values, strict=True))
        log.info(f"step {step}  {named}")
