"""The shortest honest script with Ray Data and diffusers, `plain_ray_data.py`, beside `rebeca generate`.

Both draw the same embeddings with the bundled decoder's weights, seeds, scheduler and steps.
Speed: images per second of processor time with one thread, encoded; medians of rounds taken in turn.
Rows: how many images of a batch are those of the same row drawn alone, and what becomes of a broken row.
Jobs: images per second of whole jobs on two cores, beyond their first images. Ours plans and publishes too.
Kill: both jobs are killed by SIGKILL after their first file, and started again; then the rows are counted.

    python -m tests.bench.comparison [--rounds 2] [--users 30] [--only rows jobs kill]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from rebeca_ray import schemas
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.config.decoder import DecoderSettings, SafetySettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import LayoutSettings, LimitSettings, SamplerSettings
from rebeca_ray.decoder.interface import DecodedImage, Rows
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.identity import image_seed
from rebeca_ray.pixels import open_image
from rebeca_ray.ray_runtime import start_ray
from rebeca_ray.stickers import DECODER, EMBED_DIM
from rebeca_ray.storage.filesystem import list_files
from tests.bench.main_job import processor
from tests.bench.plain_ray_data import Draw
from tests.conftest import NO_GATE, prior_users, write_tiny_prior

RESULTS = Path(__file__).parent / "results" / "comparison.json"
PLAIN = Path(__file__).parent / "plain_ray_data.py"
LOOP = Path(__file__).parent / "plain_accelerate.py"
PACKAGE = Path(__file__).parents[2] / "rebeca_ray"
Drawing = Callable[[np.ndarray, list[int]], list[bytes]]
BATCH, IMAGES_PER_USER = 20, 4
FEW, MANY = 80, 400  # images of a job: the rate is that of those between
SAME = 2  # levels of 255 that a pixel may differ by on average
OURS = DecoderSettings(
    model=str(DECODER),
    scheduler="dpm_solver",
    num_inference_steps=5,
    decoder_guidance_scale=3.0,
    dtype="float32",
    image_format="PNG",
    batch_size=BATCH,
    num_actors=2,
    cpus_per_actor=0.5,
    safety=SafetySettings(checker="none"),
)
GENERATE = """
import sys
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.generation.pipeline import generate_catalog
generate_catalog(GenerateConfig.model_validate_json(sys.argv[1]))
"""


def embeddings() -> tuple[np.ndarray, list[int]]:
    """Return BATCH embeddings of the decoder's size, and seeds."""
    embeds = 0.7 * np.random.default_rng(0).standard_normal((BATCH, EMBED_DIM))
    return embeds.astype(np.float32), [1000 + row for row in range(BATCH)]


def plain(draw: Draw, embeds: np.ndarray, seeds: list[int]) -> list[bytes]:
    batch = {"item_id": np.arange(len(seeds)), "image_embeds": list(embeds), "seed": np.array(seeds)}
    return list(draw(batch)["image"])


def ours(decoder: LocalDecoder, embeds: np.ndarray, seeds: list[int]) -> list[DecodedImage]:
    return decoder.decode(Rows.of(OURS, embeds, seeds))


def alone(draw: Drawing, embeds: np.ndarray, seeds: list[int]) -> list[bytes]:
    """Return the images of rows that are drawn one at a time."""
    return [draw(embeds[row : row + 1], seeds[row : row + 1])[0] for row in range(len(seeds))]


def differing(images: list[bytes], others: list[bytes]) -> int:
    """Return how many images differ from the others."""
    pairs = zip(images, others, strict=True)
    return sum(
        bool(np.abs(np.asarray(open_image(one), float) - np.asarray(open_image(other), float)).mean() > SAME)
        for one, other in pairs
    )


