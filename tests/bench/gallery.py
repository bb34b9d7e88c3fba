"""Milliseconds and memory of the gallery over a large catalog, on a disk and on a real S3 server.

`python -m tests.bench.gallery [--users 1000000] [--items 100000]` publishes a snapshot, once: 1.2 GB below
--data. A fresh `rebeca gallery` then serves each page. A page with its 60 thumbnails is fetched by six
connections at a time, as a browser does. Images are random bytes of a usual size.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from html import unescape
from pathlib import Path

import fsspec
import httpx
import numpy as np
import psutil
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from rebeca_ray import schemas
from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.manifest import FileList, FileRow
from rebeca_ray.generation.bucket import ITEM_ROW_GROUP
from rebeca_ray.generation.render import ROW_GROUP
from rebeca_ray.identity import bucket_of, hash128
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.objects import write_json
from rebeca_ray.storage.parquet import write_table
from tests.bench.reading import user_name
from tests.conftest import publish, synthetic_manifest
from tests.seaweedfs import free_port, seaweedfs

RESULTS = Path(__file__).parent / "results" / "gallery.json"
D, BUCKETS, CONNECTIONS, ROUNDS = 64, 128, 6, 5
IMAGE_BYTES, THUMBNAIL_BYTES = 8_000, 2_000


def synthesise(root: str, num_users: int, num_items: int) -> None:
    """Publish a snapshot in which the first users have one item each."""
    run = Run(root=root, run_date="2026-01-01", run_id="gallery", fencing_token=1)
    users: list[list[tuple[str, bool]]] = [[] for _ in range(BUCKETS)]
    for number in range(num_users):
        name = user_name(number)
        users[bucket_of(name, BUCKETS)].append((name, number < num_items))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = [
            row for part in pool.map(write_bucket, [run] * BUCKETS, range(BUCKETS), users) for row in part
        ]
    listing = f"{run.snapshot}/files-000001.parquet"
    table = pa.Table.from_pylist(rows, schema=schemas.FILES)
    files = FileList(path=listing, **write_table(table, join(root, listing), row_group_size=10_000))
    manifest = synthetic_manifest(run, files, embed_dim=D, num_buckets=BUCKETS, next_file=BUCKETS)
    write_json(manifest.model_dump(mode="json"), run.manifest)
    publish(root, run)


def write_bucket(run: Run, bucket: int, users: list[tuple[str, bool]]) -> list[FileRow]:
    """Write the tables of one bucket. Return their rows in the file list."""
    random = np.random.default_rng(bucket)
    names, with_item = [name for name, _ in users], [name for name, has_item in users if has_item]
    count = len(with_item)
    item_id = [hash128("item", name) for name in with_item]
    columns = {
        "users": {
            "user_id": names,
            "num_images": np.ones(len(names), np.int32),
            "num_items": [int(has_item) for _, has_item in users],
            "num_failed": np.zeros(len(names), np.int32),
            "cold_start": np.zeros(len(names), bool),
            "stale": np.zeros(len(names), bool),
            **{name: [name] * len(names) for name in ("history_digest", "prior", "settings_digest")},
            "generation": np.zeros(len(names), np.int32),
            "planned_on": [date(2026, 1, 1)] * len(names),
            "planned_by": ["gallery"] * len(names),
        },
        "items": {
            "item_id": item_id,
            "user_id": with_item,
            "rank": np.zeros(count, np.int16),
            "image_embeds": pa.FixedSizeListArray.from_arrays(
                pa.array(random.standard_normal(count * D, np.float32)), type=schemas.image_embeds(D)
            ),
            "like_probability": random.random(count, np.float32),
            "nearest_item_id": ["real"] * count,
            "nearest_similarity": random.random(count, np.float32),
            "safety_flag": random.random(count) < 0.0001,
            "origin": ["new"] * count,
            "generated_at": pa.repeat(pa.scalar(0, pa.timestamp("us", "UTC")), count),
            "image_file": np.full(count, bucket, np.int32),
            "image_row": np.arange(count, dtype=np.int32),
        },
        "images": {
            "item_id": item_id,
            "image": [{"bytes": picture(random, IMAGE_BYTES), "path": "random.webp"} for _ in item_id],
            "thumbnail": [picture(random, THUMBNAIL_BYTES) for _ in item_id],
            "width": np.full(count, 512, np.int32),
            "height": np.full(count, 512, np.int32),
            "safety_probability": np.zeros(count, np.float32),
            "seed": np.zeros(count, np.int64),
            "error": pa.nulls(count, pa.string()),
        },
    }
    rows: list[FileRow] = []
    for name, values in columns.items():
        schema = schemas.table(name, D)
        table = pa.table(
            [pa.array(values[field.name]).cast(field.type) for field in schema],
            schema=schema.with_metadata(schemas.FILES.metadata),
        )
        path = run.table(name, bucket)
        if name == "images":
            path = f"{run.images}/bucket={bucket}/part-000001.parquet"
        written = write_table(
            table,
            join(run.root, path),
            row_group_size=ROW_GROUP if name == "images" else ITEM_ROW_GROUP,
            embed_column="image_embeds" if name == "items" else None,
        )
        ends = {"min_user_id": min(names), "max_user_id": max(names)} if name != "images" else {}
        rows.append({"table": name, "bucket": bucket, "file": bucket, "path": path, **written, **ends})
    return rows


def picture(random: np.random.Generator, size: int) -> bytes:
    return b"RIFF" + random.bytes(size)


@contextmanager
def served(root: str, environment: dict[str, str], *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """Run `rebeca gallery` in a fresh process; yield its address."""
    port = free_port()
    command = [
        Path(sys.executable).parent / "rebeca",
        "gallery",
        root,
        "--bind",
        f"127.0.0.1:{port}",
        *options,
    ]
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            httpx.get(f"{address}/static/gallery.css")
            break
        except httpx.TransportError:
            time.sleep(0.1)
    try:
        yield address, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def milliseconds(client: httpx.Client, address: str, path: str, *, thumbnails: bool = False) -> float:
    """Return the time of a page, with its thumbnails if asked for."""
    started = time.perf_counter()
    page = client.get(address + path)
    assert page.status_code == 200, page.text
    if thumbnails:
        sources = [part.partition('"')[0] for part in page.text.split('src="/picture')[1:]]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            answers = list(
                pool.map(lambda source: client.get(f"{address}/picture{unescape(source)}"), sources)
            )
        assert [answer.status_code for answer in answers] == [200] * 60
    return 1e3 * (time.perf_counter() - started)


def measure(root: str, environment: dict[str, str], num_users: int) -> dict[str, float]:
    """Return medians over fresh servers for the first page, and over pages for the others."""
    figures: dict[str, list[float]] = {}
    for server in range(ROUNDS):
        with served(root, environment) as (address, process), httpx.Client(timeout=60) as client:

            def note(name: str, path: str, *, thumbnails: bool = False) -> None:
                taken = milliseconds(client, address, path, thumbnails=thumbnails)
                figures.setdefault(name, []).append(taken)

            note("first page", "/")
            note("first page with its 60 thumbnails", "/", thumbnails=True)
            random = np.random.default_rng(server)
            for number in random.integers(0, num_users, ROUNDS).tolist():
                note("page of users", f"/?start={number}")
                note("search by the beginning of an id", f"/?q=user-{number // 100:06d}")
                note("user", f"/user?id={user_name(number)}")
            note("60 items with their thumbnails", "/items?filter=likely&limit=1", thumbnails=True)
            note("filter: low like probability", "/items?filter=likely&limit=0.001")
            note("filter: flagged", "/items?filter=flagged")
            figures.setdefault("memory, MiB", []).append(process.memory_info().rss / 2**20)
    return {name: statistics.median(values) for name, values in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "rebeca-gallery")
    arguments = parser.parse_args()
    root = arguments.data / f"{arguments.users}-{arguments.items}"
    if not (root / "latest.json").exists():
        shutil.rmtree(root, ignore_errors=True)
        synthesise(str(root), arguments.users, arguments.items)
    results = {"disk": measure(str(root), {}, arguments.users)}
    (arguments.data / "s3").mkdir(exist_ok=True)
    with seaweedfs(arguments.data / "s3") as environment:
        os.environ.update(environment)
        fsspec.filesystem("s3").put(f"{root}/", "rebeca/gallery/", recursive=True)
        results["S3"] = measure("s3://rebeca/gallery", environment, arguments.users)
    shutil.rmtree(arguments.data / "s3", ignore_errors=True)
    table = Table("milliseconds", *results)
    for name in results["disk"]:
        table.add_row(name, *(f"{figures[name]:.0f}" for figures in results.values()))
    Console().print(table)
    settings = {"users": arguments.users, "items": arguments.items}
    RESULTS.write_text(json.dumps({**settings, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
