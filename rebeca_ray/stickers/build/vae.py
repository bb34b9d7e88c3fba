"""Train the bundled autoencoder: `python -m rebeca_ray.stickers.build.vae` (about half an hour on one core).

The script resumes. It trains a small `AutoencoderKL`, 64x64x3 -> 16x16x4. The loss is L1 + L2 of the
pixels, plus the same of the differences of neighbouring pixels. The differences keep outlines sharp. The KL
term only keeps the latents bounded.

`--continue-shipped` starts from the shipped weights. The UNet must then be trained again (`build.unet
--continue-shipped`). `--decoder-only` starts from them too, and keeps the latents as they are, so that the
UNet still fits them.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from rebeca_ray.log import configure
from rebeca_ray.stickers import DECODER, IMAGE_SIZE
from rebeca_ray.stickers.build.data import Progress, autocast, batches, load_stickers, shift_and_flip

KL_WEIGHT = 1e-3  # weight of the mean KL of one latent value


def build_vae(scaling_factor: float = 1.0) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        scaling_factor=scaling_factor,
    )


def reconstruction_loss(drawn: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return L1 + L2 of pixels and of horizontal and vertical differences; images [B, 3, H, W] in [-1, 1]."""
    error = drawn - target
    edges = (error.diff(dim=-1), error.diff(dim=-2))
    pixels = error.abs().mean() + error.square().mean()
    return pixels + sum(edge.abs().mean() + edge.square().mean() for edge in edges)


def save_half(vae: AutoencoderKL, scaling_factor: float, directory: Path) -> None:
    """Save in fp16, and leave `vae` itself in fp32. `scaling_factor` scales the latents to unit variance."""
    half = build_vae(scaling_factor)
    half.load_state_dict(vae.state_dict())
    half.half().save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DECODER / "vae")
    parser.add_argument(
        "--work", type=Path, help="folder of the resumable state; default: runs/stickers/vae…"
    )
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--continue-shipped",
        action="store_true",
        help="without a state in --work, start from the weights in --out",
    )
    parser.add_argument(
        "--decoder-only", action="store_true", help="--continue-shipped, with a frozen encoder"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    configure()
    mode = "_decoder" if args.decoder_only else "_continued" if args.continue_shipped else ""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    stickers = load_stickers()
    progress = Progress(
        args.work or Path(f"runs/stickers/vae{mode}"), args.out / f"training{mode}.csv", ["loss", "kl"]
    )
    # Not channels-last: with it, the backward pass of group norm takes twice as long.
    vae = build_vae().to(args.device)
    scaling_factor: float | None = None
    if mode:
        shipped = AutoencoderKL.from_pretrained(args.out, torch_dtype=torch.float32)
        vae.load_state_dict(shipped.state_dict())
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        scaling_factor = shipped.config.scaling_factor
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=1e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / 100, 0.5 * (1 + math.cos(math.pi * min(1.0, step / args.steps))) + 1e-3
        ),
    )
    start = 0
    if state := progress.resume():
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]

    generator = torch.Generator().manual_seed(args.seed + start)
    latent_generator = torch.Generator(args.device).manual_seed(args.seed + start)
    stream = batches(stickers.train_rows, args.batch_size, np.random.default_rng((args.seed, start)))
    sums = np.zeros(2)
    for step in range(start + 1, args.steps + 1):
        image = (shift_and_flip(stickers.image_NCHW[next(stream)].float() / 255, generator) * 2 - 1).to(
            args.device
        )
        with autocast(args.device):
            posterior = vae.encode(image).latent_dist
            drawn = vae.decode(posterior.sample(latent_generator)).sample
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = reconstruction_loss(drawn.float(), image) + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        sums += (loss.item(), kl.item())
        if step % 50 == 0:
            progress.log(step, *(sums / 50))
            sums[:] = 0
        if step % 250 == 0 or step == args.steps:
            with torch.no_grad():
                some = stickers.image_NCHW[stickers.train_rows[::25]].float().to(args.device) / 127.5 - 1
                latents = vae.encode(some).latent_dist.mean
            state = {
                "model": vae.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            progress.save({"step": step, **state})
            save_half(vae, scaling_factor or round(1 / latents.std().item(), 4), args.out)


if __name__ == "__main__":
    main()
