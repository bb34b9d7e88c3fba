"""Train the bundled UNet, text encoder and IP-Adapter: `python -m rebeca_ray.stickers.build.unet` (resumes).

The script needs the trained CLIP and autoencoder. All parts learn together from scratch: the UNet, the text
encoder, and the decoupled image keys and values of IP-Adapter. Half of the captions are dropped, because
the empty prompt is the common case. In a seventh of the batches the adapter is off, so that plain text
prompts work too. The loss is v-prediction (Salimans & Ho 2022). The learning rate falls linearly over the
last third of the steps.
"""

import argparse
import math
from pathlib import Path
from typing import cast

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rebeca_ray.log import configure
from rebeca_ray.stickers import CLIP, DECODER, EMBED_DIM
from rebeca_ray.stickers.build.captions import CONTEXT_LENGTH, VOCAB_SIZE, random_caption
from rebeca_ray.stickers.build.data import (
    Progress,
    Stickers,
    autocast,
    batches,
    load_stickers,
    shift_and_flip,
)

LATENT_SIZE = 16
CONTEXT_DIM = 128
NUM_IMAGE_TOKENS = 4
# In standard deviations of a coordinate. The prior samples near real embeddings, not at them.
EMBED_NOISE = 0.15
IMAGE_DROPOUT, CAPTION_DROPOUT, TEXT_ONLY_SHARE = 0.1, 0.5, 0.15


def build_unet() -> UNet2DConditionModel:
    """Return a UNet with attention at 8x8 only. At 16x16, attention would dominate the cost on a CPU."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(96, 144),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=CONTEXT_DIM,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def cross_attentions(unet: UNet2DConditionModel) -> list[tuple[int, str]]:
    """Return `(number, name)` of every cross-attention. Official IP-Adapter files number them 1, 3, 5, …"""
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    return [(2 * index + 1, name.removesuffix(".processor")) for index, name in enumerate(names)]


def attach_new_ip_adapter(unet: UNet2DConditionModel) -> None:
    """Give the UNet an untrained IP-Adapter through diffusers' own loader."""
    proj = nn.Linear(EMBED_DIM, NUM_IMAGE_TOKENS * CONTEXT_DIM)
    norm = nn.LayerNorm(CONTEXT_DIM)
    image_proj = {f"proj.{k}": v for k, v in proj.state_dict().items()} | {
        f"norm.{k}": v for k, v in norm.state_dict().items()
    }
    ip_adapter = {}
    for number, name in cross_attentions(unet):
        attention = unet.get_submodule(name)
        ip_adapter[f"{number}.to_k_ip.weight"] = attention.to_k.weight.data.clone()
        ip_adapter[f"{number}.to_v_ip.weight"] = attention.to_v.weight.data.clone()
    unet._load_ip_adapter_weights(
        [{"image_proj": image_proj, "ip_adapter": ip_adapter}], low_cpu_mem_usage=False
    )


def official_ip_adapter(unet: UNet2DConditionModel, mean_length: float) -> dict[str, torch.Tensor]:
    """Return the adapter's weights under the names of the official files (`h94/IP-Adapter`).

    Training sees embeddings of length sqrt(D). The CLIP's output has length `mean_length` on average, so the
    projection is rescaled.
    """
    projection = unet.encoder_hid_proj.image_projection_layers[0]
    weights = {
        "image_proj.proj.weight": projection.image_embeds.weight * (math.sqrt(EMBED_DIM) / mean_length),
        "image_proj.proj.bias": projection.image_embeds.bias,
        "image_proj.norm.weight": projection.norm.weight,
        "image_proj.norm.bias": projection.norm.bias,
    }
    for number, name in cross_attentions(unet):
        processor = unet.get_submodule(name).processor
        weights[f"ip_adapter.{number}.to_k_ip.weight"] = processor.to_k_ip[0].weight
        weights[f"ip_adapter.{number}.to_v_ip.weight"] = processor.to_v_ip[0].weight
    return {name: tensor.detach().half().contiguous() for name, tensor in weights.items()}


