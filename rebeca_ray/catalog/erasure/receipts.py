"""Receipts: what was erased, where, when and how much of it, as a chain of files that nobody changes.

    <root>/erasures/receipts/000001.json     each holds the sha256 of the one before

A receipt names its users by their tombstones. An erasure that was interrupted gets its receipt when the same
command completes it, with the counts of this last part.
"""

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime

from typing_extensions import TypedDict

from rebeca_ray.catalog.erasure.removed import Removed
from rebeca_ray.catalog.erasure.tombstones import ERASURES
from rebeca_ray.errors import InputError
from rebeca_ray.storage.filesystem import join, list_files, storage_errors
from rebeca_ray.storage.objects import encode_json
from rebeca_ray.storage.store import open_store


class Receipt(TypedDict):
    """One erasure that ended. `previous_sha256` is null in the first receipt."""

    number: int
    erased_at: str  # ISO 8601, UTC
    catalog_id: str
    fencing_token: int
    places: list[str]  # the catalog, and everything else that the command was given
    tombstones: list[str]
    removed: dict[str, int]
    previous_sha256: str | None


def write_receipt(
    root: str, *, catalog_id: str, token: int, places: Sequence[str], hashes: list[str], removed: Removed
) -> Receipt | None:
    """Write the receipt of an erasure; None if it removed nothing, and its users have receipts."""
    earlier, previous = read_receipts(root)
    receipted = {number for receipt in earlier for number in receipt["tombstones"]}
    if not removed.counts and receipted.issuperset(hashes):
        return None
    receipt = Receipt(
        number=len(earlier) + 1,
        erased_at=datetime.now(UTC).isoformat(timespec="seconds"),
        catalog_id=catalog_id,
        fencing_token=token,
        places=list(places),
        tombstones=hashes,
        removed=dict(sorted(removed.counts.items())),
        previous_sha256=previous,
    )
    uri = receipt_uri(root, receipt["number"])
    with storage_errors(uri):
        open_store(uri).put(encode_json(dict(receipt)))
    return receipt


def receipt_uri(root: str, number: int) -> str:
    return join(root, ERASURES, "receipts", f"{number:06d}.json")


def read_receipts(root: str) -> tuple[list[Receipt], str | None]:
    """Return all receipts, the first one first, and the sha256 of the last.

    Raises InputError if one is missing or was changed.
    """
    receipts: list[Receipt] = []
    previous: str | None = None
    for number, uri in enumerate(list_files(join(root, ERASURES, "receipts"), ".json"), 1):
        with storage_errors(uri, "read"):
            store = open_store(uri)
            data = store.filesystem.cat_file(store.path)
        try:
            receipt: Receipt = json.loads(data)
            whole = (receipt["number"], receipt["previous_sha256"]) == (number, previous)
        except (ValueError, RecursionError, TypeError, KeyError):
            whole = False
        if not whole:
            raise InputError(
                f"receipts {uri}: does not follow the receipt before it, so one of them is missing or was "
                "changed; restore them from a backup, or move the folder away to begin a new chain"
            )
        receipts.append(receipt)
        previous = hashlib.sha256(data).hexdigest()
    return receipts, previous
