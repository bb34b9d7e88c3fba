"""Topic precision in an evaluation: captions of real and generated items, and what must be there for it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.evaluation import EvaluateConfig
from rebeca_ray.data.captions import Captions
from rebeca_ray.data.items import read_image_embeds
from rebeca_ray.errors import InputError
from rebeca_ray.studies.evaluate import evaluate
from rebeca_ray.studies.report import write_report
from rebeca_ray.studies.topics import CaptionSource, read_sources
from tests.studies.conftest import STUDY_USERS, WORDS, captions_of_tastes, publish_catalog


def source(config: EvaluateConfig, taste_of_user: Sequence[int], per_user: int) -> CaptionSource:
    """Real items have the caption of their taste, and all items of a user that of one taste."""
    generated = [WORDS[taste] for taste in taste_of_user for _ in range(per_user)]
    return CaptionSource(
        name="content",
        real=captions_of_tastes(read_image_embeds(config.items).item_id),
        caption=lambda encoded: generated[: len(encoded)],
    )


@pytest.fixture
def published(study: EvaluateConfig, tmp_path: Path, tiny_decoder: DecoderSettings) -> EvaluateConfig:
    root = publish_catalog(tmp_path / "first", tiny_decoder, STUDY_USERS, num_images=2).root
    return study.model_copy(update={"catalog": root})


def test_items_on_the_users_topics_have_a_precision_of_one_and_others_of_zero(
    published: EvaluateConfig,
) -> None:
    users = range(len(STUDY_USERS))
    matched = replace(source(published, [user % 3 for user in users], 2), name="matched")
    missed = replace(source(published, [(user + 1) % 3 for user in users], 2), name="missed")
    study = evaluate(published, captions=[matched, missed])
    precision = study.metrics.sets[0].topic_precision
    assert (precision["matched"].mean, precision["missed"].mean) == (1, 0)
    assert study.sets[0].by_user["topic_precision/matched"].tolist() == [1.0] * len(STUDY_USERS)
    assert "topic precision: missed" in Path(write_report(study, published.out, None)).read_text()


def test_more_texts_than_topics_are_grouped_by_their_words(published: EvaluateConfig) -> None:
    users = range(len(STUDY_USERS))
    matched = source(published, [user % 3 for user in users], 2)
    sizes = ("small", "large", "tiny", "huge")
    sized = [f"a {sizes[row % 4]} {text}" for row, text in enumerate(matched.real.caption)]
    real = replace(matched.real, caption=np.array(sized, object))
    config = published.model_copy(update={"num_topics": 3})
    study = evaluate(config, captions=[replace(matched, real=real)])
    assert study.metrics.sets[0].topic_precision["content"].mean > 0.9


def test_a_liked_item_without_a_caption_is_named(published: EvaluateConfig) -> None:
    whole = source(published, [0] * len(STUDY_USERS), 2)
    half = Captions(item_id=whole.real.item_id[75:], caption=whole.real.caption[75:])
    with pytest.raises(InputError, match=r"captions: \d+ of \d+ items have none, first 'i0"):
        evaluate(published, captions=[replace(whole, real=half)])


def test_without_a_caption_model_there_are_no_topics(study: EvaluateConfig) -> None:
    assert read_sources(study) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"caption_model": "a"}, "caption_model needs `captions` or `images`"),
        ({"captions": "a.parquet"}, "captions need a `caption_model`"),
        ({"content_prompt": "What is it?"}, "need `caption_model`, a chat model"),
        (
            {"captions": "a.parquet", "caption_model": "a", "style_prompt": "Which style?"},
            "no prompts to it",
        ),
    ],
)
def test_captions_and_their_model_come_together(
    study: EvaluateConfig, values: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateConfig.model_validate({**study.model_dump(), **values})