def set_adapter_scale(unet: UNet2DConditionModel, scale: float) -> None:
    for _, name in cross_attentions(unet):
        unet.get_submodule(name).processor.scale = [scale]


def new_scheduler() -> DPMSolverMultistepScheduler:
    """Return the forward process of Stable Diffusion (scaled-linear betas) with v-prediction."""
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        algorithm_type="dpmsolver++",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )


class Model(nn.Module):
    """All networks that train together, so that one running average holds all weights."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = build_unet()
        attach_new_ip_adapter(self.unet)
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=CONTEXT_DIM,
                intermediate_size=4 * CONTEXT_DIM,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=CONTEXT_LENGTH,
                projection_dim=CONTEXT_DIM,
                bos_token_id=VOCAB_SIZE - 2,
                eos_token_id=VOCAB_SIZE - 1,
                pad_token_id=VOCAB_SIZE - 1,
            )
        )


def write_decoder(model: Model, tokenizer: CLIPTokenizer, mean_length: float, directory: Path) -> None:
    """Write a `StableDiffusionPipeline` directory and `ip_adapter/ip-adapter.safetensors`, all in fp16."""
    unet = build_unet()
    weights = {name: tensor for name, tensor in model.unet.state_dict().items() if name in unet.state_dict()}
    unet.load_state_dict(weights)
    text_encoder = CLIPTextModel(model.text_encoder.config)
    text_encoder.load_state_dict(model.text_encoder.state_dict())
    pipeline = StableDiffusionPipeline(
        unet=unet.half(),
        vae=AutoencoderKL.from_pretrained(directory / "vae", torch_dtype=torch.float16),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory)
    (directory / "ip_adapter").mkdir(exist_ok=True)
    save_file(
        official_ip_adapter(model.unet, mean_length), directory / "ip_adapter" / "ip-adapter.safetensors"
    )


def load_shipped(model: Model, mean_length: float, directory: Path) -> None:
    """Load the weights in `directory` as a start, for a machine without resumable state."""
    shipped = UNet2DConditionModel.from_pretrained(directory / "unet", dtype=torch.float32)
    adapter = load_file(directory / "ip_adapter" / "ip-adapter.safetensors")
    groups: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in adapter.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = tensor.float()
    groups["image_proj"]["proj.weight"] *= mean_length / math.sqrt(EMBED_DIM)
    shipped._load_ip_adapter_weights([groups], low_cpu_mem_usage=False)
    model.unet.load_state_dict(shipped.state_dict())
    model.text_encoder.load_state_dict(
        CLIPTextModel.from_pretrained(directory / "text_encoder", dtype=torch.float32).state_dict()
    )


@torch.no_grad()
def training_pairs(
    stickers: Stickers, vae: AutoencoderKL, device: str, copies: int = 4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Return `(row, latents, embeds, mean length)` of `copies` variants of every training image.

    The first variant is the image itself. The embeddings are scaled to length sqrt(D). The mean length is
    measured before scaling.
    """
    clip = open_clip.create_model(f"local-dir:{CLIP}").eval().to(device)
    generator = torch.Generator().manual_seed(0)
    rows, latents, embeds = [], [], []
    for copy in range(copies):
        for chunk in np.array_split(stickers.train_rows, 40):
            image = stickers.image_NCHW[chunk].float() / 255
            if copy == 1:
                image = image.flip(-1)
            elif copy > 1:
                image = shift_and_flip(image, generator, pixels=3)
            image = (image * 2 - 1).to(device)
            with autocast(device):
                latents.append(vae.encode(image).latent_dist.mean.float().cpu() * vae.config.scaling_factor)
            embeds.append(clip.encode_image(image).cpu())
            rows.append(chunk)
    lengths = torch.cat(embeds).norm(dim=1, keepdim=True)
    scaled = torch.cat(embeds) / lengths * math.sqrt(EMBED_DIM)
    return torch.from_numpy(np.concatenate(rows)), torch.cat(latents), scaled, float(lengths.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DECODER)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/stickers/unet"), help="folder of the resumable state"
    )
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=7e-4, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--continue-shipped",
        action="store_true",
        help="without a state in --work, start from the weights in --out",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    configure()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    stickers = load_stickers()
    vae = AutoencoderKL.from_pretrained(args.out / "vae", torch_dtype=torch.float32).eval().to(args.device)
    pairs = args.work / "pairs.pt"
    if not pairs.exists():
        args.work.mkdir(parents=True, exist_ok=True)
        torch.save(training_pairs(stickers, vae, args.device), pairs)
    rows, latents, embeds, mean_length = torch.load(pairs, weights_only=True)
    parts = list(zip(stickers.style, stickers.category, stickers.subcategory, stickers.name, strict=True))
    tokenizer = CLIPTokenizer.from_pretrained(CLIP)

    curve = "training_continued.csv" if args.continue_shipped else "training.csv"
    progress = Progress(args.work, args.out / curve, ["loss", "loss_text_only"])
    model = Model()
    if args.continue_shipped and not progress.checkpoint.exists():
        load_shipped(model, mean_length, args.out)
    model.to(args.device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.0, weight_decay=1e-2, betas=(0.9, 0.98), fused=True
    )
    start = 0
    if state := progress.resume():
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]

    alphas = new_scheduler().alphas_cumprod
    generator = torch.Generator().manual_seed(args.seed + start)
    random = np.random.default_rng((args.seed, start))
    stream = batches(np.arange(len(rows)), args.batch_size, random)
    losses: dict[bool, list[float]] = {False: [], True: []}
    for step in range(start + 1, args.steps + 1):
        decay = min(1.0, 3 * (1 - (step - 1) / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(step / 200, decay)
        chosen = next(stream)
        text_only = bool(random.random() < TEXT_ONLY_SHARE)
        captions = [
            random_caption(parts[rows[index]], random)
            if random.random() > (0.1 if text_only else CAPTION_DROPOUT)
            else ""
            for index in chosen
        ]
        tokens = tokenizer(
            captions, padding="max_length", max_length=CONTEXT_LENGTH, truncation=True, return_tensors="pt"
        )
        clean = latents[chosen]
        embed = embeds[chosen] + EMBED_NOISE * torch.randn(len(chosen), EMBED_DIM, generator=generator)
        embed = embed * (torch.rand(len(chosen), 1, generator=generator) >= IMAGE_DROPOUT)
        # Logit-normal (Esser et al. 2024, section 3.1): most steps go to the timesteps that decide shapes.
        # A fifth stays uniform.
        logit = torch.randn(len(chosen), generator=generator) + 0.2
        uniform = torch.rand(2, len(chosen), generator=generator)
        timestep = (torch.where(uniform[0] < 0.2, uniform[1], logit.sigmoid()) * 1000).long()
        signal = alphas[timestep].sqrt().view(-1, 1, 1, 1)
        noise_level = (1 - alphas[timestep]).sqrt().view(-1, 1, 1, 1)
        noise = torch.randn(clean.shape, generator=generator)
        set_adapter_scale(model.unet, 0.0 if text_only else 1.0)
        # Plain attention: at 64 tokens, the CPU's flash kernel takes twice as long in the backward pass.
        with autocast(args.device), sdpa_kernel(SDPBackend.MATH):
            context = model.text_encoder(tokens.input_ids.to(args.device)).last_hidden_state
            predicted = model.unet(
                (signal * clean + noise_level * noise).to(args.device),
                timestep.to(args.device),
                context,
                added_cond_kwargs={"image_embeds": [embed[:, None].to(args.device)]},
            ).sample
            loss = F.mse_loss(predicted.float(), (signal * noise - noise_level * clean).to(args.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        losses[text_only].append(loss.item())
        if step % 50 == 0:
            progress.log(
                step, *(float(np.mean(losses[kind])) if losses[kind] else math.nan for kind in (False, True))
            )
            losses = {False: [], True: []}
        if step % 200 == 0 or step == args.steps:
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            progress.save({"step": step, **state})
            write_decoder(cast(Model, average.module), tokenizer, mean_length, args.out)


if __name__ == "__main__":
    main()
