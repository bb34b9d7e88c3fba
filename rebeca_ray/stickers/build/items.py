"""Rebuild `assets/items.parquet` from the emoji packages of the npm registry.

`python -m rebeca_ray.stickers.build.items` takes six minutes, most of them in WebP's lossless search. It
installs five pinned packages into a scratch directory with `npm`. It draws every emoji on white at 64x64,
and writes lossless WebP. It drops flags, keycaps and components, drawings that repeat within a style or in
another one, and gendered forms of a neutral one.
"""

import argparse
import hashlib
import io
import json
import logging
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NotRequired, Required, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rebeca_ray.log import configure
from rebeca_ray.pixels import open_image
from rebeca_ray.stickers import ASSETS, IMAGE_SIZE

log = logging.getLogger(__name__)

PACKAGES = (
    "emoji-datasource-google@16.0.0",
    "emoji-datasource-twitter@16.0.0",
    "@iconify-json/fluent-emoji@1.2.7",
    "@iconify-json/fluent-emoji-flat@1.2.6",
    "@iconify-json/fluent-emoji-high-contrast@1.2.6",
)
DATASOURCE = {
    "noto": ("emoji-datasource-google", "img/google/64"),
    "twemoji": ("emoji-datasource-twitter", "img/twitter/64"),
}
ICONIFY = {
    "fluent": "@iconify-json/fluent-emoji",
    "flat": "@iconify-json/fluent-emoji-flat",
    "contrast": "@iconify-json/fluent-emoji-high-contrast",
}
# Mean absolute difference of 8-bit pixels. Two styles that differ less have the same drawing.
SAME_DRAWING = 4.0
SKIPPED_CATEGORIES = {"Flags", "Component"}
SKIPPED_SUBCATEGORIES = {"keycap", "skin-tone"}


class Emoji(TypedDict):
    """One entry of `emoji.json`: the keys that are read here."""

    unified: str  # code points
    non_qualified: str | None
    name: str
    category: str
    subcategory: str
    sort_order: int
    image: str


class Icon(TypedDict, total=False):
    """One icon of an iconify set. Its set may hold the size."""

    body: Required[str]
    width: float
    height: float
    left: float
    top: float


class IconSet(TypedDict):
    """The `icons.json` of an iconify package: the keys that are read here."""

    icons: dict[str, Icon]
    aliases: NotRequired[dict[str, dict[str, str]]]
    width: NotRequired[float]
    height: NotRequired[float]


class ItemRow(TypedDict):
    """One row of `items.parquet`."""

    item_id: str
    image: dict[str, bytes | str]
    style: str
    category: str
    subcategory: str
    name: str


def on_white(image: Image.Image) -> Image.Image:
    """Flatten transparency onto white at the catalog's size."""
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    flat = Image.alpha_composite(white, rgba).convert("RGB")
    return (
        flat
        if flat.size == (IMAGE_SIZE, IMAGE_SIZE)
        else flat.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    )


def draw_icon(icons: IconSet, name: str) -> Image.Image | None:
    """Draw one icon of an iconify set, also by an alias. Return None if the set has no such icon."""
    import resvg_py

    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    if name not in icons["icons"]:
        return None
    icon = icons["icons"][name]
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    left, top = icon.get("left", 0), icon.get("top", 0)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}" color="black">'
        f"{icon['body']}</svg>"
    )
    # No icon holds text. Without system fonts, every machine draws the same pixels.
    png = bytes(
        resvg_py.svg_to_bytes(svg_string=svg, width=IMAGE_SIZE, height=IMAGE_SIZE, skip_system_fonts=True)
    )
    return open_image(png)


def icon_of(entry: Emoji, names: dict[str, str]) -> str | None:
    """Return iconify's name of an emoji, by its code points with or without variation selectors."""
    code = entry["unified"].lower()
    spellings = (code, (entry["non_qualified"] or code).lower(), code.replace("-fe0f", ""))
    return next((names[spelling] for spelling in spellings if spelling in names), None)


def sticker_name(entry: Emoji, names: dict[str, str]) -> str:
    """Return one name for all styles: iconify's if it has one, else Unicode's."""
    icon_name = icon_of(entry, names)
    return icon_name.replace("-", " ") if icon_name else entry["name"].lower()


