"""Train the bundled CLIP: `python -m rebeca_ray.stickers.build.clip` (about half an hour on one core).

The script resumes. The two towers are open_clip's classes. Beside the contrastive loss, three temporary
heads read the unit image embedding: style, subcategory, and a 16x16 thumbnail. The thumbnail makes the
embedding keep layout and colour, because a decoder draws from the embedding alone.

The last fifth of the steps restarts the learning rate lower and weighs style more. It also turns images by
right angles, hides parts of them, and averages the weights. The styles of unseen names gain by it. Turning
by any angle loses, because it blurs the differences between styles.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rebeca_ray.log import configure
from rebeca_ray.stickers import CLIP, EMBED_DIM, IMAGE_SIZE
from rebeca_ray.stickers.build.captions import (
    CONTEXT_LENGTH,
    VOCAB_SIZE,
    caption,
    random_caption,
    train_tokenizer,
)
from rebeca_ray.stickers.build.data import (
    Progress,
    autocast,
    batches,
    class_ids,
    load_stickers,
    shift_and_flip,
)

OPEN_CLIP_CONFIG: dict[str, dict[str, Any]] = {
    "model_cfg": {
        "embed_dim": EMBED_DIM,
        "custom_text": True,
        "vision_cfg": {
            "timm_model_name": "resnet10t",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": IMAGE_SIZE,
        },
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": VOCAB_SIZE,
            "hf_tokenizer_name": "stickers",
            "tokenizer_kwargs": {"clean": "whitespace"},
            "width": 128,
            "heads": 4,
            "layers": 2,
        },
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}
THUMBNAIL = 16
POLISH_SHARE, POLISH_RATE, POLISH_STYLE_WEIGHT = 0.2, 0.5, 2.0


class Heads(nn.Module):
    """Temporary readers of the unit embedding: style, subcategory, thumbnail."""

    def __init__(self, num_styles: int, num_subcategories: int) -> None:
        super().__init__()
        self.style = nn.Linear(EMBED_DIM, num_styles)
        self.subcategory = nn.Linear(EMBED_DIM, num_subcategories)
        self.thumbnail = nn.Sequential(nn.Linear(EMBED_DIM, 768), nn.GELU(), nn.Linear(768, 3 * THUMBNAIL**2))


def turn_and_hide(image_BCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn a third of the images by right angles, and put a white 20-pixel square on 70%.

    Images are in [-1, 1].
    """
    images = []
    for image in image_BCHW:
        turn, hide, quarter, top, left = torch.rand(5, generator=generator).tolist()
        turned = image.rot90(1 + int(quarter * 3), (1, 2)) if turn < 1 / 3 else image.clone()
        if hide < 0.7:
            row, column = int(top * 50) - 3, int(left * 50) - 3
            turned[:, max(row, 0) : row + 20, max(column, 0) : column + 20] = 1.0
        images.append(turned)
    return torch.stack(images)


def write_clip(model: nn.Module, directory: Path) -> None:
    """Write the directory that `open_clip.create_model_and_transforms("local-dir:…")` loads, in fp16."""
    (directory / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP_CONFIG, indent=2) + "\n")
    weights = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, directory / "open_clip_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=CLIP)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/stickers/clip"), help="folder of the resumable state"
    )
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    configure()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    stickers = load_stickers()
    parts = list(zip(stickers.style, stickers.category, stickers.subcategory, stickers.name, strict=True))
    progress = Progress(
        args.work, args.out / "training.csv", ["loss", "contrastive", "style", "subcategory", "thumbnail"]
    )
    train_tokenizer([caption(*parts[row]) for row in stickers.train_rows], args.out)
    (args.out / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP_CONFIG))
    tokenizer = open_clip.get_tokenizer(f"local-dir:{args.out}")

    towers = {name: value for name, value in OPEN_CLIP_CONFIG["model_cfg"].items() if name != "custom_text"}
    model = open_clip.CustomTextCLIP(**towers, output_dict=True).to(memory_format=torch.channels_last)
    style_ids, styles = class_ids(stickers.style)
    subcategory_ids, subcategories = class_ids(stickers.subcategory)
    heads = Heads(len(styles), len(subcategories))
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=1.5e-3,
        betas=(0.9, 0.98),
    )
    polish_from = round(args.steps * (1 - POLISH_SHARE))

    def rate(step: int) -> float:
        """Return a factor that falls as a cosine to zero, twice; the second time it starts at POLISH_RATE."""
        if step < polish_from:
            return min((step + 1) / 150, 0.5 * (1 + math.cos(math.pi * step / polish_from)) + 1e-3)
        return (
            POLISH_RATE
            * 0.5
            * (1 + math.cos(math.pi * min(1.0, (step - polish_from) / (args.steps - polish_from))))
            + 1e-3
        )

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    start = 0
    if state := progress.resume():
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        average.load_state_dict(state["average"])
        start = state["step"]

    contrastive_loss = ClipLoss()
    random = np.random.default_rng((args.seed, start))
    generator = torch.Generator().manual_seed(args.seed + start)
    stream = batches(stickers.train_rows, 192, random)
    sums = np.zeros(5)
    for step in range(start + 1, args.steps + 1):
        rows = next(stream)
        polishing = step > polish_from
        image = shift_and_flip(stickers.image_NCHW[rows].float() / 255, generator) * 2 - 1
        image = turn_and_hide(image, generator) if polishing else image
        tokens = tokenizer([random_caption(parts[row], random) for row in rows])
        with autocast("cpu"):
            out = model(image.contiguous(memory_format=torch.channels_last), tokens)
        image_embeds, text_embeds = out["image_features"].float(), out["text_features"].float()
        contrastive = contrastive_loss(image_embeds, text_embeds, out["logit_scale"].float().clamp(max=100))
        scaled = image_embeds * math.sqrt(EMBED_DIM)
        style = F.cross_entropy(heads.style(scaled), style_ids[rows], label_smoothing=0.05)
        subcategory = F.cross_entropy(heads.subcategory(scaled), subcategory_ids[rows], label_smoothing=0.05)
        thumbnail = F.l1_loss(heads.thumbnail(scaled), F.adaptive_avg_pool2d(image, THUMBNAIL).flatten(1))
        loss = (
            contrastive
            + (POLISH_STYLE_WEIGHT if polishing else 0.5) * style
            + 0.5 * subcategory
            + 4.0 * thumbnail
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if polishing:
            average.update_parameters(model)
        sums += [value.item() for value in (loss, contrastive, style, subcategory, thumbnail)]
        if step % 50 == 0:
            progress.log(step, *(sums / 50))
            sums[:] = 0
        if step % 250 == 0 or step == args.steps:
            progress.save(
                {
                    "step": step,
                    "model": model.state_dict(),
                    "heads": heads.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "average": average.state_dict(),
                }
            )
            write_clip(average.module if polishing else model, args.out)


if __name__ == "__main__":
    main()
