"""The context of one run: everything that its stages share, made once, before the first stage."""

from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import cached_property
from typing import TypeVar

import rebeca_ray
from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.catalog.versions import current_version
from rebeca_ray.config.jobs import GenerateConfig, SampleConfig
from rebeca_ray.decoder.files import DecoderIdentity
from rebeca_ray.identity import hash128
from rebeca_ray.prior.checkpoint import load_prior

C = TypeVar("C", GenerateConfig, SampleConfig)


@dataclass(frozen=True, kw_only=True)
class Models:
    """Everything that a run must know of its models without loading them again."""

    versions: dict[str, str]  # fingerprints of prior and decoder, and the code's version
    decoder_weights: dict[str, str]  # sha256 by file
    safety_checker: str  # of the decoder
    embed_dim: int
    clip_fingerprint: str | None
    can_rescore: bool  # the prior has a selector
    user_encoder: str  # how the prior knows users: history | id | none


def identify_models(config: GenerateConfig, decoder: DecoderIdentity) -> Models:
    """Load the prior once, so that a damaged one is found before any actor starts.

    Raises InputError for such a prior.
    """
    prior = load_prior(config.prior)
    versions = {
        "prior": prior.fingerprint,
        "decoder": decoder.fingerprint(config.decoder),
        "code": rebeca_ray.__version__,
    }
    return Models(
        versions=versions,
        decoder_weights=decoder.weights,
        safety_checker=decoder.checker,
        embed_dim=decoder.embed_dim,
        clip_fingerprint=prior.clip,
        can_rescore=prior.selector is not None,
        user_encoder=prior.settings.user_encoder,
    )


def with_current_versions(config: C) -> C:
    """Return the config with today's versions of prior and items, which all stages of this attempt read."""
    items = config.items and current_version(config.items, "items")
    return config.model_copy(update={"prior": current_version(config.prior, "prior"), "items": items})


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """One run: its config, its identity, its models, and the snapshot it follows."""

    config: GenerateConfig
    run: Run
    models: Models
    previous: Snapshot | None
    requested: int  # items
    began_at: datetime
    inputs: dict[str, str] = field(default_factory=dict)  # digests of the run's tables, by name
    inputs_digest: str | None = None  # of everything it is made from, for the manifest
    in_process: bool = False  # run all stages in this process, without Ray

    @property
    def num_buckets(self) -> int:
        return self.config.layout.num_buckets

    @property
    def versions(self) -> dict[str, str]:
        return self.models.versions

    @property
    def embed_dim(self) -> int:
        return self.models.embed_dim

    @cached_property
    def date(self) -> date:
        return date.fromisoformat(self.run.run_date)

    @property
    def due_at(self) -> datetime | None:
        """When the snapshot must be published: `publish_by`, next after the run began."""
        if self.config.limits.publish_by is None:
            return None
        hour, minute = (int(part) for part in self.config.limits.publish_by.split(":"))
        due = self.began_at.replace(hour=hour, minute=minute, second=0, microsecond=0)
        return due + timedelta(days=due <= self.began_at)

    @cached_property
    def settings_digest(self) -> str:
        """Digest of everything but user and prompts that decides a user's items."""
        config = self.config
        hidden = ""
        if config.interactions is not None:
            hidden = config.interactions.hidden_shares(hide_hold_out=config.hide_hold_out)
        sampler, selection = config.sampler.identity_json(), config.selection.identity_json()
        bound = config.selection.share_within
        sharing = "" if bound is None else f"share_within {bound}"
        return hash128(sampler, selection + hidden + sharing, self.versions["decoder"])
