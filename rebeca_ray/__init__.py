"""Nightly generated recommendations: a diffusion prior over CLIP embeddings, decoded into a Parquet catalog.

Public names load on first use, so that importing the package is cheap.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "read_catalog": "rebeca_ray.catalog.read",
    "load_prior": "rebeca_ray.prior.checkpoint",
    "load_config": "rebeca_ray.config.jobs",
    "generate_catalog": "rebeca_ray.generation.pipeline",
    "decode_table": "rebeca_ray.halves.decode",
    "train_prior": "rebeca_ray.training.train",
    "embed_items": "rebeca_ray.data.embedding",
    "UserError": "rebeca_ray.errors",
}

__all__ = [*_PUBLIC]  # each is found by __getattr__


def __dir__() -> list[str]:
    return ["__version__", *__all__]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(
            f"module 'rebeca_ray' has no attribute {name!r}; public: {', '.join(sorted(_PUBLIC))}"
        )
    return getattr(import_module(_PUBLIC[name]), name)
