"""Captions from a column, and from small image-to-text models of transformers with random weights."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from rebeca_ray.data.captions import CaptionImages, caption_items, read_captions
from rebeca_ray.data.clip import ERROR
from rebeca_ray.errors import InputError
from rebeca_ray.stickers import ITEMS

WORDS = ["[PAD]", "[UNK]", "[BOS]", "[SEP]", "<image>", "a", "the", "red", "cat", "dog", "of", "style"]
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[SEP]",
        sep_token="[SEP]",
        extra_special_tokens={"image_token": "<image>"},
    )


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a BLIP with random weights."""
    folder = str(tmp_path_factory.mktemp("blip"))
    torch.manual_seed(0)
    config = BlipConfig(
        vision_config={**SIZES, "image_size": 32, "patch_size": 16},
        text_config={
            **SIZES,
            "vocab_size": len(WORDS),
            "encoder_hidden_size": 16,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "sep_token_id": 3,
            "pad_token_id": 0,
            "max_position_embeddings": 32,
            "initializer_range": 1.0,
        },
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a LLaVA with random weights."""
    folder = str(tmp_path_factory.mktemp("llava"))
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SIZES, image_size=32, patch_size=16),
        text_config=LlamaConfig(
            **SIZES,
            vocab_size=len(WORDS),
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=0,
            initializer_range=1.0,
        ),
        image_token_index=WORDS.index("<image>"),
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=word_tokenizer(),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def some_items(path: Path, count: int = 5) -> pa.Table:
    table = pq.read_table(ITEMS, columns=["item_id", "image"]).slice(40, count)
    pq.write_table(table, path)
    return table


def write_captions(path: Path, captions: list[str | None], item_id: list[str] | None = None) -> str:
    item_id = item_id or [f"item-{row}" for row in range(len(captions))]
    pq.write_table(pa.table({"item_id": item_id, "caption": pa.array(captions, pa.string())}), path)
    return str(path)


def test_captions_of_a_column(tmp_path: Path) -> None:
    captions = read_captions(write_captions(tmp_path / "c.parquet", ["a cat", " a dog\n"]))
    assert captions.item_id.tolist() == ["item-0", "item-1"]
    assert captions.caption.tolist() == ["a cat", "a dog"]
    assert captions.of(["item-1", "item-0", "item-1"]) == ["a dog", "a cat", "a dog"]
    with pytest.raises(
        InputError, match="captions: 2 of 3 items have none, first 'x'; expected one for each;"
    ):
        captions.of(["x", "item-0", "y"])


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (["a", None, "  ", ""], "3 of 4 items have none, first 'item-1', 'item-2', 'item-3'; expected one"),
        ([], "has no rows"),
        (["a", "x" * 10_001], "1 of 2 rows have a caption of more than 10,000 bytes"),
    ],
)
def test_bad_captions_are_named(tmp_path: Path, captions: list[str | None], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_captions(write_captions(tmp_path / "c.parquet", captions))


def test_a_table_without_captions_and_repeated_ids_are_refused(tmp_path: Path) -> None:
    some_items(tmp_path / "items.parquet")
    with pytest.raises(InputError, match="column 'caption' is missing; caption the images, and write the"):
        read_captions(str(tmp_path / "items.parquet"))
    with pytest.raises(InputError, match="1 item_ids are repeated"):
        read_captions(write_captions(tmp_path / "c.parquet", ["a", "b"], ["x", "x"]))
    numbers = pa.table({"item_id": ["x"], "caption": [1]})
    pq.write_table(numbers, tmp_path / "n.parquet")
    with pytest.raises(InputError, match="column 'caption' is int64, expected string"):
        read_captions(str(tmp_path / "n.parquet"))


def test_a_captioner_captions_items_in_batches(tmp_path: Path, captioner: str) -> None:
    table = some_items(tmp_path / "items.parquet")
    caption_images = CaptionImages(captioner, max_new_tokens=6)
    captions = caption_items(str(tmp_path / "items.parquet"), caption_images, batch_size=2)
    assert captions.item_id.tolist() == table["item_id"].to_pylist()
    words = {word for caption in captions.caption for word in caption.split()}
    assert words <= set(WORDS[5:])
    assert words
    # A caption depends on its image alone.
    alone = caption_images(table.slice(3, 1))
    assert alone["caption"].to_pylist() == [captions.caption[3]]
    assert alone[ERROR].to_pylist() == [None]


def test_a_chat_model_captions_by_a_prompt(tmp_path: Path, chat_model: str) -> None:
    table = some_items(tmp_path / "items.parquet")
    caption_images = CaptionImages(chat_model, prompt="the style of", max_new_tokens=4)
    assert caption_images.text == "<image> the style of"
    captions = caption_images(table)["caption"].to_pylist()
    # The prompt is not part of the caption.
    assert all(0 < len(caption.split()) <= 4 for caption in captions)
    assert not any(caption.startswith("the style of") for caption in captions)


def test_bad_images_and_empty_captions_are_named(tmp_path: Path, captioner: str) -> None:
    table = some_items(tmp_path / "items.parquet", 2)
    caption_images = CaptionImages(captioner)
    caption_images.caption = lambda images: ["a cat", ""]  # type: ignore[method-assign]
    first, second = table["item_id"].to_pylist()
    with pytest.raises(InputError, match=f"1 of 2 items have none, first '{second}'; expected one"):
        caption_items(str(tmp_path / "items.parquet"), caption_images)
    images = [{"bytes": b"no picture", "path": None}, table["image"][1].as_py()]
    pq.write_table(
        pa.table(
            [table["item_id"], pa.array(images, table.schema.field("image").type)], ["item_id", "image"]
        ),
        tmp_path / "items.parquet",
    )
    with pytest.raises(InputError, match=f"1 of 2 images cannot be decoded \\('{first}'"):
        caption_items(str(tmp_path / "items.parquet"), caption_images)


def test_models_that_cannot_be_used_are_named(tmp_path: Path, captioner: str) -> None:
    with pytest.raises(InputError, match="caption model .*nothing.*: cannot be loaded .*; copy it to this"):
        CaptionImages(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="caption model .*: has no chat template; expected one for a prompt"):
        CaptionImages(captioner, prompt="the style of")
