"""A snapshot as key-value files, for the bulk load of a serving store: per user, the items as JSON.

    <out>/<format>/run_id=<id>[,since=<id>]/token=<n>/part-<bucket>.*
    <out>/<format>/run_id=<id>[,since=<id>]/token=<n>/export.json     description, written last
    <out>/<format>/latest.json                                        latest complete export, and the lease

Items are sorted best first. `jsonl` has one line per user. `redis` has commands in the protocol of Redis, for
`redis-cli --pipe`. Each bucket has one part file. The seven latest exports stay.
"""

import json
from dataclasses import asdict, dataclass
from typing import Literal, NotRequired, TypedDict

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.catalog.exports.image_objects import LEASE_SECONDS, read_export
from rebeca_ray.catalog.exports.old_exports import remove_old_exports
from rebeca_ray.catalog.layout import outside
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.config.fields import absolute
from rebeca_ray.errors import InputError
from rebeca_ray.ray_runtime import for_each_bucket
from rebeca_ray.storage.failures import only_warn
from rebeca_ray.storage.filesystem import join, open_filesystem
from rebeca_ray.storage.objects import HashingSink, write_json
from rebeca_ray.storage.parquet import read_table

Format = Literal["jsonl", "redis"]
COLUMNS = ["user_id", "rank", "item_id", "like_probability"]  # `origin` would age without a change
DESCRIPTION, KEPT = "export.json", 7
ENDINGS = {"jsonl": "jsonl", "redis": "resp"}
PARTS = r"part-[\d-]+\.(jsonl|resp)"  # an erasure rewrites a part, under a longer name


class ValueItem(TypedDict):
    """One item of a user, as the value has it."""

    rank: int
    item_id: str
    like_probability: float | None
    image_url: NotRequired[str]


@dataclass(frozen=True, kw_only=True)
class PartFile:
    """One part file: its path below the folder, users to set and to remove, size and checksum."""

    path: str
    users: int
    removed: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class KeyValues:
    """The written folder of part files, with the number of users to set and to remove."""

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
    """Write every user's items. With the run `since`, write only the users that changed after its snapshot.

    `DEL`, or a line with `"items": null`, removes a departed user. `images` is the folder of an image export
    of this snapshot: with it, every item has its `image_url`. The key of the population pool is `key_prefix`
    alone. Every export has a folder of its own, so an earlier one stays whole. Raises InputError if `since`
    or `images` do not fit the snapshot, LeaseHeldError while another export of this format writes to `out`.
    """
    out = outside(snapshot.root, out, "out")
    # Opened once, for all buckets; raises before anything is written.
    later = None if since is None else [after.only("changes") for after in snapshot.back_to(since)]
    urls = None if images is None else url_files(snapshot, absolute(images))
    base = join(out, format)
    with hold_lease(base, f"export of {snapshot.run_id}", LEASE_SECONDS) as lease:
        name = f"run_id={snapshot.run_id}{f',since={since}' if since else ''}/token={lease.fencing_token}"
        folder, items = join(base, name), snapshot.only("items")

        def work(bucket: int) -> PartFile | None:
            return export_bucket(items, folder, format, key_prefix, later, urls, bucket)

        buckets = range(snapshot.manifest.num_buckets)
        parts = [part for part in for_each_bucket(work, buckets, name="export values") if part]
        description = {
            "run_id": snapshot.run_id,
            "since": since,
            "format": format,
            "key_prefix": key_prefix,
            "files": [asdict(part) for part in parts],
        }
        write_json(description, join(folder, DESCRIPTION))
        previous = read_pointer(base)[0].snapshot
        lease.publish(run_id=snapshot.run_id, run_date=snapshot.manifest.run_date, snapshot=name)
        with only_warn(f"removing earlier exports from {base}"):
            remove_old_exports(base, lease, previous, description=DESCRIPTION, parts=PARTS, keep=KEPT)
    return KeyValues(
        folder=folder,
        files=[part.path for part in parts],
        users=sum(part.users for part in parts),
        removed=sum(part.removed for part in parts),
    )


def url_files(snapshot: Snapshot, images: str) -> list[str]:
    """Return the files of URLs by bucket. Raises InputError unless the export is of this very snapshot."""
    export = read_export(images)
    if export is None or export.run_id != snapshot.run_id:
        raise InputError(
            f"images {images}: holds {f'an export of run {export.run_id}' if export else 'no export'}, "
            f"expected one of run {snapshot.run_id}; run `rebeca catalog export images` first"
        )
    return [join(images, path) for path in export.files]


def export_bucket(
    snapshot: Snapshot,
    folder: str,
    format: Format,
    key_prefix: str,
    later: list[Snapshot] | None,
    urls: list[str] | None,
    bucket: int,
) -> PartFile | None:
    """Write the part file of one bucket; return None for a bucket without users.

    With `later` snapshots, the part has only the users whom one of them changed.
    """
    changed = None if later is None else changed_users(later, bucket, snapshot.num_buckets)
    if changed == []:
        return None
    if urls is not None:
        items = read_table(urls[bucket], "export", [*COLUMNS, "image_url"])
    else:
        items = snapshot.bucket("items", bucket, snapshot.manifest.num_buckets, COLUMNS)
    if changed is not None:
        items = items.filter(pc.is_in(items["user_id"], value_set=pa.array(changed, pa.string())))
    values = items_by_user(items, changed or [])
    if not values:
        return None
    path = f"part-{bucket:05d}.{ENDINGS[format]}"
    filesystem, base = open_filesystem(folder)
    encode = line_of if format == "jsonl" else command_of
    with HashingSink(filesystem, join(base, path)) as sink:
        for user, user_items in values.items():
            sink.write(encode(key_prefix, user, user_items))
    removed = sum(user_items is None for user_items in values.values())
    return PartFile(path=path, users=len(values) - removed, removed=removed, **sink.record())


def changed_users(later: list[Snapshot], bucket: int, num_buckets: int) -> list[str]:
    """Return the users of a bucket whose items some snapshots changed, sorted."""
    changes = [snapshot.bucket("changes", bucket, num_buckets, ["user_id"]) for snapshot in later]
    return sorted({user for table in changes for user in table["user_id"].unique().to_pylist()})


def items_by_user(items: pa.Table, users: list[str]) -> dict[str, list[ValueItem] | None]:
    """Return the items of each user; None for one of `users` without items."""
    values: dict[str, list[ValueItem] | None] = dict.fromkeys(users)
    value_items: list[ValueItem] = items.drop_columns(["user_id"]).to_pylist()
    for user, item in zip(items["user_id"].to_pylist(), value_items, strict=True):
        values[user] = [*(values.get(user) or []), item]
    return values


def line_of(_: str, user: str, items: list[ValueItem] | None) -> bytes:
    """Return a line of JSON."""
    return json.dumps({"user_id": user, "items": items}, separators=(",", ":")).encode() + b"\n"


def command_of(key_prefix: str, user: str, items: list[ValueItem] | None) -> bytes:
    """Return a command in the protocol of Redis (RESP 2): an array of strings, each after its length."""
    key = f"{key_prefix}{user}".encode()
    if items is None:
        words = [b"DEL", key]
    else:
        words = [b"SET", key, json.dumps(items, separators=(",", ":")).encode()]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
