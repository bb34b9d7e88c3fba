"""Identities and seeds: what an item is called follows from what made it, never from order or attempt."""

import hashlib

GENERATED_ID = "^[0-9a-f]{32}$"  # what the id of a generated item looks like


def hash128(*parts: str | int) -> str:
    """32 hex digits of BLAKE2b over the parts, the same on every machine."""
    return hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=16).hexdigest()


def plan_key(*, prior: str, settings: str, user_id: str, history_digest: str, generation: int) -> str:
    """What decides a user's candidates: models, settings, the user's history, and how often it was rotated."""
    return hash128("plan", prior, settings, user_id, history_digest, generation)


def item_id(key: str, candidate: int, decoder: str, prompt: str, negative_prompt: str) -> str:
    """The id of one generated item: its plan, its candidate number, the decoder that draws it and what that is told in words."""
    return hash128("item", key, candidate, decoder, prompt, negative_prompt)


def candidate_seed(key: str, candidate: int) -> int:
    """64 bits that seed a candidate's noise in the prior."""
    return int(hash128("candidate", key, candidate)[:16], 16)


def image_seed(item: str) -> int:
    """63 bits that seed an image's noise in the decoder (signed 64-bit columns hold them)."""
    return int(hash128("image", item)[:16], 16) >> 1


def bucket_of(user_id: str, num_buckets: int) -> int:
    """The bucket of a user; with a multiple of `num_buckets`, a part of that bucket."""
    return int(hash128("bucket", user_id)[:16], 16) % num_buckets


def retry_seed(seed: int, attempt: int) -> int:
    """The seed of another attempt at the same image, where the safety checker did not like the last; attempt 0 is the first."""
    return int(hash128("attempt", seed, attempt)[:16], 16) >> 1 if attempt else seed
