"""The truth check and the page of the demo, on a small run of the bundled decoder in this process."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rebeca_ray import schemas
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import InteractionSettings, SamplerSettings
from rebeca_ray.data.histories import build_histories, user_table
from rebeca_ray.data.interactions import read_interactions
from rebeca_ray.stickers import DECODER, EMBED_DIM
from rebeca_ray.stickers.build.data import load_stickers
from rebeca_ray.stickers.demo import check_truth
from rebeca_ray.stickers.judge import Judge
from rebeca_ray.stickers.report import write_report
from rebeca_ray.stickers.simulate import load_world, simulate
from tests.conftest import snapshot_of, write_tiny_prior


def write_real_items(folder: Path) -> str:
    column = pa.FixedSizeListArray.from_arrays(
        pa.array(np.ones(EMBED_DIM, np.float32)), type=schemas.image_embeds(EMBED_DIM)
    )
    pq.write_table(pa.table({"item_id": ["one"], "image_embeds": column}), folder / "items.parquet")
    return str(folder / "items.parquet")


def test_the_truth_check_and_the_page(tmp_path: Path) -> None:
    simulate(40, 0, tmp_path, num_requested=14)
    settings = InteractionSettings(path=str(tmp_path / "interactions.parquet"))
    interactions = read_interactions(settings)
    histories = build_histories(settings, load_world().item_id, str(tmp_path))
    config = GenerateConfig(
        prior=write_tiny_prior(tmp_path, users=user_table(histories), embed_dim=EMBED_DIM, norm=16.0),
        decoder=DecoderSettings(
            model=str(DECODER), num_inference_steps=1, decoder_guidance_scale=1.0, image_format="WEBP"
        ),
        request=str(tmp_path / "request.parquet"),
        items=write_real_items(tmp_path),
        catalog=str(tmp_path / "catalog"),
        num_images=2,
        sampler=SamplerSettings(num_inference_steps=3),
    )
    assert snapshot_of(config).counts.requested == 28
    snapshot, judge = read_catalog(config.catalog), Judge()

    check = check_truth(tmp_path, judge, load_stickers(), interactions, snapshot, config)
    assert all(0 < figure < 1 for _, _, figure in check.rows())
    assert check.held_out > 1.5 * check.random_real  # users like the held-out items that they rated well
    assert 0.5 < check.ratio_to_shuffled < 2  # an untrained prior knows no user

    page = write_report(
        tmp_path,
        prior=Path(config.prior),
        snapshot=snapshot,
        interactions=interactions,
        check=check,
        judge=judge,
        phases={"Plan": 1.5},
    ).read_text()
    liked, generated = page.count('alt="liked sticker"'), page.count('alt="generated sticker"')
    assert generated == 12 * 2
    assert 12 * 3 <= liked <= 12 * 9
    assert not re.findall(r'(?:src|href)="(?!data:)[^"]*"', page)  # self-contained
    assert f"{check.matched:.3f}" in page
    assert f"{check.ratio_to_shuffled:.2f}" in page
    assert [len(points.split()) for points in re.findall(r'<polyline[^>]*points="([^"]*)"', page)] == [2, 2]
    for user in re.findall(r"<b>(user[^<]*)</b>", page):
        assert user in pq.read_table(config.request)["user_id"].to_pylist()
