"""Captions of stickers for the bundled text towers, and the small CLIP vocabulary made from them."""

import json
from pathlib import Path

import numpy as np

CONTEXT_LENGTH = 24
VOCAB_SIZE = 1536
START, END = "<|startoftext|>", "<|endoftext|>"


def caption(style: str, category: str, subcategory: str, name: str) -> str:
    """Return the full caption of a sticker: style, category, subcategory, name, in lower-case words."""
    return " ".join(
        f"{style} {category} {subcategory} {name}".lower().replace("&", " ").replace("-", " ").split()
    )


def random_caption(parts: tuple[str, str, str, str], random: np.random.Generator) -> str:
    """Return a caption of (style, category, subcategory, name), each left out at random.

    The models then learn short prompts ("noto food pizza") too.
    """
    keep = random.random(4) < (0.85, 0.6, 0.4, 0.9)
    style, category, subcategory, name = (
        part if kept else "" for part, kept in zip(parts, keep, strict=True)
    )
    return caption(style, category, subcategory, name)


def train_tokenizer(captions: list[str], directory: Path) -> None:
    """Learn a byte-pair vocabulary from `captions`, and write it as a `CLIPTokenizer` directory.

    The end token has the highest id, because CLIP's text towers take the argmax of the ids as its position.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 2, end_of_word_suffix="</w>", initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(captions, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = {
        token: index
        for index, token in enumerate([*sorted(model["vocab"], key=model["vocab"].get), START, END])
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    clip = CLIPTokenizer(
        vocab=str(directory / "vocab.json"),
        merges=str(directory / "merges.txt"),
        model_max_length=CONTEXT_LENGTH,
    )
    clip.save_pretrained(directory)
