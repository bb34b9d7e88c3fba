"""The guidance figure: every pair of scales for the same users, noise and seeds; and the suites."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from rebeca_ray import schemas
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.evaluation import EvaluateConfig
from rebeca_ray.config.sections import NetworkSettings
from rebeca_ray.data.clip import ERROR
from rebeca_ray.decoder.build import build_decoder
from rebeca_ray.errors import InputError
from rebeca_ray.studies.guidance import check_guidable, guidance_cells, sample_guided, thinned
from rebeca_ray.studies.methods import Materials
from rebeca_ray.studies.report import guidance_plots
from rebeca_ray.studies.spaces import CLIP, Space
from tests.conftest import D, untrained_prior
from tests.studies.conftest import NUM_USERS, STUDY_USERS

HISTORY = NetworkSettings(num_layers=2, num_heads=2, width=16, num_tokens=2, user_encoder="history")


@pytest.fixture
def materials(materials: Materials) -> Materials:
    """The materials of the methods with a prior that reads histories."""
    return materials.__class__(**{**vars(materials), "prior": untrained_prior(HISTORY, D)})


def test_every_pair_of_scales_is_a_cell(
    study: EvaluateConfig, materials: Materials, tiny_decoder: DecoderSettings
) -> None:
    study = study.model_copy(
        update={
            "prior_guidance_tried": (1.0, 4.0),
            "decoder_guidance_tried": (1.0, 5.0),
            "guidance_users": 20,
            "out": study.out,
        }
    )
    seen: list[list[str]] = []

    def true_like(owners: list[str], encoded: list[bytes]) -> np.ndarray:
        seen.append(owners)
        return np.linspace(0, 1, len(encoded))

    embedded: list[bytes] = []

    def embed(batch: pa.Table) -> pa.Table:
        """Return an embedding made of the first pixels: no CLIP here fits the items."""
        encoded = [image["bytes"] for image in batch["image"].to_pylist()]
        embedded.extend(encoded)
        pixels = [np.asarray(Image.open(io.BytesIO(image))).ravel()[:D] for image in encoded]
        column = pa.FixedSizeListArray.from_arrays(
            pa.array(np.concatenate(pixels).astype(np.float32)), type=schemas.image_embeds(D)
        )
        errors = pa.nulls(len(encoded), pa.string())
        return pa.table({"item_id": batch["item_id"], "image_embeds": column, ERROR: errors})

    space = Space(name=CLIP, judge=materials.judge, embed=embed)
    cells = guidance_cells(study, materials, build_decoder(tiny_decoder), tiny_decoder, space, true_like)
    pairs = [(cell.prior_guidance_scale, cell.decoder_guidance_scale) for cell in cells]
    assert pairs == [(1, 1), (1, 5), (4, 1), (4, 5)]
    assert {(cell.users, cell.items) for cell in cells} == {(20, 60)}
    assert seen == [seen[0]] * 4
    # Every cell judges its own images.
    assert len(set(embedded)) == len(embedded) == 4 * 60
    assert len({cell.like_probability.mean for cell in cells}) == 4
    files = {path.name.rpartition("-")[0]: path.read_bytes() for path in Path(study.out, "sets").iterdir()}
    assert len(files) == len(set(files.values())) == 4
    plots = guidance_plots(cells, study.out)
    assert [plot.count("decoder 5") for plot in plots.values()] == [1, 1]


def test_guidance_moves_the_same_noise(materials: Materials) -> None:
    plain, guided, again = (sample_guided(materials, scale) for scale in (1.0, 4.0, 4.0))
    np.testing.assert_array_equal(guided, again)
    assert plain.shape == (len(materials.catalog.user_N), D)
    assert not np.allclose(plain, guided)


def test_users_are_thinned_with_their_items_and_their_ratings(materials: Materials) -> None:
    part = thinned(materials, 7)
    assert len(part.catalog.user_id) == 7
    assert (part.catalog.user_id[0], part.catalog.user_id[-1]) == (STUDY_USERS[0], STUDY_USERS[-1])
    names = materials.judge.ratings.interactions.user_id
    assert names[part.judge.user_U].tolist() == part.catalog.user_id
    items = [
        item
        for item, owner in zip(materials.catalog.item_id, materials.catalog.owners(), strict=True)
        if owner in part.catalog.user_id
    ]
    assert part.catalog.item_id == items
    assert np.bincount(part.catalog.user_N).tolist() == [3] * 7
    assert len(thinned(materials, 1000).catalog.user_id) == NUM_USERS


def test_a_prior_without_histories_is_refused(materials: Materials) -> None:
    others = materials.__class__(
        **{**vars(materials), "prior": untrained_prior(HISTORY.model_copy(update={"user_encoder": "id"}), D)}
    )
    with pytest.raises(InputError, match="the prior has the user encoder id"):
        check_guidable(others.prior)
    prior = untrained_prior(HISTORY, D)
    check_guidable(prior)
    distilled = replace(prior, sampling=prior.sampling.model_copy(update={"distilled_steps": 4}))
    with pytest.raises(InputError, match="distilled_steps=4; expected history, and no distilled prior"):
        check_guidable(distilled)


def test_a_suite_is_a_start_that_settings_override(
    study: EvaluateConfig, tiny_decoder: DecoderSettings
) -> None:
    needed = {"prior": "a", "clip": "local-dir:b", "decoder": json.loads(tiny_decoder.model_dump_json())}
    values = {**study.model_dump(exclude_unset=True), **needed}
    paper = EvaluateConfig.model_validate({**values, "suite": "paper"})
    assert paper.prior_guidance_tried == (3, 6, 9, 12, 15)
    assert paper.decoder_guidance_tried == (1, 3, 5, 7, 10)
    assert {"empty_prompt", "p1", "p2", "rebeca_p1", "rebeca_p2"} < set(paper.methods)
    fewer = EvaluateConfig.model_validate({**values, "suite": "paper", "methods": ["p1"]})
    assert (fewer.methods, fewer.prior_guidance_tried) == (("p1",), paper.prior_guidance_tried)
    assert "retrieval" in EvaluateConfig.model_validate({**values, "suite": "pipbench"}).methods
    with pytest.raises(ValueError, match="suite"):
        EvaluateConfig.model_validate({**values, "suite": "another"})


def test_both_lists_of_scales_are_needed(study: EvaluateConfig) -> None:
    values = study.model_dump(exclude_unset=True)
    with pytest.raises(ValueError, match="set both, or none"):
        EvaluateConfig.model_validate({**values, "prior_guidance_tried": [3]})
    with pytest.raises(ValueError, match="need `prior`, `decoder` and `clip`"):
        EvaluateConfig.model_validate({**values, "prior_guidance_tried": [3], "decoder_guidance_tried": [1]})
