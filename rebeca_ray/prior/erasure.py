"""Erase some users from a prior with a table of users: their rows become zero, and their ids go.

The folder gets a new version without them, and earlier versions with them go.
"""

import datetime
from collections.abc import Collection
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.catalog.erasure.removed import Removed
from rebeca_ray.catalog.pointer import POINTERS_OF, read_pointer
from rebeca_ray.catalog.versions import (
    VERSIONS,
    current_version,
    remove_older_layout,
    replace_version,
    versions_in,
)
from rebeca_ray.prior.checkpoint import (
    TrainedPrior,
    load_prior,
    publish_prior,
    read_config,
    read_prior_users,
)
from rebeca_ray.storage.filesystem import delete, exists, join


def is_prior(uri: str) -> bool:
    """Return whether a folder holds a prior, or versions of one."""
    return exists(join(uri, POINTERS_OF["prior"])) or exists(join(uri, "config.json"))


def erase_from_prior(uri: str, users: Collection[str], removed: Removed) -> None:
    """Erase some users from the prior in a folder, and remove earlier versions that hold them.

    Every other user keeps the same embeddings, but the prior has a new fingerprint. Raises InputError for a
    folder without a prior, LeaseHeldError while a training writes there.
    """
    current = current_version(uri, "prior")
    held = users_published(uri, users)
    stale = [version for version in earlier_versions(uri) if users_held(version, users)]
    torn = unfinished_versions(uri)
    removed.add("users of priors", held, *([current] if held else []))
    removed.add("earlier priors", len(stale), *stale)
    removed.add("unfinished priors", len(torn), *torn)  # of trainings that were killed
    if removed.dry_run or not (held or stale or torn):
        return
    with replace_version(uri, "prior", "forget") as version:
        # Looked at again: a training may have published while this waited for its lease.
        for unfinished in unfinished_versions(uri):
            delete(unfinished)
        if users_published(uri, users):
            pointer, _ = read_pointer(uri, "prior")
            run_date = datetime.date.fromisoformat(pointer.run_date) if pointer.run_date else None
            publish_prior(without_users(load_prior(uri), users), version, run_date)
        for older in earlier_versions(uri):
            if users_held(older, users):
                remove_older_layout(uri, "prior") if older == uri else delete(older)


def without_users(prior: TrainedPrior, users: Collection[str]) -> TrainedPrior:
    """Return an `id` prior without some users. All others keep their index."""
    assert prior.users is not None
    gone = pc.is_in(prior.users["user_id"], value_set=pa.array(sorted(users), pa.string()))
    index = prior.users["user_index"].filter(gone).to_pylist()
    for rows in (prior.user_rows, prior.selector.rows_VF if prior.selector else None):
        if rows is not None:
            rows[index] = 0
    return replace(prior, users=prior.users.filter(pc.invert(gone)))


def unfinished_versions(uri: str) -> list[str]:
    """Return the folders of versions without a config, which a training writes last."""
    versions = [join(uri, VERSIONS, name) for name in versions_in(uri)]
    return [version for version in versions if not exists(join(version, "config.json"))]


def earlier_versions(uri: str) -> list[str]:
    """Return the folders of all versions but the published one, among them that of the older layout."""
    current = current_version(uri, "prior")
    versions = [uri, *(join(uri, VERSIONS, name) for name in versions_in(uri))]
    return [version for version in versions if version != current and exists(join(version, "config.json"))]


def users_published(uri: str, users: Collection[str]) -> int:
    """Return how many of some users the published version has; 0 before a first one."""
    current = current_version(uri, "prior")
    if current == uri and not exists(join(uri, "config.json")):
        return 0
    return users_held(current, users)


def users_held(version: str, users: Collection[str]) -> int:
    """Return how many of some users the table of one version has; 0 for a prior without such a table."""
    config = read_config(version)
    if "users.parquet" not in config["sha256"]:
        return 0
    known = read_prior_users(version, config)["user_id"]
    return int(pc.sum(pc.is_in(known, value_set=pa.array(sorted(users), pa.string()))).as_py() or 0)
