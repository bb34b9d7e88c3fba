"""Prove that a store compares before it swaps: without that, two runs would hold the lease of one catalog."""

import secrets
from functools import cache

from rebeca_ray.errors import InputError
from rebeca_ray.storage.filesystem import is_local, join, storage_errors
from rebeca_ray.storage.store import open_store


@cache
def require_swaps(root: str) -> None:
    """Raise InputError if the store of `root` accepts a write that its condition forbids.

    A process proves it once for each root, by a handful of small requests. A disk needs no proof: there, the
    comparison is ours.
    """
    uri = join(root, f".swap-probe-{secrets.token_hex(8)}")
    store = open_store(uri)
    if is_local(store.filesystem):
        return
    with storage_errors(uri):
        try:
            store.put(b"one")
            before = store.read_versioned()
            store.put(b"two")
            ignored = [
                condition
                for condition, version in (("If-Match", before and before[1]), ("If-None-Match", None))
                if store.compare_and_swap(condition.encode(), version)
            ]
        finally:
            store.remove([store.path])
    if ignored:
        raise InputError(
            f"catalog {root}: its store ignores the condition of a write ({ignored[0]}); "
            "expected compare-and-swap, or two runs would publish at once; "
            "use S3, a server that has it, such as SeaweedFS, or another store"
        )
