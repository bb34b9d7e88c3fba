"""A trial of a keyed watermark in the initial noise: Gaussian Shading (Yang et al., CVPR 2024).

A message of 32 bits is repeated over the latent and encrypted by ChaCha20. Each encrypted bit is the sign of
one noise value, so the noise stays standard normal without the key. With one nonce per key, a mark can be
sought in any image. With one per seed, images stay independent, and the detector must know the item.
Detection encodes the image, inverts the sampler (DDIM, no guidance) and takes a majority vote per bit. The
conditioning is empty, or the item's embedding.

Capacities: 32 bits of 32 repetitions, and 1 bit of 256 or 1,024. An image is detected if chance reaches its
number of right bits, or of equal signs, at most once per million images. `weighted` weighs the signs of the
one bit by the inverted value. `search` allows for a detector that tries the nonces of 10 million items.
`plain noise` seeks the noise of an item's seed in its unmarked image.

The decoder is the bundled one, of 1,024 latent values. Stable Diffusion 1.5 has 16,384 at 512 pixels. Its
weights are not available here, so this trial says nothing of it.

    python -m tests.bench.watermark [--threads 1]
"""

import argparse
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy import stats

from rebeca_ray.decoder import denoising
from rebeca_ray.decoder.encoding import encode_image
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.noise import first_noise
from rebeca_ray.stickers import DECODER
from tests.bench.decoding import DEFAULT, JUDGED, World

RESULTS = Path(__file__).parent / "results" / "watermark.json"
BITS, VALUES = 32, 1024
KEY, WRONG_KEYS = bytes(range(32)), 10_000
MESSAGE = np.random.default_rng(0).integers(0, 2, BITS).astype(bool)
FALSE_POSITIVES, CATALOG = 1e-6, 10_000_000
ITEMS = 12  # drawn JUDGED / ITEMS times each, for the likeness of images of one item
EDGE = 3  # pixels cut off at each edge, a tenth of the width in all

Nonce = Callable[[int], int]  # of a seed
NONCES: dict[str, Nonce] = {"nonce per seed": lambda seed: seed, "nonce per key": lambda seed: 0}


