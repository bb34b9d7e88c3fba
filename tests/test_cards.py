"""The cards of the bundled models and data: each count is that of the files."""

import re
from collections import Counter
from math import prod
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from safetensors import safe_open

from rebeca_ray.stickers import CLIP, DECODER, ITEMS, JUDGE, is_held_out
from rebeca_ray.stickers.build.captions import VOCAB_SIZE
from rebeca_ray.stickers.judge import Judge
from rebeca_ray.stickers.simulate import simulate
from tests.conftest import REPO

DOCS = REPO / "infra" / "docs"
PAGE = (DOCS / "cards.md").read_text()


def card(name: str) -> str:
    """Return the text below a heading, on one line."""
    return " ".join(PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0].split())


def test_every_bundled_model_has_its_size_and_its_count() -> None:
    rows = re.findall(r"^\|[^|]+\| `([\w/.-]+)` \| ([\d,]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    package = REPO / "rebeca_ray"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.safetensors")}
    assert {path for path, _, _ in rows} == files
    for path, values, megabytes in rows:
        with safe_open(package / path, framework="np") as weights:
            slices = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118
            # Batch normalisation counts its batches in int64; that is no weight.
            kinds = Counter({item.get_dtype(): 0 for item in slices})
            for item in slices:
                kinds[item.get_dtype()] += prod(item.get_shape())
        assert f"{sum(kinds.values()) - kinds['I64']:,}" == values, path
        assert f"{(package / path).stat().st_size / 1e6:.1f}" == megabytes, path
        assert set(kinds) - {"I64"} == ({"U8", "F64"} if "safety" in path else {"F16"}), path


def test_the_card_of_the_stickers_counts_their_rows() -> None:
    table = pq.read_table(ITEMS, columns=["style", "category", "subcategory", "name"])
    names = table["name"].to_pylist()
    held_out = [name for name in names if is_held_out(name)]
    classes = [len(table[column].unique()) for column in table.column_names]
    text = card("Stickers")
    assert f"| content | {len(names):,} emoji drawings" in text
    assert f"| training | {len(names) - len(held_out):,} drawings |" in text
    assert f"| held out | {len(held_out):,} drawings, of {len(set(held_out))} names" in text
    assert "{} styles, {} categories, {} subcategories, {:,} names".format(*classes) in text
    fields = ", ".join(f"`{name}`" for name in pq.read_schema(ITEMS).names)
    assert f"| fields | {fields} |" in text
    drawings = re.findall(r"\| (\w+) \| [^|]+ \| ([\d,]+) \| (?:Apache-2.0|CC BY 4.0|MIT) \|", text)
    assert {style: int(count.replace(",", "")) for style, count in drawings} == Counter(
        table["style"].to_pylist()
    )


def test_the_card_of_the_users_counts_their_ratings(tmp_path: Path) -> None:
    ratings = simulate(200, 0, tmp_path)
    table = pq.read_table(tmp_path / "interactions.parquet", columns=["user_id", "rating"])
    per_user = np.array(list(Counter(table["user_id"].to_pylist()).values()))
    text = card("Simulated users")
    assert f"| ratings | {ratings:,}, from 1 to 5 |" in text
    assert set(table["rating"].to_pylist()) == {1.0, 2.0, 3.0, 4.0, 5.0}
    assert f"| {(table['rating'].to_numpy() >= 4).mean():.1%} |" in text
    median = f"with a median of {np.median(per_user):g}"
    assert f"| {per_user.min()} to {per_user.max()}, {median} |" in text
    assert {path.name for path in tmp_path.iterdir()} == set(re.findall(r"`(\w+\.parquet)`", text))


def test_the_cards_name_the_steps_of_the_loss_curves() -> None:
    def steps(folder: Path) -> int:
        curves = folder.glob("training*.csv")
        return sum(int(curve.read_text().splitlines()[-1].split(",")[0]) for curve in curves)

    assert f"from scratch, {steps(CLIP):,} steps" in card("CLIP")
    assert f"{VOCAB_SIZE:,} tokens" in card("CLIP")
    assert f"from scratch, {steps(JUDGE):,} steps" in card("Judge")
    assert f"they cover {steps(DECODER / 'vae'):,} and {steps(DECODER):,} of these steps" in card("Decoder")


def test_the_quality_on_the_cards_is_that_of_the_results() -> None:
    results = (DOCS / "results.md").read_text()
    judge = Judge()
    style, category, subcategory = (
        f"{judge.held_out_accuracy[name]:.1%}" for name in ("style", "category", "subcategory")
    )
    assert f"{style} of styles, {category} of categories, {subcategory} of subcategories" in card("Judge")
    rows = {
        "linear probe on the CLIP's embeddings": ("CLIP", "{} of styles and {} of categories"),
        "images decoded from 240 held-out items' embeddings": (
            "Decoder",
            "{} of styles and {} of categories",
        ),
        "images decoded from 240 trained items' embeddings": ("Decoder", "{} and {}"),
        "images from a text prompt alone": ("Decoder", "{} and {}"),
    }
    for row, (name, sentence) in rows.items():
        ((left, right),) = re.findall(rf"^\| {row} \| (\S+) \| (\S+) \|$", results, re.MULTILINE)
        assert sentence.format(left, right) in card(name), row
    autocoder, unet = re.findall(r"trained for ([\d,]+) steps, the UNet for ([\d,]+)", results)[0]
    assert f"{autocoder} steps of the autoencoder, {unet} of the UNet" in card("Decoder")
    alarms = re.findall(r"at `max_probability` 0\.5 \| (\d+) \(", (DOCS / "decoder.md").read_text())[0]
    assert f"| false alarms | {alarms} of 7,096 stickers" in card("Safety checker")
