"""Distil the bundled decoder into a LoRA for few unguided passes: `python -m rebeca_ray.stickers.build.lcm`.

Latent consistency distillation (Luo et al. 2023, LCM-LoRA): from a noisy latent, the student predicts the
clean one. It learns to predict the same from the latent that one guided DDIM step of the teacher reaches. So
the LoRA contains the guidance. Four passes with it replace the 18 of nine guided steps:

    decoder.lora=lcm.safetensors decoder.scheduler=lcm
    decoder.num_inference_steps=4 decoder.decoder_guidance_scale=1

Shapes: B batch, D embed dim, C latent channels, Y X latents.
"""

import argparse
import copy
import logging
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.families.sd import load_networks
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.log import configure
from rebeca_ray.stickers import DECODER, EMBED_DIM
from rebeca_ray.stickers.build.data import autocast, batches, load_stickers
from rebeca_ray.stickers.build.unet import EMBED_NOISE, new_scheduler, training_pairs

log = logging.getLogger("rebeca_ray.stickers.build.lcm")  # of `__main__`, nothing is shown

SETTINGS = DecoderSettings(model=str(DECODER))
GUIDANCE = 3.0  # the stickers' default, which the LoRA contains
STRIDE = 20  # timesteps of one DDIM step of the teacher: 50 steps in all, as LCMScheduler expects
RANK = 32
# All layers but those of the adapter: its keys and values stay the teacher's.
LAYERS = (
    r".*\.(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|net\.0\.proj|net\.2"
    r"|conv1|conv2|conv_shortcut|time_emb_proj)"
)
HUBER = 0.001


class Schedule:
    """Signal and noise of the training's forward process, and predictions of the clean latent."""

    def __init__(self) -> None:
        alphas = new_scheduler().alphas_cumprod
        self.signal, self.noise = alphas.sqrt(), (1 - alphas).sqrt()

    def at(self, timestep_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.signal[timestep_B].view(-1, 1, 1, 1), self.noise[timestep_B].view(-1, 1, 1, 1)

    def clean(
        self, x_BCYX: torch.Tensor, velocity_BCYX: torch.Tensor, timestep_B: torch.Tensor
    ) -> torch.Tensor:
        """Return the clean latent that a velocity means (Salimans & Ho 2022)."""
        signal, noise = self.at(timestep_B)
        return signal * x_BCYX - noise * velocity_BCYX

    def ddim_step(
        self, x_BCYX: torch.Tensor, velocity_BCYX: torch.Tensor, timestep_B: torch.Tensor
    ) -> torch.Tensor:
        """Return the latent STRIDE timesteps earlier; timestep 0 at the end."""
        signal, noise = self.at(timestep_B)
        earlier_signal, earlier_noise = self.at((timestep_B - STRIDE).clamp(min=0))
        epsilon = signal * velocity_BCYX + noise * x_BCYX
        return earlier_signal * self.clean(x_BCYX, velocity_BCYX, timestep_B) + earlier_noise * epsilon


def consistent(x_BCYX: torch.Tensor, clean_BCYX: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
    """Return the consistency function, which is x itself at timestep 0; weights as in LCMScheduler."""
    scaled = 10.0 * timestep_B.view(-1, 1, 1, 1)
    skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
    return skip * x_BCYX + out * clean_BCYX


def distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the pseudo-Huber distance (Song & Dhariwal 2023)."""
    return ((one - other).square() + HUBER**2).sqrt().mean() - HUBER


class Distillation:
    """A teacher, which stays as it is, and a student with a LoRA that learns."""

    def __init__(self) -> None:
        self.networks, self.schedule = load_networks(SETTINGS), Schedule()
        self.teacher = cast(Any, self.networks.unet)
        self.student = copy.deepcopy(self.teacher)
        self.student.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS))

    @property
    def trained(self) -> list[nn.Parameter]:
        return [weight for weight in self.student.parameters() if weight.requires_grad]

    def loss(
        self, clean_BCYX: torch.Tensor, embeds_BD: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Return the consistency loss at random timesteps."""
        count, schedule = len(clean_BCYX), self.schedule
        timestep_B = STRIDE * torch.randint(1, 1000 // STRIDE + 1, (count,), generator=generator) - 1
        signal, noise = schedule.at(timestep_B)
        x_BCYX = signal * clean_BCYX + noise * torch.randn(clean_BCYX.shape, generator=generator)
        with torch.no_grad():
            rows = Rows.of(SETTINGS, embeds_BD.numpy(), range(count))
            family = self.networks.family
            both = self.networks.condition(rows, guided=True).in_order(family.conditioning)
            conditional = tuple(tensor[:count] for tensor in both)
            velocity = self.teacher(x_BCYX.repeat(2, 1, 1, 1), timestep_B.repeat(2), *both).float()
            with_image, without = velocity.chunk(2)
            guided = without + GUIDANCE * (with_image - without)
            earlier_BCYX = schedule.ddim_step(x_BCYX, guided, timestep_B)
            target = self.predict(earlier_BCYX, (timestep_B - STRIDE).clamp(min=0), conditional)
        return distance(self.predict(x_BCYX, timestep_B, conditional), target)

    def predict(
        self, x_BCYX: torch.Tensor, timestep_B: torch.Tensor, conditioning: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Return the student's clean latent."""
        velocity = self.student(x_BCYX, timestep_B, *conditioning).float()
        return consistent(x_BCYX, self.schedule.clean(x_BCYX, velocity, timestep_B), timestep_B)

    def save(self, file: Path) -> None:
        """Write the LoRA as safetensors, in half precision."""
        file.parent.mkdir(parents=True, exist_ok=True)
        weights = get_peft_model_state_dict(self.student.unet)
        save_file({f"unet.{name}": weight.half().contiguous() for name, weight in weights.items()}, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/stickers/lcm.safetensors"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    configure()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)  # peft draws the first weights

    vae = AutoencoderKL.from_pretrained(DECODER / "vae", torch_dtype=torch.float32).eval()
    _, latents, embeds, mean_length = training_pairs(load_stickers(), vae, "cpu", copies=1)
    scale = mean_length / math.sqrt(EMBED_DIM)  # from embeddings of length sqrt(D) to those of the CLIP
    distillation = Distillation()
    optimizer = torch.optim.AdamW(distillation.trained, lr=args.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(args.seed)
    stream = batches(np.arange(len(latents)), args.batch_size, np.random.default_rng(args.seed))
    losses = []
    for step in range(1, args.steps + 1):
        decay = min(1.0, 3 * (1 - (step - 1) / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(step / 50, decay)
        chosen = next(stream)
        noise = EMBED_NOISE * torch.randn(len(chosen), EMBED_DIM, generator=generator)
        with autocast("cpu"):
            loss = distillation.loss(latents[chosen], scale * (embeds[chosen] + noise), generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(distillation.trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            log.info(f"step {step}  loss {np.mean(losses[-50:]):.4f}")
        if step % 200 == 0 or step == args.steps:
            distillation.save(args.out)


if __name__ == "__main__":
    main()