def has_neutral_form(name: str, names: set[str]) -> bool:
    """Return whether "person rowing boat" exists beside "man rowing boat".

    Such triples would be a sixth of the items.
    """
    gendered = re.match(r"(?:man|woman|men|women) (.+)", name)
    if gendered is None:
        return False
    rest = gendered[1]
    return bool({f"person {rest}", f"people {rest}", rest} & names)


def drawings(node_modules: Path) -> Iterator[tuple[dict[str, str], Image.Image]]:
    """Yield `(columns, image)` for every drawing, in a fixed order."""
    entries = json.loads((node_modules / "emoji-datasource-google" / "emoji.json").read_text())
    emoji: list[Emoji] = [
        entry
        for entry in entries
        if entry["category"] not in SKIPPED_CATEGORIES and entry["subcategory"] not in SKIPPED_SUBCATEGORIES
    ]
    emoji.sort(key=lambda entry: (entry["sort_order"], entry["unified"]))
    names = json.loads((node_modules / ICONIFY["flat"] / "chars.json").read_text())
    all_names = {sticker_name(entry, names) for entry in emoji}
    icon_sets: dict[str, IconSet] = {
        style: json.loads((node_modules / package / "icons.json").read_text())
        for style, package in ICONIFY.items()
    }
    for entry in emoji:
        name = sticker_name(entry, names)
        if has_neutral_form(name, all_names):
            continue
        code, icon_name = entry["unified"].lower(), icon_of(entry, names)
        columns = {"category": entry["category"], "subcategory": entry["subcategory"], "name": name}
        for style, (package, folder) in DATASOURCE.items():
            path = node_modules / package / folder / entry["image"]
            if path.exists():
                yield {"item_id": f"{style}-{code}", "style": style, **columns}, open_image(path.read_bytes())
        for style, icons in icon_sets.items():
            image = draw_icon(icons, icon_name) if icon_name else None
            if image is not None:
                yield {"item_id": f"{style}-{code}", "style": style, **columns}, image


def build_items(node_modules: Path) -> pa.Table:
    """Return all drawings as a table with the columns of `ItemRow`, in a fixed order."""
    rows: list[ItemRow] = []
    seen: set[tuple[str, str]] = set()
    same_name: dict[str, list[np.ndarray]] = {}
    for columns, drawing in drawings(node_modules):
        image = on_white(drawing)
        pixels = np.asarray(image).astype(np.int16)
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        others = same_name.setdefault(columns["name"], [])
        if (columns["style"], digest) in seen or any(
            np.abs(pixels - other).mean() < SAME_DRAWING for other in others
        ):
            continue
        seen.add((columns["style"], digest))
        others.append(pixels)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", lossless=True, quality=100, method=6)
        rows.append(
            ItemRow(
                item_id=columns["item_id"],
                image={"bytes": buffer.getvalue(), "path": f"{columns['item_id']}.webp"},
                style=columns["style"],
                category=columns["category"],
                subcategory=columns["subcategory"],
                name=columns["name"],
            )
        )
    rows.sort(key=lambda row: row["item_id"])
    schema = pa.schema(
        [
            ("item_id", pa.string()),
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("style", pa.string()),
            ("category", pa.string()),
            ("subcategory", pa.string()),
            ("name", pa.string()),
        ]
    )
    return pa.Table.from_pylist(rows, schema=schema)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--node-modules", type=Path, help="folder with the installed packages, in place of running npm"
    )
    parser.add_argument("--out", type=Path, default=ASSETS / "items.parquet")
    args = parser.parse_args()
    configure()
    with tempfile.TemporaryDirectory() as scratch:
        if args.node_modules is None:
            subprocess.run(
                ["npm", "install", "--silent", "--no-save", "--prefix", scratch, *PACKAGES], check=True
            )
        table = build_items(args.node_modules or Path(scratch) / "node_modules")
    pq.write_table(
        table,
        args.out,
        compression="zstd",
        row_group_size=1000,
        use_dictionary=["style", "category", "subcategory", "name"],
    )
    log.info(f"{args.out}: {table.num_rows} items, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
