"""Sentence embeddings: a small model of sentence-transformers with random weights, where it is installed."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rebeca_ray.data.sentences import SentenceModel
from rebeca_ray.errors import InputError


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    message = r"sentence-transformers is not installed; expected .*; pip install 'rebeca-ray\[topics\]'"
    with pytest.raises(InputError, match=message):
        SentenceModel()


def test_a_model_embeds_equal_texts_once_and_alike(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=1.0,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    sentence_transformers.SentenceTransformer(str(tmp_path / "bert"), device="cpu").save(
        str(tmp_path / "model")
    )
    model = SentenceModel(str(tmp_path / "model"))
    x = model(["a cat", "a dog", "a cat"])
    assert x.shape == (3, 16)
    assert x.dtype == np.float32
    assert np.linalg.norm(x, axis=1) == pytest.approx(1, abs=1e-5)
    assert (x[0] == x[2]).all()
    assert abs(x[0] - x[1]).max() > 1e-3
    with pytest.raises(InputError, match="sentence model .*: cannot be loaded .*; copy it to this machine"):
        SentenceModel(str(tmp_path / "nothing"))
