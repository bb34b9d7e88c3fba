"""Bytes and milliseconds to open a large catalog, to look up a user, and to scan columns.

`python -m tests.bench.reading [--users 1000000]` makes a snapshot with ten items per user at D = 256, once.
A million users take some minutes, and 5 GB below --data. It reads the snapshot from the disk and from a
real S3 server on this machine, and writes `tests/bench/results/reading.json`. Images are small stand-ins, a
hundred per bucket. The reader's file system counts the bytes. The times are taken without counting.
"""

import argparse
import io
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.spec import AbstractFileSystem
from PIL import Image

from rebeca_ray import schemas
from rebeca_ray.catalog import read, row_groups
from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.manifest import FileList, FileRow
from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.generation.bucket import ITEM_ROW_GROUP
from rebeca_ray.identity import bucket_of, hash128
from rebeca_ray.storage.filesystem import arrow_filesystem, exists, join, open_filesystem
from rebeca_ray.storage.objects import write_json
from rebeca_ray.storage.parquet import write_table
from rebeca_ray.storage.store import open_store
from tests.conftest import synthetic_manifest
from tests.seaweedfs import seaweedfs

ITEMS_PER_USER, D, BUCKETS, STAND_INS, LOOKUPS = 10, 256, 128, 100, 300
SLIM = ["item_id", "rank", "like_probability", "nearest_item_id", "origin", "image_file", "image_row"]
SCANNED = ["user_id", "item_id", "rank", "like_probability"]


def synthesise(root: str, num_users: int) -> None:
    """Publish a snapshot, written bucket by bucket as the job writes it."""
    run = Run(root=root, run_date="2026-01-01", run_id="reading", fencing_token=1)
    users: list[list[str]] = [[] for _ in range(BUCKETS)]
    for number in range(num_users):
        name = user_name(number)
        users[bucket_of(name, BUCKETS)].append(name)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = [
            row for part in pool.map(write_bucket, [run] * BUCKETS, range(BUCKETS), users) for row in part
        ]
    listing = f"{run.snapshot}/files-000001.parquet"
    written = write_table(
        pa.Table.from_pylist(rows, schema=schemas.FILES), join(root, listing), row_group_size=10_000
    )
    files = FileList(path=listing, **written)
    manifest = synthetic_manifest(run, files, embed_dim=D, num_buckets=BUCKETS, next_file=BUCKETS)
    write_json(manifest.model_dump(mode="json"), run.manifest)
    with hold_lease(root, run.run_id, 60) as lease:
        lease.publish(run_id=run.run_id, run_date=run.run_date, snapshot=run.snapshot)


def user_name(number: int) -> str:
    return f"user-{number:08d}"


def write_bucket(run: Run, bucket: int, users: list[str]) -> list[FileRow]:
    """Write items and stand-in images of one bucket. Return their rows in the file list."""
    random = np.random.default_rng(bucket)
    users, count = sorted(users), len(users) * ITEMS_PER_USER
    item_id = [hash128("item", bucket, number) for number in range(count)]
    embeds = random.standard_normal((count, D), np.float32).astype(np.float16).astype(np.float32)
    columns = {
        "item_id": item_id,
        "user_id": np.repeat(users, ITEMS_PER_USER),
        "rank": np.tile(np.arange(ITEMS_PER_USER), len(users)),
        "image_embeds": pa.FixedSizeListArray.from_arrays(
            pa.array(embeds.ravel()), type=schemas.image_embeds(D)
        ),
        "like_probability": random.random(count, np.float32),
        "nearest_item_id": [f"real-{number}" for number in random.integers(0, 100_000, count)],
        "nearest_similarity": random.random(count, np.float32),
        "safety_flag": np.zeros(count, bool),
        "origin": np.where(random.random(count) < 0.05, "new", "carried"),
        "generated_at": pa.repeat(pa.scalar(0, pa.timestamp("us", "UTC")), count),
        "image_file": np.full(count, bucket),
        "image_row": random.integers(0, STAND_INS, count),
    }
    schema = schemas.items(D).with_metadata(schemas.FILES.metadata)
    items = pa.table(
        [pa.array(columns[name]).cast(schema.field(name).type) for name in schema.names], schema=schema
    )
    picture = io.BytesIO()
    Image.new("RGB", (16, 16), tuple(random.integers(0, 256, 3).tolist())).save(picture, "WEBP")
    image = {
        "image": {"bytes": picture.getvalue(), "path": "stand-in.webp"},
        "width": 16,
        "height": 16,
        "seed": 0,
    }
    images = pa.Table.from_pylist(
        [{**image, "item_id": item} for item in item_id[:STAND_INS]], schema=schemas.IMAGES
    )
    rows: list[FileRow] = []
    for name, table, embed_column in (("items", items, "image_embeds"), ("images", images, None)):
        path = (
            run.table("items", bucket)
            if name == "items"
            else f"{run.images}/bucket={bucket}/part-000001.parquet"
        )
        written = write_table(
            table, join(run.root, path), row_group_size=ITEM_ROW_GROUP, embed_column=embed_column
        )
        rows.append(
            {
                "table": name,
                "bucket": bucket,
                "file": bucket,
                "path": path,
                "rows": written["rows"],
                "bytes": written["bytes"],
                "sha256": written["sha256"],
                "min_user_id": users[0],
                "max_user_id": users[-1],
            }
        )
    return rows


