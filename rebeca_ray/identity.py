"""Derive identities and seeds from content: never from order, time or attempt. Pseudonyms too."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rebeca_ray.errors import InputError, describe

GENERATED_ID = "^[0-9a-f]{32}$"  # the form of a generated item's id
SEPARATOR = "\x1f"
LEAST_KEY = 16  # bytes of the key of pseudonyms


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


@dataclass(frozen=True)
class UserKey:
    """The key of pseudonyms, as it travels to workers: its source, and a hash of a fixed text under it.

    It holds no secret. Each process reads the secret from the source, and compares the fingerprint.
    """

    source: str
    fingerprint: str

    def pseudonym(self, user_id: str) -> str:
        """Return the pseudonym of one user."""
        return self.pseudonyms([user_id])[0]

    def pseudonyms(self, user_ids: Iterable[str]) -> list[str]:
        """Return the pseudonym of each user: 32 hex digits of the keyed BLAKE2b of the id in UTF-8.

        The empty id names nobody and stays. Raises InputError if the source holds another key by now.
        """
        secret = read_secret(self.source)
        if fingerprint_of(secret) != self.fingerprint:
            raise InputError(
                f"user_key {self.source}: is another key here than where the job began; "
                "give all machines the same"
            )
        # The state after the key is the same for all users, and a copy of it is cheaper than the key.
        keyed = hashlib.blake2b(key=secret, digest_size=16)
        pseudonyms = []
        for user_id in user_ids:
            hashed = keyed.copy()
            hashed.update(user_id.encode())
            pseudonyms.append(hashed.hexdigest() if user_id else "")
        return pseudonyms


def read_user_key(source: str | None) -> UserKey | None:
    """Return the key of pseudonyms in a file, or in the variable of `env:NAME`; None without a source.

    Raises InputError if it cannot be read, or is short.
    """
    return None if source is None else UserKey(source, fingerprint_of(read_secret(source)))


def fingerprint_of(secret: bytes) -> str:
    """Return 32 hex digits that tell one key from another. No user has this id."""
    return hashlib.blake2b(b"\x1ffingerprint of the key", key=secret, digest_size=16).hexdigest()


def read_source(setting: str, source: str) -> bytes:
    """Return the bytes of a file, or of the variable of `env:NAME`. Raises InputError without them."""
    if source.startswith("env:"):
        text = os.environ.get(source.removeprefix("env:"))
        if text is None:
            raise InputError(f"{setting} {source}: the variable is not set here; set it on every node")
        return os.fsencode(text)  # any bytes
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise InputError(
            f"{setting} {source}: cannot be read ({describe(error)}); "
            "give a file that is on every node, or env:NAME"
        ) from None


def read_secret(source: str) -> bytes:
    """Return the 64 bytes that the key of a source stands for: its BLAKE2b, for keys of any length."""
    text = read_source("user_key", source).strip()
    if len(text) < LEAST_KEY:
        raise InputError(
            f"user_key {source}: has {len(text)} bytes, expected a secret key of at least {LEAST_KEY}; "
            "give one, the same on every node"
        )
    return hashlib.blake2b(b"pseudonyms" + SEPARATOR.encode() + text).digest()


def require_key(where: str, recorded: str | None, key: UserKey | None) -> None:
    """Raise InputError unless `where` was made with this key: else everybody would become a new user.

    `recorded` is the fingerprint of its key, and None stands for user ids as they are.
    """
    if recorded == (key.fingerprint if key else None):
        return
    if key is None:
        raise InputError(f"{where}: holds pseudonyms, but user_key is not set; set it to their key")
    if recorded is None:
        raise InputError(
            f"{where}: holds user ids as they are, but user_key {key.source} is set; leave it out, "
            "or begin another catalog and prior with it"
        )
    raise InputError(
        f"{where}: holds pseudonyms of another key than user_key {key.source}; set their key, "
        "or begin another catalog and prior with this one"
    )
