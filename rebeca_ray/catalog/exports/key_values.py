"""A snapshot as key-value files, which a serving store loads in bulk: one value a user, the items as JSON, the best first.

`jsonl` has a line a user; `redis` are commands in Redis's own protocol, for `redis-cli --pipe`. A part file a bucket.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.catalog.exports.image_objects import read_export
from rebeca_ray.catalog.layout import outside
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.config.fields import absolute
from rebeca_ray.errors import InputError
from rebeca_ray.ray_runtime import for_each_bucket
from rebeca_ray.storage.filesystem import delete, join, open_filesystem
from rebeca_ray.storage.objects import HashingSink, write_json
from rebeca_ray.storage.parquet import read_table

Format = Literal["jsonl", "redis"]
COLUMNS = ["user_id", "rank", "item_id", "like_probability"]  # not `origin`, which grows old without a change
ENDINGS = {"jsonl": "jsonl", "redis": "resp"}


@dataclass(frozen=True, kw_only=True)
class KeyValues:
    """What was written: a folder of part files, with so many users to set and to remove."""

    folder: str
    files: list[str]
    users: int
    removed: int


def export_key_values(
    snapshot: Snapshot,
    out: str,
    format: Format,
    *,
    key_prefix: str = "rebeca:",
    since: str | None = None,
    images: str | None = None,
) -> KeyValues:
    """Write every user's items, or with `since`, a run, only those of users whose items differ from that run's snapshot.

    Users who left since are removed: by `DEL`, or by a line with `"items": null`. With `images`, the folder of an export of this
    snapshot's images, every item has its `image_url`. The key of the items for strangers is `key_prefix` alone. The folder's
    `export.json`, which says what it is, is written last. Raises UserError where `since` or `images` do not fit the snapshot.
    """
    out = outside(snapshot.root, out, "out")
    if since is not None:
        snapshot.back_to(since)  # or it is told now that there is no way
    urls = None if images is None else url_files(snapshot, absolute(images))
    folder = join(out, format, f"run_id={snapshot.run_id}{f',since={since}' if since else ''}")
    delete(join(folder, "export.json"))  # of another export of the same, whose parts are written over

    def work(bucket: int) -> dict[str, Any] | None:
        return export_bucket(snapshot, folder, format, key_prefix, since, urls, bucket)

    found = [part for part in for_each_bucket(work, range(snapshot.manifest.num_buckets)) if part]
    done = KeyValues(
        folder=folder,
        files=[part["path"] for part in found],
        users=sum(part["users"] for part in found),
        removed=sum(part["removed"] for part in found),
    )
    told = {
        "run_id": snapshot.run_id,
        "since": since,
        "format": format,
        "key_prefix": key_prefix,
        "files": found,
    }
    write_json(told, join(folder, "export.json"))
    return done


def url_files(snapshot: Snapshot, images: str) -> list[str]:
    """The files of URLs of an export of this very snapshot, bucket by bucket."""
    export = read_export(images)
    if export is None or export.run_id != snapshot.run_id:
        raise InputError(
            f"images {images}: holds {f'an export of run {export.run_id}' if export else 'no export'}, expected one of run "
            f"{snapshot.run_id}; run `rebeca catalog export images` first"
        )
    return [join(images, path) for path in export.files]


def export_bucket(
    snapshot: Snapshot,
    folder: str,
    format: Format,
    key_prefix: str,
    since: str | None,
    urls: list[str] | None,
    bucket: int,
) -> dict[str, Any] | None:
    """The part file of one bucket; None if it has nobody."""
    own = None if since is None else snapshot.changed_users(since, bucket)
    if own == []:
        return None
    if urls is not None:
        items = read_table(urls[bucket], "export", [*COLUMNS, "image_url"])
    else:
        items = snapshot.bucket("items", bucket, snapshot.manifest.num_buckets, COLUMNS)
    if own is not None:
        items = items.filter(pc.is_in(items["user_id"], value_set=pa.array(own, pa.string())))
    values: dict[str, list[dict[str, Any]] | None] = dict.fromkeys(own or [])
    for row in items.to_pylist():
        user = row.pop("user_id")
        values[user] = [*(values.get(user) or []), row]
    if not values:
        return None
    path = f"part-{bucket:05d}.{ENDINGS[format]}"
    filesystem, base = open_filesystem(folder)
    write = line_of if format == "jsonl" else command_of
    with HashingSink(filesystem, join(base, path)) as sink:
        for user, own_items in values.items():
            sink.write(write(key_prefix, user, own_items))
    removed = sum(own_items is None for own_items in values.values())
    return {"path": path, "users": len(values) - removed, "removed": removed, **sink.record()}


def line_of(_: str, user: str, items: list[dict[str, Any]] | None) -> bytes:
    return json.dumps({"user_id": user, "items": items}, separators=(",", ":")).encode() + b"\n"


def command_of(key_prefix: str, user: str, items: list[dict[str, Any]] | None) -> bytes:
    """A command as Redis reads it (RESP 2): an array of strings, each with its length before it."""
    key = f"{key_prefix}{user}".encode()
    words = (
        [b"DEL", key] if items is None else [b"SET", key, json.dumps(items, separators=(",", ":")).encode()]
    )
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
