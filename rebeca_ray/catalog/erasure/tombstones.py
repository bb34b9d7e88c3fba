"""Tombstones: keyed hashes of erased users, which keep later runs from making anything of them again.

    <root>/erasures/tombstones.json     the hashes, and one of a fixed text, which tells a wrong key

The key is a secret of the operator, in an environment variable. Nobody without it can try ids on the hashes.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.errors import InputError
from rebeca_ray.identity import hash128
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.objects import read_json, write_json

KEY = "REBECA_ERASURE_KEY"
LEAST = 16  # characters of a key
ERASURES = "erasures"  # the folder, below the root
CHECKED = "the key of the tombstones"


@dataclass(frozen=True, kw_only=True)
class Tombstones:
    """The hashes of all erased users of a catalog, and their key."""

    key: str
    hashes: frozenset[str]

    @cached_property
    def digest(self) -> str:
        """A digest that changes with every further tombstone."""
        return hash128(*sorted(self.hashes))

    def rows(self, table: pa.Table) -> pa.Array:
        """Return for each row of a table with `user_id` whether its user was erased."""
        users = table["user_id"].unique().drop_null()
        erased = [user for user in users.to_pylist() if hash_of(user, self.key) in self.hashes]
        return pc.is_in(table["user_id"], value_set=pa.array(erased, users.type))

    def without(self, table: pa.Table) -> pa.Table:
        """Return the rows of all users who were not erased."""
        return table.filter(pc.invert(self.rows(table))) if self.hashes else table


def hash_of(text: str, key: str) -> str:
    """Return 32 hex digits of the BLAKE2b of a text, keyed by the BLAKE2b of the key."""
    secret = hashlib.blake2b(os.fsencode(key)).digest()
    return hashlib.blake2b(text.encode(), key=secret, digest_size=16).hexdigest()


def erasure_key() -> str:
    """Return the key. Raises InputError for none, or a short one."""
    key = os.environ.get(KEY, "").strip()  # a mounted secret may end with a line break
    if len(key) < LEAST:
        raise InputError(
            f"{KEY}: has {len(key)} characters, expected the secret key of the tombstones with at least "
            f'{LEAST}; set it, for example to the output of `python -c "import secrets; '
            'print(secrets.token_hex(32))"`, and keep it'
        )
    return key


def tombstones_uri(root: str) -> str:
    return join(root, ERASURES, "tombstones.json")


def read_tombstones(root: str | None) -> Tombstones | None:
    """Return the tombstones of the catalog at `root`; None without a catalog, or without erased users.

    Raises InputError without their key, or with another one: their users could not be recognised.
    """
    record = read_json(tombstones_uri(root)) if root is not None else None
    if record is None:
        return None
    try:
        hashes, check = frozenset(map(str, record["hashes"])), str(record["check"])
    except (KeyError, TypeError):
        raise InputError(
            f"catalog {root}: {ERASURES}/tombstones.json is damaged; restore it from a backup, or remove it "
            "and erase all users of the receipts again"
        ) from None
    if not os.environ.get(KEY):
        raise InputError(
            f"catalog {root}: {len(hashes):,} users were erased, but {KEY} is not set, so they cannot be "
            "left out; set it to the key of `rebeca catalog forget`"
        )
    key = erasure_key()
    if hash_of(CHECKED, key) != check:
        raise InputError(
            f"catalog {root}: {KEY} is not the key of its tombstones; set the key of its first erasure"
        )
    return Tombstones(key=key, hashes=hashes)


def add_tombstones(root: str, users: Iterable[str]) -> list[str]:
    """Write the tombstones of some users, under the lease of the catalog; return their hashes, sorted."""
    before, key = read_tombstones(root), erasure_key()
    hashes = {hash_of(user, key) for user in users}
    known = before.hashes if before else frozenset[str]()
    if not hashes <= known:
        record = {"check": hash_of(CHECKED, key), "hashes": sorted(known | hashes)}
        write_json(record, tombstones_uri(root))
    return sorted(hashes)
