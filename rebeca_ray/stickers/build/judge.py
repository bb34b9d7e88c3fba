"""Train the bundled judge: `python -m rebeca_ray.stickers.build.judge` (about ten minutes on one core).

The script resumes. The judge has another architecture, another seed and no text. It shares with the CLIP
only the names in the training data. It learns from blurred and noisy images too. A judge trained on crisp
images alone reads the style off the sharpness of the last pixel: a 3x3 blur took an earlier one from 92% to
35%. It would judge the decoder's sharpness, not its style.
"""

import argparse
import json
import logging
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchvision.transforms.v2.functional import gaussian_blur

from rebeca_ray.log import configure
from rebeca_ray.stickers import JUDGE
from rebeca_ray.stickers.build.data import (
    Progress,
    Stickers,
    autocast,
    batches,
    class_ids,
    load_stickers,
    shift_and_flip,
)
from rebeca_ray.stickers.judge import Judge, JudgeNetwork

log = logging.getLogger(__name__)


def write_judge(network: JudgeNetwork, stickers: Stickers, directory: Path) -> None:
    """Write `config.json` and fp16 weights. Add the accuracy of the written judge on held-out names."""
    config = {
        "styles": class_ids(stickers.style)[1],
        "subcategories": class_ids(stickers.subcategory)[1],
        "category_of": dict(sorted(zip(stickers.subcategory, stickers.category, strict=True))),
        "held_out_accuracy": {},
    }
    weights = {
        k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in network.state_dict().items()
    }
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    judge = Judge(directory)
    rows = np.flatnonzero(stickers.held_out)
    judgement = judge(stickers.image_NCHW[rows].permute(0, 2, 3, 1).numpy())
    best_subcategory = [judge.subcategories[best] for best in judgement.subcategory.argmax(1)]
    config["held_out_accuracy"] = {
        "style": round(
            float(
                np.mean([a == stickers.style[r] for a, r in zip(judge.style(judgement), rows, strict=True)])
            ),
            4,
        ),
        "category": round(
            float(
                np.mean(
                    [a == stickers.category[r] for a, r in zip(judge.category(judgement), rows, strict=True)]
                )
            ),
            4,
        ),
        "subcategory": round(
            float(
                np.mean([a == stickers.subcategory[r] for a, r in zip(best_subcategory, rows, strict=True)])
            ),
            4,
        ),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=JUDGE)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/stickers/judge"), help="folder of the resumable state"
    )
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1000)
    args = parser.parse_args()
    configure()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    stickers = load_stickers()
    style_ids, styles = class_ids(stickers.style)
    subcategory_ids, subcategories = class_ids(stickers.subcategory)
    progress = Progress(args.work, args.out / "training.csv", ["style", "subcategory"])
    network = JudgeNetwork(len(styles), len(subcategories))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * min(1.0, step / args.steps))) + 1e-3),
    )
    start = 0
    if state := progress.resume():
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]
    generator = torch.Generator().manual_seed(args.seed + start)
    stream = batches(stickers.train_rows, 128, np.random.default_rng((args.seed, start)))
    sums = np.zeros(2)
    for step in range(start + 1, args.steps + 1):
        rows = next(stream)
        image = shift_and_flip(stickers.image_NCHW[rows].float() / 255, generator) * 2 - 1
        image[::2] = gaussian_blur(image[::2], [5, 5], [0.3 + float(torch.rand((), generator=generator))])
        image = image + 0.05 * torch.rand(len(rows), 1, 1, 1, generator=generator) * torch.randn(
            image.shape, generator=generator
        )
        with autocast("cpu"):
            style, subcategory = network(image)
        style_loss = F.cross_entropy(style.float(), style_ids[rows], label_smoothing=0.05)
        subcategory_loss = F.cross_entropy(subcategory.float(), subcategory_ids[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        (style_loss + subcategory_loss).backward()
        optimizer.step()
        schedule.step()
        sums += (style_loss.item(), subcategory_loss.item())
        if step % 50 == 0:
            progress.log(step, *(sums / 50))
            sums[:] = 0
        if step % 250 == 0 or step == args.steps:
            state = {
                "model": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            progress.save({"step": step, **state})
            write_judge(network, stickers, args.out)
            log.info(Judge(args.out).accuracy_line)


if __name__ == "__main__":
    main()
