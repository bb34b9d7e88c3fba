"""Speed and quality of the bundled decoder on this machine's CPU.

Speed: medians of rounds that take all variants in turn. The variants are the reference (float32, one image at
a time, 50 steps), its improvements one by one (fewer steps, batches, then engines and number formats), and
`StableDiffusionPipeline` with one embedding per batch.
Formats: quality by engine and number format.
Quality: held-out items decoded from their embeddings, by scheduler and number of steps. The figures are style
and category by the judge, and cosine to the given embedding. A strip of images is written too.
Passes: the same by steps and guidance interval, with the true like probability of a user of the real item
(of 300 simulated users, the one who likes it most). With `--lora`, a file of `stickers.build.lcm`, few
unguided steps too, with it and without it.
Intervals: the same for guidance in a part of the steps, at the default's scheduler and steps.
Cache: the same for shallow passes between whole ones, and the time of both for the UNet of Stable Diffusion
1.5 with random weights.
Parity: ONNX Runtime against torch. The UNet of Stable Diffusion 1.5 takes 18 GB of memory.

    python -m tests.bench.decoding [speed] [formats] [quality] [passes] [intervals] [cache] [parity]
        [--rounds 3] [--threads 2] [--lora FILE]

A processor with AVX-512 stands in for one without it if ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2 and
MKL_ENABLE_INSTRUCTIONS=AVX2 are set. They bind torch; ONNX Runtime and OpenVINO are left out then.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import open_clip
import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.choices import computes_bfloat16
from rebeca_ray.decoder.export import example_inputs, export_decoder, export_network
from rebeca_ray.decoder.exported.onnx_engine import OnnxNetwork
from rebeca_ray.decoder.families import sd
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.evaluation.quantization import NUM_ITEMS, quantize, require_nncf
from rebeca_ray.stickers import CLIP, DECODER
from rebeca_ray.stickers.build.data import Stickers, load_stickers
from rebeca_ray.stickers.judge import Judge
from rebeca_ray.stickers.simulate import simulate
from rebeca_ray.stickers.truth import Truth
from tests.gpu.sd15 import write_sd15

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[2] / "infra" / "docs" / "figures"
INSTRUCTIONS = torch.backends.cpu.get_cpu_capability().lower()  # avx2, avx512
LIMITED = INSTRUCTIONS == "avx2" and "avx512f" in Path("/proc/cpuinfo").read_text()
REFERENCE = DecoderSettings(
    model=str(DECODER),
    scheduler="ddim",
    num_inference_steps=50,
    decoder_guidance_scale=3.0,
    batch_size=1,
    image_quality=100,
)
DEFAULT = REFERENCE.model_copy(update={"scheduler": "dpm_solver", "num_inference_steps": 5, "batch_size": 40})
JUDGED, TIMED = 120, 40
INTERVALS = ((0.0, 1.0), (0.0, 0.8), (0.0, 0.6), (0.2, 1.0), (0.2, 0.8), (0.2, 0.6), (0.4, 0.8), (0.0, 0.0))
CACHES = ((2, 5), (2, 9), (3, 9), (2, 20), (3, 20))  # interval, steps
PASSES = tuple((steps, start) for steps in (9, 7, 6, 5, 4, 3) for start in (0.0, 0.2))  # guidance starts at
LCM_STEPS = (2, 4, 8)
USERS = 300
SCHEDULERS = {"ddim": (50,), "dpm_solver": (5, 9, 20), "unipc": (5, 9)}


class World:
    """Held-out stickers, their embeddings, and the judge of the images."""

    def __init__(self) -> None:
        self.stickers: Stickers = load_stickers()
        self.judge, self.clip = Judge(), open_clip.create_model(f"local-dir:{CLIP}").eval()
        self.rows = np.random.default_rng(0).permutation(np.flatnonzero(self.stickers.held_out))[:JUDGED]
        self.images = self.stickers.image_NCHW[self.rows].permute(0, 2, 3, 1).numpy()
        self.embeds = self.embed(self.images)

    def trained(self, count: int) -> np.ndarray:
        """Return embeddings of some stickers that the decoder was trained on."""
        rows = np.random.default_rng(1).permutation(np.flatnonzero(~self.stickers.held_out))[:count]
        return self.embed(self.stickers.image_NCHW[rows].permute(0, 2, 3, 1).numpy())

    @torch.inference_mode()
    def embed(self, image_NHWC: np.ndarray) -> np.ndarray:
        image = torch.from_numpy(image_NHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.clip.encode_image(image).numpy()

    def quality(self, image_NHWC: np.ndarray) -> dict[str, float]:
        judged, again = self.judge(image_NHWC), self.embed(image_NHWC)
        cosine = (
            (again * self.embeds).sum(1) / np.linalg.norm(again, axis=1) / np.linalg.norm(self.embeds, axis=1)
        )
        judgements = {"style": self.judge.style(judged), "category": self.judge.category(judged)}
        truth = {"style": self.stickers.style, "category": self.stickers.category}
        shares = {
            name: np.mean([one == truth[name][row] for one, row in zip(values, self.rows, strict=True)])
            for name, values in judgements.items()
        }
        return {**{name: float(share) for name, share in shares.items()}, "cosine": float(cosine.mean())}


def drawn(settings: DecoderSettings, embeds: np.ndarray) -> np.ndarray:
    return np.stack(LocalDecoder(settings).draw(Rows.of(settings, embeds, range(len(embeds)))))


def shared_embedding(embeds: np.ndarray) -> Callable[[], int]:
    """Return a run of `StableDiffusionPipeline` with our batch and steps, and one embedding for all rows."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        str(DECODER), safety_checker=None, dtype=torch.float32
    )
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_ip_adapter(
        str(DECODER), subfolder="ip_adapter", weight_name="ip-adapter.safetensors", image_encoder_folder=None
    )
    pipeline.set_progress_bar_config(disable=True)
    image = torch.from_numpy(embeds[:1])[:, None]

    def run() -> int:
        images = pipeline(
            prompt="",
            num_images_per_prompt=DEFAULT.batch_size,
            ip_adapter_image_embeds=[torch.cat([torch.zeros_like(image), image])],
            num_inference_steps=DEFAULT.num_inference_steps,
            guidance_scale=DEFAULT.decoder_guidance_scale,
            output_type="np",
        ).images
        return len(images)

    return run


