"""Draw the figures of `infra/docs/concepts.md` from real runs.

- `guidance.svg`: like probability against distinct items, from `results/prior_quality.json`.
- `permutation.svg`: null distribution and real pairing, from `results/permutation.json`. `--demo`, the
  folder of a finished demo, writes that file first: the true like probability of every user for the items of
  every user.
- `steps.png`: the bundled decoder's estimate of the image after each step, for held-out stickers.

    python -m tests.bench.concepts [--demo ~/rebeca-stickers]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import open_clip
import torch
from PIL import Image

from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.evaluation.permutation import permutation_test
from rebeca_ray.stickers import CLIP, DECODER
from rebeca_ray.stickers.build.data import load_stickers, to_pixels
from rebeca_ray.stickers.judge import Judge
from rebeca_ray.stickers.truth import Truth
from tests.bench.prior_quality import FIGURES, RESULTS

STICKERS, SCALE, BINS = 6, 2, 50
# Text becomes shapes, so that a figure looks alike everywhere.
plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "rebeca"})


def write_permutation(demo: Path) -> None:
    """Write the test over the demo's catalog: the real pairing, and a histogram of the random ones."""
    snapshot = read_catalog(str(demo / "catalog"))
    items = snapshot.items(["user_id", "image_file", "image_row"])
    user_I = np.array(items["user_id"].to_pylist(), dtype=object)
    users = sorted(set(user_I.tolist()) - {""})
    images = to_pixels(snapshot.images(items))
    truth = Truth(demo / "truth.parquet", Judge(), users)
    like_UI = np.stack([truth.like_probability([user] * len(images), images) for user in users])
    like_UU = np.stack([like_UI[:, user_I == user].mean(1) for user in users], axis=1)
    test = permutation_test(like_UU)
    count, edges = np.histogram(test.null_B, BINS)
    result = {
        "catalog": "rebeca demo",
        **test.figures(),
        "permutations": test.num_permutations,
        "null_counts": count.tolist(),
        "null_edges": edges.round(6).tolist(),
    }
    (RESULTS / "permutation.json").write_text(json.dumps(result, indent=2) + "\n")


def plot_guidance() -> None:
    """Plot the trade: more guidance pleases more, and varies less. The calibrated scale is marked."""
    seeds = list(json.loads((RESULTS / "prior_quality.json").read_text()).values())
    scales = list(seeds[0]["sweep"])
    distinct, like = (
        np.array([[seed["sweep"][scale][name] for scale in scales] for seed in seeds]).mean(0)
        for name in ("distinct", "like")
    )
    figure, axis = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    axis.plot(distinct, like, marker="o")
    chosen = f"{seeds[0]['guidance']:g}"
    for scale, x, y in zip(scales, distinct, like, strict=True):
        weight = "bold" if scale == chosen else "normal"
        axis.annotate(scale, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8, weight=weight)
    index = scales.index(chosen)
    axis.plot(distinct[index], like[index], "o", markersize=11, fillstyle="none", color="black")
    axis.set(xlabel="distinct of 25 samples", ylabel="true like probability")
    axis.margins(y=0.12)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.grid(alpha=0.3)
    save(figure, "guidance.svg")


def plot_permutation() -> None:
    """Plot the histogram of the random pairings, and the real pairing beside it."""
    result: dict[str, Any] = json.loads((RESULTS / "permutation.json").read_text())
    figure, axis = plt.subplots(figsize=(6, 3), constrained_layout=True)
    edges = np.array(result["null_edges"])
    axis.bar(
        edges[:-1], result["null_counts"], np.diff(edges), align="edge", label="items dealt to random users"
    )
    axis.axvline(result["matched"], color="tab:red", label="items with their users")
    axis.set(xlabel="mean true like probability", ylabel="permutations", xlim=(0, None))
    axis.legend(fontsize=8)
    save(figure, "permutation.svg")


def save(figure: Any, name: str) -> None:
    figure.savefig(FIGURES / name, facecolor="white", metadata={"Date": None})
    plt.close(figure)


@torch.inference_mode()
def draw_steps() -> None:
    """Draw a row per sticker: the real one, then the decoder's estimate of the image after each step."""
    stickers = load_stickers()
    rows = np.random.default_rng(0).permutation(np.flatnonzero(stickers.held_out))[:STICKERS]
    real = stickers.image_NCHW[rows]
    clip = open_clip.create_model(f"local-dir:{CLIP}").eval()
    embeds = clip.encode_image(real.float() / 127.5 - 1).numpy()
    settings = DecoderSettings(
        model=str(DECODER),
        num_inference_steps=5,
        decoder_guidance_scale=3.0,
        batch_size=STICKERS,
        dtype="float32",
    )
    decoder = LocalDecoder(settings)
    loop, columns = decoder.loop, [real.permute(0, 2, 3, 1).numpy()]
    step = loop.scheduler.step

    def keep_estimate(*arguments: Any, **options: Any) -> Any:
        result = step(*arguments, **options)
        pixels = loop.networks.vae_decoder(loop.scheduler.model_outputs[-1])
        columns.append(((pixels / 2 + 0.5).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy())
        return result

    loop.scheduler.step = keep_estimate
    decoder.draw(Rows.of(settings, embeds, range(STICKERS)))
    strip = np.concatenate([np.concatenate(list(column)) for column in columns], axis=1)
    Image.fromarray(strip.repeat(SCALE, 0).repeat(SCALE, 1)).save(FIGURES / "steps.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--demo", type=Path, help="folder of a finished demo; writes results/permutation.json"
    )
    arguments = parser.parse_args()
    if arguments.demo:
        write_permutation(arguments.demo.expanduser())
    plot_guidance()
    plot_permutation()
    draw_steps()
    print(f"{FIGURES}: guidance.svg, permutation.svg, steps.png")


if __name__ == "__main__":
    main()
