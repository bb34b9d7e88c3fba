"""Derive identities and seeds from content: never from order, time or attempt."""

import hashlib

GENERATED_ID = "^[0-9a-f]{32}$"  # the form of a generated item's id
SEPARATOR = "\x1f"


def hash128(*parts: str | int) -> str:
    """Return 32 hex digits of BLAKE2b over the parts, the same on every machine."""
    return hashlib.blake2b(SEPARATOR.join(str(part) for part in parts).encode(), digest_size=16).hexdigest()


def plan_key(*, prior: str, settings: str, user_id: str, history_digest: str, generation: int) -> str:
    """Return the key of a user's candidates: models, settings, history, and number of rotations."""
    return hash128("plan", prior, settings, user_id, history_digest, generation)


def settings_for_item(settings: str, item: str | None, strength: float | None, method: str) -> str:
    """Return the digest of a user's settings: with the given item, its strength and the method if any."""
    return settings if item is None else hash128("variant", settings, item, str(strength), method)


def item_id(key: str, candidate: int, decoder: str, prompt: str, negative_prompt: str) -> str:
    """Return the id of one generated item: plan key, candidate number, decoder version and prompts."""
    return hash128("item", key, candidate, decoder, prompt, negative_prompt)


def candidate_seed(key: str, candidate: int) -> int:
    """Return 64 bits that seed a candidate's noise in the prior."""
    return int(hash128("candidate", key, candidate)[:16], 16)


def candidate_seeds(key: str, count: int) -> list[int]:
    """Return `candidate_seed` of candidates 0 to `count` - 1; their common beginning is hashed once."""
    beginning = hashlib.blake2b(f"candidate{SEPARATOR}{key}{SEPARATOR}".encode(), digest_size=16)
    seeds = []
    for candidate in range(count):
        digest = beginning.copy()
        digest.update(str(candidate).encode())
        seeds.append(int.from_bytes(digest.digest()[:8], "big"))
    return seeds


def image_seed(item: str) -> int:
    """Return 63 bits that seed an image's noise in the decoder (signed 64-bit columns hold them)."""
    return int(hash128("image", item)[:16], 16) >> 1


def bucket_of(user_id: str, num_buckets: int) -> int:
    """Return the bucket of a user; with a multiple of `num_buckets`, a part of that bucket."""
    return int(hash128("bucket", user_id)[:16], 16) % num_buckets


def retry_seed(seed: int, attempt: int) -> int:
    """Return the seed of another attempt at an image that was found unsafe; attempt 0 is the first."""
    return int(hash128("attempt", seed, attempt)[:16], 16) >> 1 if attempt else seed
