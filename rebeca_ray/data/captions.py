"""Captions of items: read from a column `caption`, or written by an image-to-text model of transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.data.bad_images import refuse_bad_images
from rebeca_ray.data.clip import ERROR, read_image
from rebeca_ray.data.validation import MAX_EXAMPLES, check_columns, check_ids, check_rows, check_texts
from rebeca_ray.errors import InputError, describe, shown
from rebeca_ray.storage.parquet import open_parquet

MAX_NEW_TOKENS = 60
BATCH_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Captions:
    """N items: ids [N] and captions [N], both of str."""

    item_id: np.ndarray
    caption: np.ndarray

    def of(self, item_id: Sequence[str]) -> list[str]:
        """Return the captions of some items, in their order. Raises InputError for an item without one."""
        by_id = dict(zip(self.item_id.tolist(), self.caption.tolist(), strict=True))
        missing = [item for item in item_id if item not in by_id]
        if missing:
            raise InputError(
                f"captions: {len(missing)} of {len(item_id)} items have none, first {shown(missing[0])}; "
                "expected one for each; caption those items too"
            )
        return [by_id[item] for item in item_id]


class CaptionImages:
    """Caption images in the form of a Ray Data actor: a batch of encoded images in, one caption per row out.

    Returns `item_id`, `caption` and ERROR. `model` is a folder, or a model of the Hugging Face hub. Without a
    `prompt` it is a captioner, such as BLIP or GIT. With one, such as "Describe the style in one sentence.",
    it is a chat model, such as LLaVA. The likeliest tokens are taken, so equal images have equal captions.
    Raises InputError for a model that cannot be loaded, and for a prompt without a chat model.
    """

    def __init__(
        self,
        model: str,
        device: str = "cpu",
        *,
        prompt: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        background: str = "#ffffff",
    ) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

        self.torch, self.device, self.background = torch, device, background
        self.max_new_tokens = max_new_tokens
        try:
            if prompt is None:
                self.processor: Any = AutoImageProcessor.from_pretrained(model)
                self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
            else:
                self.processor = AutoProcessor.from_pretrained(model)
                self.tokenizer = self.processor.tokenizer
            loaded = AutoModelForImageTextToText.from_pretrained(model, use_safetensors=True)
        except (OSError, ValueError, KeyError, AttributeError, RuntimeError, ImportError) as error:
            raise InputError(
                f"caption model {model!r}: cannot be loaded ({describe(error)}); expected an image-to-text "
                "model of transformers; copy it to this machine, or correct the name"
            ) from None
        self.text = None if prompt is None else chat_text(model, self.processor, prompt)
        self.model: Any = loaded.eval().to(device)
        self.tokenizer.padding_side = "left"

    def __call__(self, batch: pa.Table) -> pa.Table:
        read = [read_image(value, self.background) for value in batch["image"].to_pylist()]
        columns = {
            "item_id": batch["item_id"],
            "caption": pa.array(self.caption([image for image, _ in read]), pa.string()),
            ERROR: pa.array([error for _, error in read], pa.string()),
        }
        return pa.table(columns)

    def caption(self, images: Sequence[Any]) -> list[str]:
        """Return the captions of Pillow's RGB images."""
        images = list(images)
        if self.text is None:
            inputs = self.processor(images=images, return_tensors="pt")
        else:
            inputs = self.processor(
                images=images, text=[self.text] * len(images), padding=True, return_tensors="pt"
            )
        with self.torch.inference_mode():
            tokens = self.model.generate(
                **inputs.to(self.device), max_new_tokens=self.max_new_tokens, do_sample=False
            )
        prompt_length = 0 if self.text is None else inputs["input_ids"].shape[1]
        texts = self.tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def chat_text(model: str, processor: Any, prompt: str) -> str:
    """Return the text of a chat that shows one image and gives the prompt.

    Raises InputError for a model without a chat template.
    """
    if not getattr(processor, "chat_template", None):
        raise InputError(
            f"caption model {model!r}: has no chat template; expected one for a prompt; "
            "leave the prompt out, or take a chat model"
        )
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def read_captions(uri: str) -> Captions:
    """Read the columns `item_id` and `caption` of a table of items, or of a table of captions alone.

    Raises InputError for a missing column, for captions that are null or blank, and for ids that are invalid
    or repeated.
    """
    source = open_parquet(uri, "captions")
    columns = check_columns(
        source, schemas.CAPTIONS, instead={"image": "caption the images, and write the column"}
    )
    table = source.read(columns)
    check_rows(table, "captions", uri)
    check_ids(table["item_id"], "captions", uri, "item_id", unique="keep one row per item")
    check_texts(table["caption"], "captions", uri, "caption")
    captions = captions_of(table)
    source.require_unchanged("it was read")
    require_captions(captions, uri)
    return captions


def caption_items(uri: str, caption_images: CaptionImages, batch_size: int = BATCH_SIZE) -> Captions:
    """Return captions of all items of a table with images, by a model.

    Raises InputError, naming them, for images that cannot be read, and for items that the model gave no word.
    """
    source = open_parquet(uri, "items")
    columns = check_columns(source, schemas.ITEMS)
    parts = [caption_images(batch) for batch in source.batches(columns, batch_size) if batch.num_rows]
    if not parts:
        raise InputError(f"items {uri}: has no rows; give at least one")
    table = pa.concat_tables(parts)
    bad = table.filter(pc.is_valid(table[ERROR]))
    reasons = dict(zip(bad["item_id"].to_pylist(), bad[ERROR].to_pylist(), strict=True))
    refuse_bad_images(uri, reasons, table.num_rows)
    captions = captions_of(table)
    require_captions(captions, uri)
    return captions


def captions_of(table: pa.Table) -> Captions:
    """Return the captions of a table. A missing one is an empty text."""
    return Captions(
        item_id=table["item_id"].to_numpy(zero_copy_only=False),
        caption=pc.utf8_trim_whitespace(pc.fill_null(table["caption"], "")).to_numpy(zero_copy_only=False),
    )


def require_captions(captions: Captions, uri: str) -> None:
    """Raise InputError if captions are missing. It has their number, and the first items by name."""
    missing = captions.item_id[captions.caption == ""]
    if len(missing):
        named = ", ".join(map(shown, missing[:MAX_EXAMPLES].tolist()))
        raise InputError(
            f"captions {uri}: {len(missing)} of {len(captions.item_id)} items have none, first {named}; "
            "expected one for each; fill them or drop those items"
        )