def ours(settings: DecoderSettings, embeds: np.ndarray, count: int) -> Callable[[], int]:
    decoder = LocalDecoder(settings)

    def run() -> int:
        return len(decoder.draw(Rows.of(settings, embeds[:count], range(count))))

    return run


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Return decibels between two sets of images with values up to 255."""
    return float(-10 * np.log10(np.mean((one.astype(float) - other) ** 2) / 255**2 + 1e-12))


def parity(world: World) -> dict[str, float]:
    """Compare ONNX Runtime with torch, in decibels: bundled decoder, and UNet of Stable Diffusion 1.5."""
    embeds, decibels = world.embeds[:8], {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "float16"):
            settings = DEFAULT.model_copy(update={"batch_size": 8, "dtype": dtype})
            export_decoder(settings, Path(folder) / dtype)
            onnx = settings.model_copy(update={"engine": "onnx", "engine_dir": f"{folder}/{dtype}"})
            exact = drawn(settings.model_copy(update={"dtype": "float32"}), embeds)
            decibels[f"bundled decoder, ONNX {dtype} against torch float32"] = psnr(
                drawn(onnx, embeds), exact
            )
    with tempfile.TemporaryDirectory() as folder:
        settings = DecoderSettings(model=str(write_sd15(Path(folder))), image_size=64, dtype="float32")
        networks = sd.load_networks(settings)
        signature = networks.family.signatures(deep_cache=False)["unet"]
        inputs = example_inputs(networks)["unet"]
        export_network(networks.unet, inputs, signature, Path(folder) / "unet.onnx")
        session = OnnxNetwork(Path(folder) / "unet.onnx", signature, "cpu")
        latents, timestep, text, image, _ = inputs
        latents, image = torch.randn_like(latents), torch.randn_like(image)
        drawn_at = {}
        for weight in (0.4, 1.0):
            weighted = (latents, timestep, text, image, torch.full((2,), weight))
            with torch.inference_mode():
                exact, ran = networks.unet(*weighted), session(*weighted)
            drawn_at[weight] = ran
            error, peak = float((exact - ran).square().mean()), float(exact.max() - exact.min())
            decibels[f"UNet of Stable Diffusion 1.5, image weight {weight}"] = 10 * np.log10(peak**2 / error)
        decibels["the same, one image weight against the other"] = psnr(
            drawn_at[0.4].numpy() * 64, drawn_at[1.0].numpy() * 64
        )
    return decibels


def speed(world: World, rounds: int) -> dict[str, float]:
    """Return images per second of each variant: medians over the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "reference: 50 steps of DDIM, one image at a time": ours(REFERENCE, world.embeds, 2),
            f"{DEFAULT.num_inference_steps} steps of DPM-Solver++ instead": ours(
                DEFAULT.model_copy(update={"batch_size": 1}), world.embeds, 8
            ),
            "and 40 images at a time (the default)": ours(DEFAULT, world.embeds, TIMED),
            **{
                f"the default by {name}": ours(settings, world.embeds, TIMED)
                for name, settings in formats(world, Path(folder)).items()
            },
            "StableDiffusionPipeline, 40 images of one shared embedding": shared_embedding(world.embeds),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, run in ways.items():
                started = time.perf_counter()
                count = run()
                rates[name].append(count / (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in rates.items()}


def formats(world: World, folder: Path) -> dict[str, DecoderSettings]:
    """Return the default by engine and number format; write the exports into `folder`.

    bfloat16 is left out where the processor emulates it.
    """
    if LIMITED:
        return {}
    exports = {name: str(folder / name) for name in ("float32", "int8")}
    for name, path in exports.items():
        export_decoder(DEFAULT, Path(path))
        if name == "int8":
            require_nncf()
            quantize(DEFAULT, Path(path), world.trained(NUM_ITEMS))
    chosen: dict[str, dict[str, str]] = {}
    if computes_bfloat16():
        chosen["torch, bfloat16"] = {"dtype": "bfloat16"}
    for engine, name in (("onnx", "ONNX Runtime"), ("openvino", "OpenVINO")):
        for dtype in ("float32", "bfloat16", "int8"):
            if dtype != "bfloat16" or (engine == "openvino" and computes_bfloat16()):
                export = exports["int8" if dtype == "int8" else "float32"]
                chosen[f"{name}, {dtype}"] = {"engine": engine, "engine_dir": export, "dtype": dtype}
    return {name: DEFAULT.model_copy(update=values) for name, values in chosen.items()}


def quality_of_formats(world: World) -> dict[str, dict[str, float]]:
    """Return quality by engine and number format."""
    figures = {"torch, float32": world.quality(drawn(DEFAULT, world.embeds))}
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in formats(world, Path(folder)).items():
            figures[name] = world.quality(drawn(settings, world.embeds))
            Console().print(name, figures[name])
    return figures


def quality(world: World) -> dict[str, dict[str, float]]:
    """Return quality by scheduler and steps; write the strip: real stickers, then one row per variant."""
    figures, strip = {"real images": world.quality(world.images)}, [world.images[:12]]
    for scheduler, all_steps in SCHEDULERS.items():
        for steps in all_steps:
            settings = DEFAULT.model_copy(update={"scheduler": scheduler, "num_inference_steps": steps})
            images = drawn(settings, world.embeds)
            figures[f"{scheduler}, {steps} steps"] = world.quality(images)
            strip.append(images[:12])
            Console().print(f"{scheduler}, {steps} steps", figures[f"{scheduler}, {steps} steps"])
    Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in strip])).save(
        FIGURES / "decoding-steps.png"
    )
    return figures


