"""Two nights on the bundled decoder, kept as hashes: the same request always gives the same items.

Monday serves six users with a history and one without, and one row fails. On Tuesday one user rated another
item. Ids, ranks, origins and counts must match exactly on every machine. Embeddings and pixels must match to
the bit on the kind of processor that recorded them; elsewhere float rounding differs, and a coarse sketch of
each must match.

Whoever changes items on purpose records the file again:
`REBECA_RECORD_GOLDEN=1 pytest tests/test_golden_night.py`.
"""

import hashlib
import io
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from rebeca_ray import schemas
from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import (
    DiffusionSettings,
    InteractionSettings,
    NetworkSettings,
    PriorSampling,
    SamplerSettings,
    SelectionSettings,
)
from rebeca_ray.decoder.files import hash_file
from rebeca_ray.decoder.safety_model import WEIGHTS
from rebeca_ray.prior.checkpoint import TrainedPrior, save_prior
from rebeca_ray.prior.denoisers import Prior
from rebeca_ray.prior.scaler import EmbedScaler
from rebeca_ray.prior.selector import Selector
from tests.conftest import assembled, prepare, publish

GOLDEN = Path(__file__).parent / "golden" / "night.json"
D = 256  # of the bundled CLIP
USERS = [f"user-{number}" for number in range(6)]
NEWCOMER = "newcomer"
NUM_IMAGES = 2
REQUESTED = NUM_IMAGES * (len(USERS) + 1)


def numbers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Standard normal numbers that are the same on every machine, which torch's own are not."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def fill(module: torch.nn.Module, seed: int) -> None:
    """Set every weight from `numbers`, scaled by its fan-in."""
    for index, (_, parameter) in enumerate(sorted(module.named_parameters())):
        fan_in = parameter.shape[-1] if parameter.ndim else 1
        parameter.data.copy_(
            torch.from_numpy(np.asarray(numbers(tuple(parameter.shape), seed + index) / fan_in**0.5))
        )


def write_prior(folder: Path) -> str:
    settings = NetworkSettings(
        num_layers=1, num_heads=2, width=32, num_tokens=4, user_encoder="history", max_history=8
    )
    network, selector = Prior(settings, D).eval(), Selector(D, 8)
    fill(network, seed=100)
    fill(selector, seed=500)
    prior = TrainedPrior(
        network=network,
        settings=settings,
        diffusion=DiffusionSettings(num_train_timesteps=100),
        scaler=EmbedScaler(embed_dim=D, norm=12.0),
        sampling=PriorSampling(prior_guidance_scale=2.0),
        condition_dropout=0.15,
        clip=None,
        selector=selector,
        metrics={"val_loss": 1.0},
    )
    save_prior(prior, str(folder / "prior"))
    return str(folder / "prior")


def write_items(folder: Path) -> str:
    column = pa.FixedSizeListArray.from_arrays(
        pa.array(numbers((40, D), seed=7).ravel()), type=schemas.image_embeds(D)
    )
    pq.write_table(
        pa.table({"item_id": [f"real-{number}" for number in range(40)], "image_embeds": column}),
        folder / "items.parquet",
    )
    return str(folder / "items.parquet")


def write_interactions(folder: Path, *, changed: bool) -> None:
    rows = [
        (user, f"real-{(7 * number + 3 * step) % 40}", float(1 + (number + step) % 5))
        for number, user in enumerate(USERS)
        for step in range(5)
    ]
    if changed:
        rows.append((USERS[3], "real-39", 5.0))
    user, item, rating = zip(*rows, strict=True)
    table = pa.table({"user_id": user, "item_id": item, "rating": pa.array(rating, pa.float32())})
    pq.write_table(table, folder / "interactions.parquet")


