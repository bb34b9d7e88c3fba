"""Seconds of a steered page: four images under a vote and other settings, by a real server.

`python -m tests.bench.steering [--demo ~/rebeca-stickers]` serves the catalog of a demo. The first page loads
the models. Each further one changes a setting and a vote, and fetches its four images.
"""

import argparse
import json
import re
import statistics
import time
from html import unescape
from pathlib import Path

import httpx

from rebeca_ray.catalog.read import read_catalog
from tests.bench.gallery import served

RESULTS = Path(__file__).parent / "results" / "steering.json"
PAGES = 20


def seconds(client: httpx.Client, query: dict[str, str]) -> float:
    """Return the time of a page and its four images."""
    started = time.perf_counter()
    page = client.get("/user", params={"draw": "1", **query})
    sources = re.findall(r'src="(/steered/[^"]*)"', page.text)
    assert len(sources) == 4, page.text
    for source in sources:
        assert client.get(unescape(source)).status_code == 200
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--demo", type=Path, default=Path("~/rebeca-stickers").expanduser())
    arguments = parser.parse_args()
    root = arguments.demo / "catalog"
    items = read_catalog(str(root)).items(["user_id", "item_id"]).to_pylist()
    config = ("--config", str(arguments.demo / "generate.yaml"))
    with served(str(root), {}, *config) as (address, process):
        client = httpx.Client(base_url=address, timeout=300)
        first = seconds(client, {"id": items[0]["user_id"]})
        others = []
        for number in range(PAGES):
            item = items[4 * number]
            vote = {"id": item["user_id"], f"vote.{item['item_id']}": ("more", "less")[number % 2]}
            others.append(seconds(client, {**vote, "diversity": f"{number / PAGES:g}"}))
        figures = {
            "first page, which loads the models": first,
            "median of the others": statistics.median(others),
            "slowest of the others": max(others),
            "memory, MiB": process.memory_info().rss / 2**20,
        }
    rounded = {name: round(value, 3) for name, value in figures.items()}
    for name, value in figures.items():
        print(f"{name}: {value:.2f}")
    RESULTS.write_text(json.dumps(rounded, indent=2) + "\n")


if __name__ == "__main__":
    main()