def in_one_process(rounds: int) -> dict[str, Any]:
    """Return the figures of speed, of rows that mix, and of a row without numbers."""
    torch.set_num_threads(1)
    (embeds, seeds), script, decoder = embeddings(), Draw(str(DECODER)), LocalDecoder(OURS)
    decoder.threads = 1

    def plainly(some: np.ndarray, those: list[int]) -> list[bytes]:
        return plain(script, some, those)

    def by_us(some: np.ndarray, those: list[int]) -> list[bytes]:
        return [image.image or b"" for image in ours(decoder, some, those)]

    ways: dict[str, Callable[[], list[Any]]] = {
        "script, batches": lambda: plainly(embeds, seeds),
        "script, one row at a time": lambda: alone(plainly, embeds, seeds),
        "rebeca, batches": lambda: by_us(embeds, seeds),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    images: dict[str, list[bytes]] = {}
    for _ in range(rounds):
        for name, draw in ways.items():
            started = time.process_time()
            images[name] = draw()
            seconds[name].append(time.process_time() - started)
    broken = embeds.copy()
    broken[3] = np.nan
    others = [row for row in range(BATCH) if row != 3]
    drawn = ours(decoder, broken, seeds)
    return {
        "images_per_cpu_second": {name: round(BATCH / median(parts), 2) for name, parts in seconds.items()},
        "wrong_rows": {
            "script": differing(images["script, batches"], images["script, one row at a time"]),
            "rebeca": differing(images["rebeca, batches"], alone(by_us, embeds, seeds)),
        },
        "rows": BATCH,
        "broken_row": {
            "script_says": "nothing" if plainly(broken, seeds)[3] else "an error",
            "rebeca_says": drawn[3].error,
            "rebeca_changed": differing(
                [drawn[row].image or b"" for row in others],
                [images["rebeca, batches"][row] for row in others],
            ),
        },
    }


def count_rows(ids: list[str], expected: int) -> dict[str, int]:
    times = Counter(ids)
    return {
        "rows": len(ids),
        "repeated": len(ids) - len(times),
        "missing": expected - len(times),
    }


def kill_after_first_file(
    command: list[str], files: Callable[[], list[str]], environment: dict[str, str]
) -> int:
    """Start a job, kill it once it has a file, start it again, and return the files of the first start."""
    process = subprocess.Popen(command, env=environment)
    while not files():
        assert process.poll() is None, "the job ended before its first file"
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(5)  # Ray ends the actors of a driver that died
    kept = len(files())
    subprocess.run(command, env=environment, check=True)
    return kept


def write_inputs(users: int, folder: Path, decoder: DecoderSettings = OURS) -> GenerateConfig:
    """Write a request and a small prior; return the config of a job for them."""
    names = [f"user-{number}" for number in range(users)]
    pq.write_table(pa.table({"user_id": names}), folder / "request.parquet")
    return GenerateConfig(
        prior=write_tiny_prior(folder, users=prior_users(names), embed_dim=EMBED_DIM, norm=11.0),
        decoder=decoder,
        request=str(folder / "request.parquet"),
        catalog=str(folder / "catalog"),
        num_images=IMAGES_PER_USER,
        sampler=SamplerSettings(num_inference_steps=4, cpus_per_actor=0.5),
        layout=LayoutSettings(images_per_file=BATCH),
        limits=LimitSettings(lease_seconds=3),
        gate=NO_GATE,
    )


def write_embeddings(count: int, path: Path) -> None:
    """Write the inputs of the scripts: ids, embeddings and seeds."""
    embeds = 0.7 * np.random.default_rng(0).standard_normal(count * EMBED_DIM).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeds), type=schemas.image_embeds(EMBED_DIM))
    ids = [f"item-{number}" for number in range(count)]
    pq.write_table(pa.table({"item_id": ids, "image_embeds": column, "seed": list(range(count))}), path)