def few_passes(lora: str | None) -> dict[str, DecoderSettings]:
    """Return decoders of ever fewer passes: fewer steps, guidance in a part of them, or a few-step LoRA."""
    variants = {
        f"{steps} steps, guidance from {start:g}": {
            "num_inference_steps": steps,
            "guidance_interval": (start, 1.0),
        }
        for steps, start in PASSES
    }
    if lora:
        for steps in LCM_STEPS:
            unguided = {"scheduler": "lcm", "num_inference_steps": steps, "decoder_guidance_scale": 1.0}
            variants[f"{steps} unguided steps of LCM"] = unguided
            variants[f"{steps} unguided steps of LCM, with the LoRA"] = {**unguided, "lora": lora}
    return {name: DEFAULT.model_copy(update=values) for name, values in variants.items()}


def passes(world: World, lora: str | None) -> dict[str, dict[str, float]]:
    """Return quality, passes, and the like probability of an item's user, for each of `few_passes`."""
    with tempfile.TemporaryDirectory() as folder:
        simulate(USERS, 0, Path(folder))
        names = sorted(set(pq.read_table(Path(folder) / "truth.parquet", columns=["user_id"])[0].to_pylist()))
        truth = Truth(Path(folder) / "truth.parquet", world.judge, names)
    by_user = [truth.like_probability([name] * len(world.images), world.images) for name in names]
    users = [names[user] for user in np.argmax(by_user, axis=0)]
    real = float(truth.like_probability(users, world.images).mean())
    figures = {"real images": {"passes": 0, **world.quality(world.images), "like": real}}
    for name, settings in few_passes(lora).items():
        decoder = LocalDecoder(settings)
        images = np.stack(decoder.draw(Rows.of(settings, world.embeds, range(len(world.embeds)))))
        guided = len(decoder.loop.guided_steps()) if settings.decoder_guidance_scale != 1 else 0
        count = settings.num_inference_steps + guided
        like = float(truth.like_probability(users, images).mean())
        figures[name] = {"passes": count, **world.quality(images), "like": like}
        Console().print(name, figures[name])
    return figures


