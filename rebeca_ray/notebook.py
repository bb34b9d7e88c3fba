"""The commands as functions for notebooks: the same configs, and results that show themselves.

embed -> `fit_prior` -> `sample` -> `decode`, or `generate`, which does the last two for a catalog

Each function takes a config, or the path of a YAML file, then overrides `key.sub=value` as a command does.
Ray starts where the command would start it. The log goes below the cell.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rebeca_ray import log
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.fields import Settings
from rebeca_ray.config.jobs import (
    EmbedConfig,
    GenerateConfig,
    JobConfig,
    SampleConfig,
    TrainConfig,
    dated,
)
from rebeca_ray.config.load import load_config, with_overrides
from rebeca_ray.errors import InputError
from rebeca_ray.inline import Images, figures_html
from rebeca_ray.storage.failures import user_error

if TYPE_CHECKING:
    import pyarrow as pa

    from rebeca_ray.catalog.read import Snapshot

C = TypeVar("C", bound=Settings)


@dataclass(frozen=True, kw_only=True)
class FittedPrior:
    """A fitted prior: its folder, for the setting `prior` of a config, and the figures of its best epoch."""

    folder: str
    figures: dict[str, float]
    config: TrainConfig = field(repr=False)

    def sample_config(self) -> SampleConfig:
        """Return the config that samples from this prior, with the ratings and the items of its training."""
        by_history = self.config.network.user_encoder == "history"
        return SampleConfig(
            prior=self.folder,
            user_key=self.config.user_key,
            items=self.config.items,
            interactions=self.config.interactions if by_history else None,
            catalog=self.config.catalog if by_history else None,
            storage=self.config.storage,
        )

    def _repr_html_(self) -> str:
        return figures_html(f"Prior in {self.folder}", self.figures)


@contextmanager
def as_command() -> Iterator[None]:
    """Log as a command does, unless the program set up its log. Raise the UserError behind Ray's wrappers."""
    if not logging.getLogger(log.PACKAGE).hasHandlers():
        log.configure()
    try:
        yield
    except Exception as error:
        reason = user_error(error)
        if reason is None:
            raise
        raise reason from None


def resolve(model: type[C], config: C | str | os.PathLike[str], overrides: Sequence[str]) -> C:
    """Return a config with overrides, read from YAML if it is a path. Raises InputError as `load_config`."""
    if isinstance(config, str | os.PathLike):
        config = load_config(model, Path(config).expanduser(), list(overrides))
    elif not isinstance(config, model):
        raise InputError(
            f"config: is a {type(config).__name__}, expected a {model.__name__}; "
            f"give one, or the path of its YAML file"
        )
    elif overrides:
        config = with_overrides(model, config.model_dump(), list(overrides), where=model.__name__)
    if isinstance(config, JobConfig):
        log.set_level_of_config(config.log_level)
    return config


@as_command()
def embed(config: EmbedConfig | str | os.PathLike[str], *overrides: str) -> str:
    """Embed item images with CLIP, and return the folder of the embedded items.

    ```python
    items = rr.embed("embed.yaml", "batch_size=64")
    ```
    """
    from rebeca_ray.data.embedding import embed_items

    settings = resolve(EmbedConfig, config, overrides)
    embed_items(settings)
    return settings.out


@as_command()
def fit_prior(config: TrainConfig | str | os.PathLike[str], *overrides: str) -> FittedPrior:
    """Train a prior on interactions and embedded items, publish it in `config.out`, and return it.

    A training that was interrupted goes on. `sample` takes the result as it is.

    ```python
    prior = rr.fit_prior("train.yaml", "optimization.max_epochs=5")
    embeddings = rr.sample(prior, users=["ann", "ben"])
    ```
    """
    from rebeca_ray.training.train import train_prior

    settings = resolve(TrainConfig, config, overrides)
    return FittedPrior(folder=settings.out, figures=train_prior(settings), config=settings)


@as_command()
def sample(
    config: SampleConfig | FittedPrior | str | os.PathLike[str],
    *overrides: str,
    users: Sequence[str] | None = None,
) -> "pa.Table":
    """Return embeddings of users as a pyarrow table, best first per user, with a column `image_embeds`.

    `users` replaces the users of the config. Without either, it is all users of the prior's table, or all
    users with ratings. A config with an `out` is refused, because the command `rebeca sample` writes files.

    ```python
    embeddings = rr.sample(prior, "num_images=4", users=["ann", "ben"])
    embeddings = rr.sample(rr.SampleConfig(prior="s3://bucket/prior"))
    ```
    """
    from rebeca_ray.halves.sample import sample_table

    if isinstance(config, FittedPrior):
        config = config.sample_config()
    return sample_table(resolve(SampleConfig, config, overrides), users)


@as_command()
def decode(
    embeddings: "pa.Table",
    decoder: DecoderSettings | GenerateConfig | str | os.PathLike[str],
    *overrides: str,
) -> Images:
    """Return the rows of a table of embeddings with their images, which a notebook shows as a grid.

    `decoder` is a DecoderSettings, or a config of `generate`. Of the latter, its section `decoder` counts.

    ```python
    rr.decode(embeddings, rr.DecoderSettings(model="package:stickers/assets/decoder"))
    rr.decode(embeddings, "generate.yaml", "decoder.num_inference_steps=5").table
    ```
    """
    from rebeca_ray.halves.decode import decode_table

    if isinstance(decoder, DecoderSettings):
        settings = resolve(DecoderSettings, decoder, overrides)
    else:
        settings = resolve(GenerateConfig, decoder, overrides).decoder
    return Images(decode_table(embeddings, settings))


@as_command()
def generate(
    config: GenerateConfig | str | os.PathLike[str], *overrides: str, in_process: bool = False
) -> "Snapshot":
    """Generate items for the users of a request, publish them, and return the snapshot.

    A notebook shows its counts and some of its images. `in_process` does without Ray, for small requests.

    ```python
    snapshot = rr.generate("generate.yaml", "num_images=4")
    snapshot.show(["ann", "ben"])
    ```
    """
    from rebeca_ray.catalog.read import open_snapshot
    from rebeca_ray.generation.pipeline import generate_catalog

    settings = resolve(GenerateConfig, config, overrides)
    settings = dated(settings, settings.date())
    manifest = generate_catalog(settings, in_process=in_process).manifest
    return open_snapshot(settings.catalog, manifest.path)
