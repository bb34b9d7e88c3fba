"""Guess which column of the ratings holds users, items, ratings and times, from common names."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rebeca_ray.errors import InputError, did_you_mean

# The first name that fits counts. Case, spaces and punctuation do not matter: `userId` is `user_id`.
COMMON_NAMES = {
    "user_id": (
        "user_id user uid user_name rater rater_id worker worker_id annotator customer customer_id "
        "reviewer_id participant_id person visitor_id member_id"
    ),
    "item_id": (
        "item_id item image image_id item_name image_name movie_id product_id product photo photo_id picture "
        "picture_id asin book_id track_id artwork_id sticker file_name image_file image_path filename file"
    ),
    "rating": "rating ratings score stars label liked like preference response overall value",
    "timestamp": "timestamp time datetime date rated_at created_at unix_time event_time ts",
    "event": "event",
}
NOUNS = {"user_id": "users", "item_id": "items", "rating": "ratings", "timestamp": "times"}
REQUIRED = ("user_id", "item_id")
OPTIONAL = ("rating", "timestamp", "event")
MAX_COLUMNS_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Column:
    """The name in the file of a declared column, and whether its name was guessed."""

    name: str
    guessed: bool


def choose_columns(uri: str, names: Sequence[str], given: Mapping[str, str]) -> dict[str, Column]:
    """Return the columns by declared name. `given` are those that a person named; an empty name is for none.

    Raises InputError for a name that the file lacks or has twice, and if users or items cannot be guessed.
    """
    chosen: dict[str, Column] = {}
    for declared, name in given.items():
        if not name:
            continue
        if name not in names:
            raise InputError(
                f"interactions {uri}: column {name!r} is missing; {did_you_mean(name, names)}; "
                f"correct {declared}=NAME"
            )
        chosen[declared] = Column(name=name, guessed=False)
    for declared in COMMON_NAMES:
        taken = {column.name for column in chosen.values()}
        free = [name for name in names if name not in taken]
        if declared not in given and (best := guess(declared, free)):
            chosen[declared] = Column(name=best, guessed=best != declared)
    for declared in REQUIRED:
        if declared not in chosen:
            shown = ", ".join(names[:MAX_COLUMNS_SHOWN]) + (" …" if len(names) > MAX_COLUMNS_SHOWN else "")
            raise InputError(
                f"interactions {uri}: no column for the {NOUNS[declared]} among {shown}; "
                f"expected a common name such as {declared}; name yours by {declared}=NAME"
            )
    used = [column.name for column in chosen.values()]
    for name in used:
        if used.count(name) > 1 or list(names).count(name) > 1:
            raise InputError(
                f"interactions {uri}: column {name!r} is there or named twice; expected one column each; "
                "rename one, or give each another name"
            )
    return chosen


def guess(declared: str, names: Sequence[str]) -> str | None:
    """Return the name in the file that fits a declared column best, or None."""
    by_plain = {plain(name): name for name in reversed(names)}
    return next((by_plain[plain(c)] for c in COMMON_NAMES[declared].split() if plain(c) in by_plain), None)


def plain(name: str) -> str:
    """Return a name in small letters, without spaces and punctuation."""
    return re.sub(r"[\W_]+", "", name).lower()
