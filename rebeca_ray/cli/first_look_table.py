"""Format a first look at data for a person: facts, left-out rows, and the next commands."""

import shlex
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from rebeca_ray.storage.objects import JsonObject

MAX_NAMED = 3


def first_look(facts: JsonObject) -> RenderableType:
    """Return a table of facts and one of the left out, the files, and the commands to paste."""
    title = escape(facts["interactions"]["path"])
    table = Table("", Column("", overflow="fold"), show_header=False, title=title)
    for name, value in (*rating_rows(facts["interactions"]), *item_rows(facts["items"])):
        table.add_row(name, escape(value))
    parts: list[RenderableType] = [table]
    if facts["left_out"]:
        left_out = Table("left out", Column("reason", overflow="fold"), "by")
        for group in facts["left_out"]:
            left_out.add_row(
                f"{group['kind']}: {group['number']:,}", group["reason"], f"rebeca {group['by']}"
            )
        parts.append(left_out)
    lines = [f"wrote {', '.join(facts['files'])} -> {facts['folder']}"]
    first, *others = facts["commands"]
    lines += [f"next: {shlex.join(first)}", *(f"then: {shlex.join(command)}" for command in others)]
    return Group(*parts, Text("\n".join(lines)))


def rating_rows(facts: JsonObject) -> Iterator[tuple[str, str]]:
    for declared, column in facts["columns"].items():
        yield declared, f"column {column['column']}{', a guess by its name' if column['guessed'] else ''}"
    yield "rows", f"{facts['rows']:,} of {facts['format']}, {facts['ratings']:,} usable ratings"
    yield "users", f"{facts['users']:,}, {facts['cold_start_users']:,} of them without a like (cold start)"
    yield "rated items", f"{facts['rated_items']:,}"
    yield "likes and dislikes", f"{facts['likes']:,} and {facts['dislikes']:,}"
    threshold = facts["like_threshold"]
    yield "a like", ("" if threshold is None else f"at least {threshold:g}: ") + facts["like_reason"]
    yield (
        "of the median user",
        f"{facts['median_likes_per_user']:g} likes, {facts['median_ratings_per_user']:g} ratings",
    )
    yield "repeated pairs", f"{facts['repeated_pairs']:,}"
    unknown = f", {facts['unknown_times']:,} unknown" if facts["unknown_times"] else ""
    span = f"from {facts['first_time']} to {facts['last_time']}{unknown}"
    yield "times", span if facts["timestamps"] else "none"


def item_rows(facts: JsonObject) -> Iterator[tuple[str, str]]:
    yield "items", f"{facts['items']:,}, {facts['format']}: {facts['path']}"
    yield "rated, not in the items", counted(facts["missing_items"], facts["missing_examples"])
    reasons = [f"{item} {reason}" for item, reason in facts["bad_examples"].items()]
    yield "images that do not open", counted(facts["bad_images"], reasons)


def counted(number: int, examples: Sequence[str]) -> str:
    """Return a number and the first examples."""
    named = [*examples[:MAX_NAMED], *(["…"] if number > MAX_NAMED else [])]
    return f"{number:,}" + (f" ({' | '.join(named)})" if number else "")