@pytest.fixture
def one_thread() -> Any:
    """Sums are split among threads, and rounded accordingly."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def processor() -> str:
    """What float rounding depends on."""
    vendor = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "vendor_id" in line
        ),
        "",
    )
    capability, version = torch.backends.cpu.get_cpu_capability(), torch.__version__.split("+")[0]
    return f"{platform.machine()} {vendor} {capability}, torch {version}"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def sketch_of(image: bytes) -> list[int]:
    """A picture as 4 x 4 colours."""
    with Image.open(io.BytesIO(image)) as picture:
        return list(np.asarray(picture.convert("RGB").resize((4, 4), Image.Resampling.BOX)).ravel().tolist())


def record_of(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot as the golden file keeps it."""
    items = snapshot.items()
    images = snapshot.images(items)
    exact, hashes, sketches = [], {}, {}
    for row, image in zip(items.to_pylist(), images, strict=True):
        place = f"{row['user_id']}/{row['rank']}"
        exact.append(
            {
                name: row[name]
                for name in ("user_id", "rank", "item_id", "origin", "nearest_item_id", "safety_flag")
            }
        )
        hashes[place] = {
            "embeds": sha256(np.array(row["image_embeds"], np.float32).tobytes()),
            "image": sha256(image),
        }
        sketches[place] = {
            "embeds": np.round(row["image_embeds"][:8], 2).tolist(),
            "like_probability": round(row["like_probability"], 4),
            "image": sketch_of(image),
        }
    users = snapshot.table("users").sort_by("user_id").to_pylist()
    return {
        "items": exact,
        "users": [
            [row["user_id"], row["num_items"], row["num_failed"], row["cold_start"], row["history_digest"]]
            for row in users
        ],
        "errors": [
            [row["item_id"], row["user_id"], row["error"]] for row in snapshot.table("errors").to_pylist()
        ],
        "changes": [
            [row["user_id"], row["item_id"], row["change"]] for row in snapshot.table("changes").to_pylist()
        ],
        "counts": {name: count for name, count in snapshot.manifest.counts.model_dump().items() if count},
        "hashes": hashes,
        "sketches": sketches,
    }


def two_nights(folder: Path) -> dict[str, Any]:
    """Monday, on which one row fails, and Tuesday, for which one user rated another item."""
    users = [*USERS, NEWCOMER]
    pq.write_table(pa.table({"user_id": users}), folder / "request.parquet")
    write_interactions(folder, changed=False)
    config = GenerateConfig(
        prior=write_prior(folder),
        decoder=DecoderSettings(
            model="package:stickers/assets/decoder",
            num_inference_steps=2,
            decoder_guidance_scale=3.0,
            image_format="PNG",
            batch_size=4,
        ),
        request=str(folder / "request.parquet"),
        catalog=str(folder / "catalog"),
        items=write_items(folder),
        interactions=InteractionSettings(path=str(folder / "interactions.parquet")),
        sampler=SamplerSettings(num_inference_steps=4, batch_size=32),
        selection=SelectionSettings(candidates_per_item=4),
        num_images=NUM_IMAGES,
    )
    nights = {}
    for date, changed in (("2026-03-02", False), ("2026-03-03", True)):
        write_interactions(folder, changed=changed)
        night = config.model_validate({**config.model_dump(), "run_date": np.datetime64(date).item()})
        prepared = prepare(night, break_first=not changed)
        assembled(night, prepared, requested=REQUESTED, error_budget=0.2)
        publish(night.catalog, prepared.run)
        snapshot = read_catalog(night.catalog)
        assert snapshot.manifest.safety_checker == "bundled"
        assert snapshot.manifest.decoder_weights["bundled_checker/model.safetensors"] == hash_file(WEIGHTS)
        nights[date] = record_of(snapshot)
    return nights


@pytest.mark.usefixtures("one_thread")
def test_two_nights_are_the_golden_ones(tmp_path: Path) -> None:
    nights = two_nights(tmp_path)
    if os.environ.get("REBECA_RECORD_GOLDEN"):
        GOLDEN.write_text(json.dumps({"processor": processor(), "nights": nights}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    same_processor = golden["processor"] == processor()
    assert list(nights) == list(golden["nights"])
    for date, night in nights.items():
        expected = golden["nights"][date]
        for name in ("items", "users", "errors", "changes", "counts"):
            assert night[name] == expected[name], (date, name)
        if same_processor:
            assert night["hashes"] == expected["hashes"], date
        for place, sketch in expected["sketches"].items():
            for name, tolerance in (("embeds", 0.05), ("like_probability", 0.002), ("image", 8)):
                np.testing.assert_allclose(
                    night["sketches"][place][name],
                    sketch[name],
                    atol=tolerance,
                    err_msg=f"{date} {place} {name}",
                )
    monday, tuesday = nights.values()
    assert (monday["counts"]["failed"], monday["counts"]["population"]) == (1, NUM_IMAGES)
    assert tuesday["counts"]["carried"] == NUM_IMAGES * (
        len(USERS) - 2
    )  # all but whose row failed, and who rated another item
