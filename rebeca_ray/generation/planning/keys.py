"""The keys of users' plans, which seed the noise of their candidates, and the size of a planner's batches."""

import hashlib

import pyarrow as pa

from rebeca_ray import identity
from rebeca_ray.config.jobs import GenerateConfig, SampleConfig
from rebeca_ray.config.sections import SamplerSettings

TILES_PER_BATCH = 4  # several tiles of the sampler per batch, so that padding costs little


def users_per_batch(config: GenerateConfig | SampleConfig) -> int:
    candidates_per_user = config.num_images * config.selection.candidates_per_item
    return max(1, TILES_PER_BATCH * config.sampler.batch_size // candidates_per_user)


def settings_of_key(config: GenerateConfig | SampleConfig, sampler: SamplerSettings) -> str:
    """Return the digest of the settings in a plan key. `sampler` is the resolved one of the config."""
    text = sampler.identity_json() + config.selection.identity_json()
    if config.interactions is not None:
        text += config.interactions.hidden_shares(hide_hold_out=config.hide_hold_out)
    return hashlib.sha256(text.encode()).hexdigest()


def plan_keys(users: pa.Table, prior: str, settings: str, method: str) -> list[str]:
    """Return the plan keys of rows of `schemas.DECISIONS`. They seed the noise of the users' candidates.

    `method` is `sampler.variant`: a part of the keys of users with an item.
    """
    names = ("user_id", "history_digest", "generation", "item_id", "strength")
    return [
        identity.plan_key(
            prior=prior,
            settings=identity.settings_for_item(settings, item, strength, method),
            user_id=user,
            history_digest=digest,
            generation=generation,
        )
        for user, digest, generation, item, strength in zip(
            *(users[name].to_pylist() for name in names), strict=True
        )
    ]
