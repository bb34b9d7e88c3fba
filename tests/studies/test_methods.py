"""Methods to compare a catalog with: the same users, counts and seeds, and no item that the user rated."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from rebeca_ray.config.decoder import DecoderSettings, SafetySettings
from rebeca_ray.config.evaluation import EvaluateConfig, Method
from rebeca_ray.decoder.build import build_decoder
from rebeca_ray.decoder.interface import DecodedImage, Rows
from rebeca_ray.errors import InputError, StorageError
from rebeca_ray.schemas import TRAINING
from rebeca_ray.studies.drawing import draw_set, without_gaps
from rebeca_ray.studies.methods import Materials, Prompt, Wishes, real_rows, wishes_of
from rebeca_ray.studies.sets import ItemSet
from tests.studies.conftest import ITEMS_PER_TASTE, TASTES, WORDS

REAL = ("nearest_to_mean", "retrieval", "best_by_verifier", "most_popular", "random")


def test_each_method_has_an_embedding_per_item_of_the_catalog(materials: Materials) -> None:
    for method in get_args(Method):
        wishes = wishes_of(method, materials)
        assert wishes.embeds_ND.shape == materials.catalog.embeds_ND.shape
        assert np.isfinite(wishes.embeds_ND).all()
        is_prompt_alone = method in ("empty_prompt", "p1", "p2", "persona")
        assert (wishes.ip_adapter_scale == 0) == is_prompt_alone
        assert wishes.embeds_ND.any() == (not is_prompt_alone)
        assert (wishes.prompt != Prompt.NONE) == method.endswith(("p1", "p2"))


def test_a_persona_has_the_words_of_the_users_taste(materials: Materials) -> None:
    wishes = wishes_of("persona", materials)
    assert wishes.prompts is not None
    for prompt, negative, user in zip(*wishes.prompts, materials.catalog.user_N.tolist(), strict=True):
        liked = set(WORDS[user % TASTES].split())
        assert set(prompt.split(", ")) == liked
        assert set(negative.split(", ")) == set(" ".join(WORDS).split()) - liked
    with pytest.raises(InputError, match="method persona: there are no captions"):
        wishes_of("persona", replace(materials, captions=[]))


def test_picked_items_are_unrated_and_differ(materials: Materials) -> None:
    ratings = materials.judge.ratings
    for method in REAL:
        for user, picked in enumerate(materials.catalog.by_user(real_rows(method, materials))):
            assert not set(picked.tolist()) & set(ratings.rows_of(user).tolist())
            assert len(set(picked.tolist())) == len(picked) == 3
            if method in ("nearest_to_mean", "best_by_verifier"):
                assert set(picked // ITEMS_PER_TASTE) == {user % TASTES}


def test_the_most_popular_items_are_those_of_most_training_likes(materials: Materials) -> None:
    ratings = materials.judge.ratings
    liked = (ratings.interactions.split == TRAINING) & (ratings.interactions.like == 1)
    likes_I = np.bincount(ratings.item_N[liked], minlength=len(ratings.items.item_id))
    for user, picked in enumerate(materials.catalog.by_user(real_rows("most_popular", materials))):
        others = np.setdiff1d(np.arange(len(likes_I)), [*ratings.rows_of(user), *picked])
        assert likes_I[picked].min() >= likes_I[others].max()


def test_the_catalogs_embeddings_give_its_images_once(
    materials: Materials, tiny_decoder: DecoderSettings, tmp_path: Path
) -> None:
    """The same decoder and seeds as a night's; a second start reads the images from a file."""
    catalog, out = materials.catalog, str(tmp_path / "out")
    wishes = Wishes(embeds_ND=catalog.embeds_ND)
    drawn = draw_set("again", wishes, catalog, build_decoder(tiny_decoder), tiny_decoder, out)
    assert drawn.encoded == catalog.encoded
    assert drawn.user_id == catalog.user_id

    class NoDecoder:
        def decode(self, rows: Rows) -> list[DecodedImage]:
            raise AssertionError("the images are there")

    kept = draw_set("again", wishes, catalog, NoDecoder(), tiny_decoder, out)
    assert kept.encoded == drawn.encoded
    with pytest.raises(AssertionError, match="the images are there"):
        draw_set("again", replace(wishes, prompt=Prompt.P1), catalog, NoDecoder(), tiny_decoder, out)


def suspicious(images: np.ndarray) -> np.ndarray:
    """Call every image unsafe."""
    return np.ones(len(images), np.float32)


def test_an_image_that_the_safety_checker_refuses_stays_in_its_set(
    materials: Materials, tiny_decoder: DecoderSettings, tmp_path: Path
) -> None:
    safety = SafetySettings(checker=f"{__name__}:suspicious")
    strict = tiny_decoder.model_copy(update={"safety": safety})
    wishes = Wishes(embeds_ND=materials.catalog.embeds_ND)

    def draw(settings: DecoderSettings) -> ItemSet:
        return draw_set("x", wishes, materials.catalog, build_decoder(settings), settings, str(tmp_path))

    with pytest.raises(StorageError, match="the safety policy left it out"):
        draw(strict)
    assert draw(without_gaps(strict)).encoded == materials.catalog.encoded


def test_an_item_that_cannot_be_drawn_leaves_no_file(
    materials: Materials, tiny_decoder: DecoderSettings, tmp_path: Path
) -> None:
    broken = materials.catalog.embeds_ND.copy()
    broken[-1] = np.nan
    with pytest.raises(StorageError, match="method broken: an item has no image .image_embeds is not finite"):
        draw_set(
            "broken",
            Wishes(embeds_ND=broken),
            materials.catalog,
            build_decoder(tiny_decoder),
            tiny_decoder,
            str(tmp_path / "out"),
        )
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_a_prior_with_users_is_no_prior_without_them(materials: Materials) -> None:
    with pytest.raises(InputError, match="without_users: that prior has the user encoder id; expected none"):
        wishes_of("no_user", replace(materials, without_users=materials.prior))


def test_methods_need_the_catalogs_models(study: EvaluateConfig) -> None:
    values = study.model_dump()
    with pytest.raises(ValueError, match="need `prior`, `decoder` and `clip` of the catalog"):
        EvaluateConfig.model_validate({**values, "methods": ["random"]})
    models = {"prior": "/prior", "decoder": {"model": "owner/model"}, "clip": "local-dir:/clip"}
    with pytest.raises(ValueError, match="the method no_user needs `without_users`"):
        EvaluateConfig.model_validate({**values, **models, "methods": ["no_user"]})
