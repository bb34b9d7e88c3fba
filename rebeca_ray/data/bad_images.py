"""Images that cannot be read: refuse them all at once by name, or leave them out and say so every time."""

import logging

from rebeca_ray.errors import InputError, shown
from rebeca_ray.storage.filesystem import delete, join
from rebeca_ray.storage.objects import read_json, write_json

log = logging.getLogger(__name__)

FILE = "bad_images.json"  # beside embedded items: item id -> the reason why its image is left out
MAX_NAMED = 10


def read_bad_images(out: str) -> dict[str, str]:
    """Return the reasons of the items that an earlier run left out, by item id."""
    return dict(read_json(join(out, FILE)) or {})


def write_bad_images(reasons: dict[str, str], out: str) -> None:
    """Record the reasons of the items that are left out. Without one, no file remains."""
    if reasons:
        write_json(reasons, join(out, FILE))
    else:
        delete(join(out, FILE))


def refuse_bad_images(uri: str, reasons: dict[str, str], total: int) -> None:
    """Raise InputError if there are bad images. It has their number, and the reasons of the first ten."""
    if reasons:
        raise InputError(
            f"{describe_bad(uri, reasons, total)}; mend or drop those items, "
            "or set bad_images=drop to leave them out"
        )


def warn_of_bad_images(uri: str, reasons: dict[str, str], total: int, out: str) -> None:
    """Log how many images are left out, and the reasons of the first ten."""
    if reasons:
        log.warning(
            "%s; left out until %s is removed, or all items are embedded again",
            describe_bad(uri, reasons, total),
            join(out, FILE),
        )


def describe_bad(uri: str, reasons: dict[str, str], total: int) -> str:
    """Return one line with the number of bad images, and the first ten with their reasons."""
    named = [f"{shown(item)} {reason}" for item, reason in sorted(reasons.items())[:MAX_NAMED]]
    more = ["…"] if len(reasons) > MAX_NAMED else []
    return (
        f"items {uri}: {len(reasons):,} of {total:,} images cannot be decoded ({' | '.join([*named, *more])})"
    )
