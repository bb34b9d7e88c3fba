"""The truth check and the page of the demo, on a small run of the bundled decoder in this process."""

import html
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rebeca_ray import schemas
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import InteractionSettings, SamplerSettings
from rebeca_ray.data.histories import build_histories, user_table
from rebeca_ray.data.interactions import read_interactions
from rebeca_ray.prior.checkpoint import load_prior
from rebeca_ray.prior.selector import Selector
from rebeca_ray.schemas import TRAINING
from rebeca_ray.stickers import DECODER, EMBED_DIM
from rebeca_ray.stickers.build.data import load_stickers
from rebeca_ray.stickers.demo import check_truth, retrieved_items
from rebeca_ray.stickers.judge import Judge
from rebeca_ray.stickers.report import write_report
from rebeca_ray.stickers.simulate import load_world, simulate
from rebeca_ray.stickers.truth import RETRIEVAL, Truth
from tests.conftest import snapshot_of, write_tiny_prior


def write_real_items(folder: Path) -> str:
    """Write all stickers with random embeddings, in another order than their own."""
    item_id = load_world().item_id[::-1]
    embeds = np.random.default_rng(0).standard_normal((len(item_id), EMBED_DIM)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeds.ravel()), type=schemas.image_embeds(EMBED_DIM))
    pq.write_table(pa.table({"item_id": item_id, "image_embeds": column}), folder / "items.parquet")
    return str(folder / "items.parquet")


def demo_config(folder: Path) -> GenerateConfig:
    """Simulate users in a folder, and return the config of a night that hides their hold-out."""
    simulate(40, 0, folder, num_requested=14)
    settings = InteractionSettings(path=str(folder / "interactions.parquet"), hold_out=0.05, test=0.1)
    histories = build_histories(settings, load_world().item_id, str(folder))
    torch.manual_seed(0)
    prior = write_tiny_prior(
        folder,
        users=user_table(histories),
        embed_dim=EMBED_DIM,
        norm=16.0,
        selector=Selector(EMBED_DIM, 8),
    )
    return GenerateConfig(
        prior=prior,
        decoder=DecoderSettings(
            model=str(DECODER), num_inference_steps=1, decoder_guidance_scale=1.0, image_format="WEBP"
        ),
        request=str(folder / "request.parquet"),
        interactions=settings,
        hide_hold_out=True,
        items=write_real_items(folder),
        catalog=str(folder / "catalog"),
        num_images=2,
        sampler=SamplerSettings(num_inference_steps=3),
    )


def test_the_truth_check_and_the_page(tmp_path: Path) -> None:
    config = demo_config(tmp_path)
    assert config.interactions is not None
    interactions = read_interactions(config.interactions)
    assert snapshot_of(config).counts.requested == 28
    snapshot, judge = read_catalog(config.catalog), Judge()

    check = check_truth(tmp_path, judge, load_stickers(), interactions, snapshot, config)
    assert all(0 < figure < 1 for _, _, figure in check.rows())
    assert check.held_out > 1.5 * check.random_real  # users like the held-out items that they rated well
    assert 0.5 < check.ratio_to_shuffled < 2  # an untrained prior knows no user
    truth = Truth(tmp_path / "truth.parquet", judge, pq.read_table(config.request)["user_id"].to_pylist())
    for diversity, figure in ((0.0, check.retrieved), (0.15, check.retrieved_with_mmr)):
        owners, rows = retrieved_items(
            load_prior(config.prior), config, interactions, load_stickers(), list(truth.row), diversity
        )
        assert owners == [user for user in truth.row for _ in range(2)]
        images = load_stickers().image_NCHW[torch.from_numpy(rows)].permute(0, 2, 3, 1).numpy()
        assert figure == pytest.approx(truth.like_probability(owners, images).mean())

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
    assert f"{check.retrieved_with_mmr:.3f}" in page
    assert RETRIEVAL in html.unescape(page)
    assert f"{check.ratio_to_shuffled:.2f}" in page
    assert [len(points.split()) for points in re.findall(r'<polyline[^>]*points="([^"]*)"', page)] == [2, 2]
    for user in re.findall(r"<b>(user[^<]*)</b>", page):
        assert user in pq.read_table(config.request)["user_id"].to_pylist()


def test_retrieval_reads_the_training_ratings_alone_and_may_return_the_hold_out(tmp_path: Path) -> None:
    config, stickers = demo_config(tmp_path), load_stickers()
    assert config.interactions is not None
    interactions, prior = read_interactions(config.interactions), load_prior(config.prior)
    users = interactions.user_id[:3].tolist()

    def retrieved(num_images: int, changed: np.ndarray) -> list[np.ndarray]:
        """Return the rows of each user, with the likes of the `changed` ratings turned into dislikes."""
        likes = np.where(changed, 0, interactions.like).astype(np.int8)
        owners, rows = retrieved_items(
            prior,
            config.model_copy(update={"num_images": num_images}),
            replace(interactions, like=likes),
            stickers,
            users,
            diversity=0.0,
        )
        return [rows[[owner == user for owner in owners]] for user in users]

    nothing = np.zeros(len(interactions.like), bool)
    plain = retrieved(5, nothing)
    np.testing.assert_array_equal(plain, retrieved(5, interactions.split != TRAINING))
    assert not np.array_equal(plain, retrieved(5, interactions.split == TRAINING))

    row_of = {item: row for row, item in enumerate(stickers.item_id)}
    for user, rows in enumerate(retrieved(len(row_of), nothing)):
        is_training = (interactions.user_index == user) & (interactions.split == TRAINING)
        rated = {row_of[item] for item in interactions.item_id[is_training]}
        assert set(rows.tolist()) == set(row_of.values()) - rated