def keystream(key: bytes, nonce: int) -> np.ndarray:
    """Return the bits [VALUES] of a key and a nonce."""
    # The low half of these 16 bytes counts blocks. A seed in it would share blocks with its neighbours.
    cipher = Cipher(ChaCha20(key, (nonce << 64).to_bytes(16, "little")), mode=None)
    return np.unpackbits(np.frombuffer(cipher.encryptor().update(bytes(VALUES // 8)), np.uint8)).astype(bool)


def signs(nonces: Sequence[int]) -> np.ndarray:
    """Return the sign bits [B, VALUES] of marked noise; True is positive."""
    return np.stack([keystream(KEY, nonce) for nonce in nonces]) ^ np.tile(MESSAGE, VALUES // BITS)


def marked_noise(seeds: Sequence[int], nonce: Nonce) -> np.ndarray:
    """Return standard normal noise [B, VALUES] of the seeds, with the signs of the message."""
    magnitude = np.abs(first_noise(seeds, VALUES))
    return np.where(signs([nonce(seed) for seed in seeds]), magnitude, -magnitude)


def draw(decoder: LocalDecoder, rows: Rows, nonce: Nonce | None) -> np.ndarray:
    """Return images [B, Y, X, 3] of the rows; with a nonce they are marked."""

    def noise(
        seeds: Sequence[int], embed_dim: int, device: torch.device | str = "cpu"
    ) -> Iterator[torch.Tensor]:
        assert nonce is not None
        yield torch.from_numpy(marked_noise(seeds, nonce)).to(device)

    with mock.patch.object(denoising, "item_noise", noise if nonce else denoising.item_noise):
        return np.stack(decoder.draw(rows))


def decoded(image: np.ndarray, kind: str, quality: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encode_image(image, kind, quality, marked=False))).convert("RGB"))


def resized(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))


def cropped(image: np.ndarray) -> np.ndarray:
    return image[EDGE:-EDGE, EDGE:-EDGE]


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "uncompressed": lambda image: image,
    "WebP, quality 90": lambda image: decoded(image, "WEBP", 90),
    "JPEG, quality 90": lambda image: decoded(image, "JPEG", 90),
    "JPEG, quality 50": lambda image: decoded(image, "JPEG", 50),
    "resized to half and back": lambda image: resized(resized(image, len(image) // 2), len(image)),
    "cropped, edges filled": lambda image: np.pad(cropped(image), ((EDGE,) * 2, (EDGE,) * 2, (0, 0)), "edge"),
    "cropped and enlarged": lambda image: resized(cropped(image), len(image)),
}


class Inverter:
    """The way back from images to noise: the autoencoder, then DDIM inversion by the decoder's UNet."""

    def __init__(self, decoder: LocalDecoder) -> None:
        self.networks = decoder.loop.networks
        self.vae = diffusers.AutoencoderKL.from_pretrained(DECODER / "vae", torch_dtype=torch.float32).eval()
        self.scheduler = diffusers.DDIMInverseScheduler.from_config(
            self.networks.scheduler_config, clip_sample=False
        )
        self.scheduler.set_timesteps(DEFAULT.num_inference_steps)

    @torch.inference_mode()
    def __call__(self, image_BYXR: np.ndarray, rows: Rows) -> np.ndarray:
        """Return the noise [B, VALUES] of images, under the conditioning of the rows."""
        image_BRYX = torch.from_numpy(image_BYXR).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = self.vae.encode(image_BRYX).latent_dist.mode() * self.vae.config.scaling_factor
        conditioning = self.networks.condition(rows).in_order(self.networks.family.conditioning)
        for timestep in self.scheduler.timesteps:
            predicted = self.networks.unet(latents, timestep.expand(len(latents)), *conditioning)
            latents = self.scheduler.step(predicted, timestep, latents).prev_sample
        return latents.flatten(1).numpy()


def least_equal(count: int, rate: float) -> int:
    """Return the least number of equal bits among `count` that chance reaches at most at `rate`."""
    return int(stats.binom.isf(rate, count, 0.5)) + 1


def weighted_score(inverted_BN: np.ndarray, sign_BN: np.ndarray) -> np.ndarray:
    """Return a standard normal score [B] per image, if the signs are independent of it."""
    return (inverted_BN * np.where(sign_BN, 1, -1)).sum(1) / np.linalg.norm(inverted_BN, axis=1)


def detect(inverted_BN: np.ndarray, sign_BN: np.ndarray) -> dict[str, float]:
    """Return the shares of equal signs, right bits and detected images."""
    equal = (inverted_BN > 0) == sign_BN
    # A bit is right if most of its repetitions are; a tie is half right.
    repeats = equal.reshape(len(equal), -1, BITS).mean(1)
    right = (repeats > 0.5) + 0.5 * (repeats == 0.5)
    return {
        "equal signs": float(equal.mean()),
        "right bits": float(right.mean()),
        "32 bits": float((right.sum(1) >= least_equal(BITS, FALSE_POSITIVES)).mean()),
        "1 bit of 256": float((equal[:, ::4].sum(1) >= least_equal(VALUES // 4, FALSE_POSITIVES)).mean()),
        "1 bit of 1,024": float((equal.sum(1) >= least_equal(VALUES, FALSE_POSITIVES)).mean()),
        "weighted": float((weighted_score(inverted_BN, sign_BN) > stats.norm.isf(FALSE_POSITIVES)).mean()),
        "search": float((equal.sum(1) >= least_equal(VALUES, FALSE_POSITIVES / CATALOG)).mean()),
    }


def wrong_keys(inverted_BN: np.ndarray) -> dict[str, float]:
    """Return scores and false positives of many wrong keys, each tried on each image."""
    streams = [keystream(bytes(28) + key.to_bytes(4, "big"), 0) for key in range(WRONG_KEYS)]
    sign_NK = np.where(np.stack(streams), 1, -1).T.astype(np.float32)
    inverted_BN = np.where(inverted_BN > 0, 1, -1).astype(np.float32)
    sum_BK, right_BK = 0.0, 0.0
    for bit in range(BITS):
        vote_BK = inverted_BN[:, bit::BITS] @ sign_NK[bit::BITS]
        sum_BK, right_BK = sum_BK + vote_BK, right_BK + (np.sign(vote_BK) + 1) / 2
    score_BK = sum_BK / np.sqrt(VALUES)
    return {
        "tests": score_BK.size,
        "32 bits": int((right_BK >= least_equal(BITS, FALSE_POSITIVES)).sum()),
        "1 bit of 1,024": int(((sum_BK + VALUES) / 2 >= least_equal(VALUES, FALSE_POSITIVES)).sum()),
        "deviation of the score": float(score_BK.std()),
        "highest score": float(score_BK.max()),
        "deviation of a key's mean score": float(score_BK.mean(0).std()),
    }


def likeness(world: World, images: np.ndarray) -> dict[str, float]:
    """Return cosine and pixel distance (0 to 255) between images of one item; rows are grouped by item."""
    embeds = world.embed(images)
    embeds = (embeds / np.linalg.norm(embeds, axis=1, keepdims=True)).reshape(ITEMS, -1, embeds.shape[1])
    pixels = images.reshape(*embeds.shape[:2], -1).astype(np.float32)
    first, second = np.triu_indices(embeds.shape[1], 1)
    return {
        "cosine within an item": float((embeds[:, first] * embeds[:, second]).sum(2).mean()),
        "pixel distance within an item": float(np.abs(pixels[:, first] - pixels[:, second]).mean()),
    }


def noise_tests(noise_BN: np.ndarray) -> dict[str, float]:
    """Return the Kolmogorov-Smirnov test against the standard normal, and the correlation of two images."""
    test = stats.kstest(noise_BN.ravel(), "norm")
    correlation = np.corrcoef(noise_BN)[np.triu_indices(len(noise_BN), 1)]
    return {
        "Kolmogorov-Smirnov": float(test.statistic),
        "p": float(test.pvalue),
        "correlation between images": float(correlation.mean()),
    }


def distribution(
    world: World, decoder: LocalDecoder, images: dict[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """Return noise, quality and likeness of unmarked and marked images."""
    repeats = JUDGED // ITEMS
    again = Rows.of(DEFAULT, world.embeds[:ITEMS].repeat(repeats, 0), range(JUDGED, 2 * JUDGED))
    figures = {}
    for name, drawn in images.items():
        nonce = NONCES.get(name)
        noise = marked_noise(range(JUDGED), nonce) if nonce else first_noise(range(JUDGED), VALUES)
        figures[name] = {
            **noise_tests(noise),
            **world.quality(drawn),
            **likeness(world, draw(decoder, again, nonce)),
        }
    return figures


def detections(
    invert: Inverter, rows: Rows, images: dict[str, np.ndarray]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return detection by case and conditioning, and the trial of wrong keys."""
    unknown = replace(rows, image_embeds_BD=np.zeros_like(rows.image_embeds_BD))
    seeds = list(rows.seeds)
    figures = {}
    for conditioning, given in (("empty", unknown), ("item", rows)):
        for name, nonce in NONCES.items():
            expected = signs([nonce(seed) for seed in seeds])
            for change, apply in CHANGES.items():
                # A changed image inverts alike under either nonce.
                if name == "nonce per seed" or change == "uncompressed":
                    changed = np.stack([apply(image) for image in images[name]])
                    figures[f"{name}, {conditioning}, {change}"] = detect(invert(changed, given), expected)
        unmarked = invert(images["unmarked"], given)
        for name, nonce in NONCES.items():
            figures[f"unmarked, {conditioning}, {name}"] = detect(
                unmarked, signs([nonce(seed) for seed in seeds])
            )
        plain = detect(unmarked, first_noise(seeds, VALUES) > 0)
        figures[f"unmarked, {conditioning}, plain noise"] = {
            name: share for name, share in plain.items() if "bits" not in name
        }
        if conditioning == "empty":
            tried = wrong_keys(unmarked)
    return figures, tried


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    world, decoder = World(), LocalDecoder(DEFAULT)
    rows = Rows.of(DEFAULT, world.embeds, range(JUDGED))
    images = {name: draw(decoder, rows, nonce) for name, nonce in [("unmarked", None), *NONCES.items()]}
    figures, tried = detections(Inverter(decoder), rows, images)
    results = {
        "images": JUDGED,
        "detection": figures,
        "wrong keys": tried,
        "distribution": distribution(world, decoder, images),
    }
    columns = list(next(iter(figures.values())))
    table = Table("image, conditioning, change", *columns)
    for name, shares in figures.items():
        table.add_row(name, *(f"{shares[column]:.1%}" if column in shares else "" for column in columns))
    Console().print(table, results["wrong keys"], results["distribution"])
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
