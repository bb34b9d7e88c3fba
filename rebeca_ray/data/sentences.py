"""Sentence embeddings by sentence-transformers, an optional extra, for topic models of captions."""

from collections.abc import Sequence

import numpy as np

from rebeca_ray.errors import InputError, describe

MINI_LM = "sentence-transformers/all-MiniLM-L6-v2"  # as the paper's topic models


class SentenceModel:
    """A function from texts to unit vectors [N, D] float32.

    `name` is a folder saved by sentence-transformers, or a model of the Hugging Face hub. Raises InputError
    for a model that cannot be loaded, and where sentence-transformers is not installed.
    """

    def __init__(self, name: str = MINI_LM, device: str = "cpu", batch_size: int = 256) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise InputError(
                f"sentence model {name!r}: sentence-transformers is not installed; expected for sentence "
                "embeddings; pip install 'rebeca-ray[topics]'"
            ) from None
        try:
            self.model = SentenceTransformer(name, device=device)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"sentence model {name!r}: cannot be loaded ({describe(error)}); "
                "expected a folder or a model of the hub; copy it to this machine, or correct the name"
            ) from None
        self.batch_size = batch_size

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return the embeddings. Equal texts are embedded once."""
        distinct, row_N = np.unique(np.array(texts, object), return_inverse=True)
        x_ND = self.model.encode(
            distinct.tolist(),
            batch_size=self.batch_size,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return x_ND[row_N]
