"""Nightly generated recommendations: a diffusion prior over CLIP embeddings, decoded into a Parquet catalog.

Public names load on first use, so that importing the package is cheap:

```python
import rebeca_ray as rr

prior = rr.fit_prior("train.yaml")
embeddings = rr.sample(prior, users=["ann", "ben"])
rr.decode(embeddings, "generate.yaml")  # a notebook shows the images
rr.generate("generate.yaml").show(["ann", "ben"])
rr.read_catalog("s3://bucket/catalog")
```
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors, which cannot follow __getattr__
    from rebeca_ray.catalog.read import read_catalog as read_catalog
    from rebeca_ray.config.decoder import DecoderSettings as DecoderSettings
    from rebeca_ray.config.jobs import EmbedConfig as EmbedConfig
    from rebeca_ray.config.jobs import GenerateConfig as GenerateConfig
    from rebeca_ray.config.jobs import SampleConfig as SampleConfig
    from rebeca_ray.config.jobs import TrainConfig as TrainConfig
    from rebeca_ray.config.sections import InteractionSettings as InteractionSettings
    from rebeca_ray.errors import UserError as UserError
    from rebeca_ray.identity import read_user_key as read_user_key
    from rebeca_ray.notebook import decode as decode
    from rebeca_ray.notebook import embed as embed
    from rebeca_ray.notebook import fit_prior as fit_prior
    from rebeca_ray.notebook import generate as generate
    from rebeca_ray.notebook import sample as sample

__version__ = "0.1.0"

_PUBLIC = {
    "embed": "rebeca_ray.notebook",
    "fit_prior": "rebeca_ray.notebook",
    "sample": "rebeca_ray.notebook",
    "decode": "rebeca_ray.notebook",
    "generate": "rebeca_ray.notebook",
    "read_catalog": "rebeca_ray.catalog.read",
    "EmbedConfig": "rebeca_ray.config.jobs",
    "TrainConfig": "rebeca_ray.config.jobs",
    "SampleConfig": "rebeca_ray.config.jobs",
    "GenerateConfig": "rebeca_ray.config.jobs",
    "InteractionSettings": "rebeca_ray.config.sections",
    "DecoderSettings": "rebeca_ray.config.decoder",
    "UserError": "rebeca_ray.errors",
    "read_user_key": "rebeca_ray.identity",
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