def whole_jobs(rounds: int) -> dict[str, float]:
    """Return the images per second of whole jobs, each a command of its own, as the median of the rounds."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--cpu", "--num_processes", "2"]
    scripts = {
        "script, batches": ([sys.executable, str(PLAIN)], BATCH),
        "script, one row at a time": ([sys.executable, str(PLAIN)], 1),
        "accelerate, batches": ([*launch, str(LOOP)], BATCH),
    }
    ours = {"rebeca, float32": OURS, "rebeca, dtype auto": OURS.model_copy(update={"dtype": "auto"})}

    def taken(name: str, count: int) -> float:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / "out").mkdir()
            if name in ours:
                config = write_inputs(count // IMAGES_PER_USER, folder, ours[name])
                command = [sys.executable, "-c", GENERATE, config.model_dump_json()]
            else:
                program, size = scripts[name]
                write_embeddings(count, folder / "embeddings.parquet")
                command = [*program, f"{folder}/embeddings.parquet", f"{folder}/out", str(DECODER), str(size)]
            started = time.perf_counter()
            subprocess.run(command, env=environment, check=True)
            return time.perf_counter() - started

    rates: dict[str, list[float]] = {name: [] for name in (*scripts, *ours)}
    for _ in range(rounds):
        for name, measured in rates.items():
            few, many = taken(name, FEW), taken(name, MANY)
            measured.append((MANY - FEW) / (many - few))
    return {name: round(median(measured), 2) for name, measured in rates.items()}


def killed(users: int, folder: Path) -> dict[str, Any]:
    """Return the rows of both jobs after a kill and another start."""
    start_ray()
    import ray

    environment = {
        **os.environ,
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    config, expected = write_inputs(users, folder), users * IMAGES_PER_USER

    def our_files() -> list[str]:
        return [str(path) for path in folder.glob("catalog/work/*/records/*/*.json")]

    command = [sys.executable, "-c", GENERATE, config.model_dump_json()]
    kept = kill_after_first_file(command, our_files, environment)
    snapshot = read_catalog(config.catalog)
    items = snapshot.items(["item_id", "image_embeds"])
    images = snapshot.table("images")["item_id"].to_pylist()
    figures = {"rebeca": {"files_of_first_start": kept, **count_rows(images, expected)}}

    ids = items["item_id"].to_pylist()
    columns = {
        "item_id": ids,
        "image_embeds": items["image_embeds"].cast(schemas.image_embeds(EMBED_DIM)),
        "seed": [image_seed(item) % 2**62 for item in ids],
    }
    pq.write_table(pa.table(columns), folder / "embeddings.parquet")
    out = folder / "plain"
    given = [str(folder / "embeddings.parquet"), str(out), str(DECODER), str(BATCH)]
    command = [sys.executable, str(PLAIN), *given]
    kept = kill_after_first_file(command, lambda: list_files(str(out), ".parquet"), environment)
    rows = pq.read_table(out, columns=["item_id"])["item_id"].to_pylist()
    return {"script": {"files_of_first_start": kept, **count_rows(rows, expected)}, **figures}


def lines_of_code(path: Path) -> int:
    """Return the lines of a module without blank lines, and without its docstring."""
    body = path.read_text().split('"""', 2)[2]
    return sum(bool(line.strip()) for line in body.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--users", type=int, default=30)
    parts = ["rows", "jobs", "kill"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["device"] = f"two cores of {processor()}, {torch.backends.cpu.get_cpu_capability()}"
    results["lines_of_code"] = {
        "script": lines_of_code(PLAIN),
        "accelerate": lines_of_code(LOOP),
        "rebeca_ray": sum(lines_of_code(path) for path in PACKAGE.rglob("*.py")),
    }
    if "rows" in arguments.only:
        results |= in_one_process(arguments.rounds)
    if "jobs" in arguments.only:
        results["images_per_second_of_whole_jobs"] = whole_jobs(arguments.rounds)
    if "kill" in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            expected = arguments.users * IMAGES_PER_USER
            results["after_a_kill"] = {"expected": expected, **killed(arguments.users, Path(folder))}
    table = Table("figure", "value")
    for name, value in results.items():
        table.add_row(name, json.dumps(value))
    Console().print(table)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