class Counting(AbstractFileSystem):  # type: ignore[misc]
    """Count the reads of another file system."""

    cachable = False

    def __init__(self, inner: AbstractFileSystem) -> None:
        super().__init__()
        self.inner, self.bytes, self.requests = inner, 0, 0

    def info(self, path: str, **options: Any) -> Any:
        return self.inner.info(path, **options)

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return CountedFile(self, self.inner.open(path, mode, **options))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        return self.count(self.inner.cat_file(path, start, end, **options))

    def count(self, data: bytes) -> bytes:
        self.bytes += len(data)
        self.requests += 1
        return data


class CountedFile(io.RawIOBase):
    def __init__(self, counting: Counting, file: Any) -> None:
        self.counting, self.file = counting, file

    def read(self, size: int = -1) -> bytes:
        return self.counting.count(self.file.read(size))

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.file.seek(offset, whence))

    def tell(self) -> int:
        return int(self.file.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()


@contextmanager
def counted(root: str) -> Iterator[Counting]:
    """Give the reader a file system that counts the bytes it reads of data files."""
    filesystem, _ = open_filesystem(root)
    counting = Counting(filesystem)

    def opened(uri: str) -> tuple[AbstractFileSystem, str]:
        return counting, open_filesystem(uri)[1]

    def opened_store(uri: str) -> SimpleNamespace:
        return SimpleNamespace(path=open_store(uri).path, scan_filesystem=lambda: arrow_filesystem(counting))

    with patch.object(read, "open_store", opened_store), patch.object(row_groups, "open_filesystem", opened):
        yield counting


def lookups(snapshot: Snapshot, num_users: int, columns: list[str] | None) -> dict[str, float]:
    """Look up random users.

    Return bytes and requests per user, with and without cached footers, and milliseconds with cached footers.
    """
    users = [
        user_name(number) for number in np.random.default_rng(0).integers(0, num_users, LOOKUPS).tolist()
    ]
    row_groups.footer_bytes.cache_clear()
    first: list[int] = []
    after: list[int] = []
    requests: list[int] = []
    with counted(snapshot.root) as counting:
        for sizes in (first, after):
            for user in users:
                misses = row_groups.footer_bytes.cache_info().misses
                requests_before, bytes_before = counting.requests, counting.bytes
                assert snapshot.for_user(user, columns).num_rows == ITEMS_PER_USER
                if sizes is after or row_groups.footer_bytes.cache_info().misses > misses:
                    sizes.append(counting.bytes - bytes_before)
                requests.append(counting.requests - requests_before)
    times = []
    for user in users:
        started = time.perf_counter()
        snapshot.for_user(user, columns)
        times.append(1e3 * (time.perf_counter() - started))
    return {
        "first_of_a_file_kb_max": max(first) / 1e3,
        "kb_median": statistics.median(after) / 1e3,
        "kb_max": max(after) / 1e3,
        "requests_max": max(requests[LOOKUPS:]),
        "ms_median": statistics.median(times),
        "ms_p99": float(np.quantile(times, 0.99)),
    }


def scan(snapshot: Snapshot, columns: list[str]) -> dict[str, float]:
    """Scan all rows of some columns. Return the bytes read per byte of these columns."""
    filesystem, base = open_filesystem(snapshot.root)
    needed = 0
    for path in snapshot.paths("items"):
        with filesystem.open(join(base, path), "rb", cache_type="none") as file:
            metadata = pq.read_metadata(file)
        chunks = (
            metadata.row_group(group).column(column)
            for group in range(metadata.num_row_groups)
            for column in range(metadata.num_columns)
        )
        needed += sum(
            chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns
        )
    with counted(snapshot.root) as counting:
        rows = sum(batch.num_rows for batch in snapshot.dataset("items").to_batches(columns=columns))
    started = time.perf_counter()
    for _ in snapshot.dataset("items").to_batches(columns=columns):
        pass
    return {
        "rows": rows,
        "needed_mb": needed / 1e6,
        "read_mb": counting.bytes / 1e6,
        "ratio": counting.bytes / needed,
        "seconds": time.perf_counter() - started,
    }


def opening(root: str) -> dict[str, float]:
    """Return the seconds to open a catalog, the first time in a process and later."""
    times = []
    for _ in range(10):
        started = time.perf_counter()
        read_catalog(root)
        times.append(time.perf_counter() - started)
    snapshot = read_catalog(root)
    started = time.perf_counter()
    for _ in range(10):
        assert snapshot.refresh() is snapshot
    return {
        "first_seconds": times[0],
        "seconds": statistics.median(times[1:]),
        "refresh_ms": 100 * (time.perf_counter() - started),
    }


def images(snapshot: Snapshot, num_users: int) -> dict[str, float]:
    """Return the milliseconds to read the images of one user's items (stand-ins of some hundred bytes)."""
    times = []
    for number in np.random.default_rng(1).integers(0, num_users, 50).tolist():
        items = snapshot.for_user(user_name(number), ["image_file", "image_row"])
        started = time.perf_counter()
        assert all(snapshot.images(items))
        times.append(1e3 * (time.perf_counter() - started))
    return {"ms_median": statistics.median(times)}


def measure(root: str, num_users: int) -> dict[str, dict[str, float]]:
    opened = opening(root)
    snapshot = read_catalog(root)
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "a user without embeddings": lambda: lookups(snapshot, num_users, SLIM),
        "a user with everything": lambda: lookups(snapshot, num_users, None),
        "a user's images": lambda: images(snapshot, num_users),
        "scan of four columns": lambda: scan(snapshot, SCANNED),
        "scan of embeddings": lambda: scan(snapshot, ["user_id", "image_embeds"]),
    }
    figures = {"opening": opened}
    print("opening", rounded(opened), flush=True)
    for name, part in parts.items():
        figures[name] = part()
        print(name, rounded(figures[name]), flush=True)
    return {name: rounded(part) for name, part in figures.items()}


def rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "rebeca-reading")
    arguments = parser.parse_args()
    root = str(arguments.data / f"catalog-{arguments.users}")
    if not exists(join(root, "latest.json")):
        shutil.rmtree(root, ignore_errors=True)
        started = time.perf_counter()
        synthesise(root, arguments.users)
        print(f"made {root} in {time.perf_counter() - started:.0f} s", flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    result: dict[str, Any] = {
        "machine": machine,
        "users": arguments.users,
        "items": arguments.users * ITEMS_PER_USER,
        "embed_dim": D,
        "buckets": BUCKETS,
    }
    result["local"] = measure(root, arguments.users)
    with tempfile.TemporaryDirectory(dir=arguments.data) as folder, seaweedfs(Path(folder)) as environment:
        os.environ.update(environment)
        filesystem, _ = open_filesystem("s3://rebeca/catalog")
        filesystem.put(f"{root}/", "rebeca/catalog/", recursive=True)
        result["s3"] = measure("s3://rebeca/catalog", arguments.users)
    path = Path(__file__).parent / "results" / "reading.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