def intervals(world: World) -> dict[str, dict[str, float]]:
    """Return quality and passes by guidance interval; write the strip: real stickers, then a row each."""
    figures, strip = {}, [world.images[:12]]
    for start, stop in INTERVALS:
        settings = DEFAULT.model_copy(update={"guidance_interval": (start, stop)})
        decoder = LocalDecoder(settings)
        images = np.stack(decoder.draw(Rows.of(settings, world.embeds, range(len(world.embeds)))))
        passes = settings.num_inference_steps + len(decoder.loop.guided_steps())
        figures[f"{start:g} to {stop:g}"] = {**world.quality(images), "passes": passes}
        strip.append(images[:12])
        Console().print(f"{start:g} to {stop:g}", figures[f"{start:g} to {stop:g}"])
    Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in strip])).save(
        FIGURES / "decoding-intervals.png"
    )
    return figures


def cache(world: World, rounds: int) -> dict[str, dict[str, float]]:
    """Return quality by cache interval and steps, and seconds of a pass of Stable Diffusion 1.5's UNet."""
    figures = {}
    for interval, steps in CACHES:
        settings = DEFAULT.model_copy(update={"cache_interval": interval, "num_inference_steps": steps})
        name = f"every {interval} of {steps} steps"
        figures[name] = world.quality(drawn(settings, world.embeds))
        Console().print(name, figures[name])
    with tempfile.TemporaryDirectory() as folder:
        networks = sd.load_networks(DecoderSettings(model=str(write_sd15(Path(folder))), cache_interval=2))
    inputs = {
        name: tuple(tensor[:1] for tensor in tensors) for name, tensors in example_inputs(networks).items()
    }
    passes = {"whole": (networks.unet, inputs["unet"])}
    passes["shallow"] = (networks.by_name()["shallow_unet"], inputs["shallow_unet"])
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    with torch.inference_mode():
        networks.unet(*inputs["unet"])
        for _ in range(rounds):
            for name, (network, tensors) in passes.items():
                started = time.perf_counter()
                network(*tensors)
                seconds[name].append(time.perf_counter() - started)
    figures["seconds of a pass"] = {name: statistics.median(values) for name, values in seconds.items()}
    Console().print(figures["seconds of a pass"])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parts = ["speed", "formats", "quality", "passes", "intervals", "cache", "parity"]
    parser.add_argument("parts", nargs="*", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lora", help="a few-step LoRA, for the part `passes`")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = RESULTS / f"decoding-{INSTRUCTIONS}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    world = World()
    if "speed" in arguments.parts:
        results |= {
            "machine": platform.machine() + (", limited to AVX2" if LIMITED else ""),
            "threads": arguments.threads,
            "torch": torch.__version__,
        }
        results["images_per_second"] = speed(world, arguments.rounds)
        table = Table("", "images/s", "times the reference")
        reference = next(iter(results["images_per_second"].values()))
        for name, rate in results["images_per_second"].items():
            table.add_row(name, f"{rate:.2f}", f"{rate / reference:.1f}")
        Console().print(table)
    if "parity" in arguments.parts:
        results["parity_db"] = parity(world)
        Console().print(results["parity_db"])
    if "quality" in arguments.parts:
        results["quality"] = quality(world)
        table = Table("", "style", "category", "cosine to the given embedding")
        for name, figures in results["quality"].items():
            table.add_row(
                name, f"{figures['style']:.1%}", f"{figures['category']:.1%}", f"{figures['cosine']:.3f}"
            )
        Console().print(table)
    if "formats" in arguments.parts:
        results["formats"] = quality_of_formats(world)
    if "passes" in arguments.parts:
        results["passes"] = passes(world, arguments.lora)
    if "intervals" in arguments.parts:
        results["intervals"] = intervals(world)
    if "cache" in arguments.parts:
        results["cache"] = cache(world, arguments.rounds)
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
