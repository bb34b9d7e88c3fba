"""Images as objects of their own, for a CDN, and a table that says who is shown which.

    <out>/objects/<two digits>/<item_id>.<kind>              never changes: the same item has the same key in every export
    <out>/urls/run_id=<id>/bucket=<b>.parquet                schemas.URLS, of one snapshot
    <out>/latest.json                                        the export that is whole, written last; and the one before it

An object is written once, in the first export that needs it. It is removed one export after nobody is shown it any more, so that pages
that were made from the table before still have their pictures.
"""

import mimetypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.catalog.layout import POOL, for_each_bucket
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.cluster import start_ray
from rebeca_ray.errors import UserError
from rebeca_ray.storage import (
    delete,
    is_local,
    join,
    one_line,
    open_filesystem,
    read_json,
    read_table,
    replace_file,
    write_json,
    write_table,
)

LATEST = "latest.json"
IMAGES_AT_ONCE = 500  # in memory
WRITERS = 16
KEPT_FOR_EVER = "public, max-age=31536000, immutable"
COLUMNS = ["user_id", "rank", "item_id", "like_probability", "origin", "image_file", "image_row"]


@dataclass(frozen=True, kw_only=True)
class ImageExport:
    """An export that is whole: of which run, with a file of URLs (below the folder) for each bucket."""

    run_id: str
    run_date: str
    num_buckets: int
    url_base: str
    files: list[str]
    pool: list[str]  # items of the strangers' pool, which its own bucket alone writes and removes
    before: dict[str, Any] | None = None  # the export that this one followed, without its own `before`


@dataclass(kw_only=True)
class Exported:
    """What came of a bucket, or of all: rows of URLs, objects written and removed."""

    urls: int = 0
    written: int = 0
    removed: int = 0
    files: list[str] = field(default_factory=list)


def read_export(out: str) -> ImageExport | None:
    """The latest whole export in a folder; None if there is none. Raises UserError if its `latest.json` is something else."""
    told = read_json(join(out, LATEST))
    try:
        return None if told is None else ImageExport(**told)
    except TypeError:
        raise UserError(f"export {out}: its {LATEST} is not that of an export of images; choose another folder") from None


def export_images(snapshot: Snapshot, out: str, url_base: str) -> Exported:
    """Write a snapshot's images that are not there yet, and its table of URLs: `url_base`, a slash, and the object's key.

    An export that died is repeated: objects are written over by the same bytes. Of a snapshot that is exported already with these URLs
    nothing is written.
    """
    url_base = url_base.rstrip("/")
    last = read_export(out)
    if last is not None and (last.run_id, last.url_base) == (snapshot.run_id, url_base):
        return Exported(urls=sum(read_table(join(out, path), "export", ["rank"]).num_rows for path in last.files), files=last.files)
    num_buckets = snapshot.manifest["num_buckets"]
    pool = snapshot.for_user(POOL, COLUMNS)
    pool_keys = {item: key_of(item, image) for item, image in zip(pool["item_id"].to_pylist(), snapshot.named_images(pool), strict=True)}
    known = [last, ImageExport(**last.before) if last and last.before else None]
    there, gone = (export if export and export.num_buckets == num_buckets else None for export in known)  # else none can be told
    if num_buckets > 1:
        start_ray()

    def work(bucket: int) -> Exported:
        return export_bucket(snapshot, out, url_base, pool_keys, there, gone, bucket)

    found = for_each_bucket(work, num_buckets, lambda: None)
    done = Exported(
        urls=sum(part.urls for part in found),
        written=sum(part.written for part in found),
        removed=sum(part.removed for part in found),
        files=[path for part in found for path in part.files],
    )
    export = ImageExport(
        run_id=snapshot.run_id,
        run_date=snapshot.manifest["run_date"],
        num_buckets=num_buckets,
        url_base=url_base,
        files=done.files,
        pool=[*pool_keys],
        before={**asdict(last), "before": None} if last else None,
    )
    write_json(asdict(export), join(out, LATEST))
    if last and last.before and last.before["run_id"] not in (snapshot.run_id, last.run_id):
        delete(join(out, f"urls/run_id={last.before['run_id']}"))
    return done


def export_bucket(
    snapshot: Snapshot,
    out: str,
    url_base: str,
    pool_keys: dict[str, str],
    last: ImageExport | None,
    before_last: ImageExport | None,
    bucket: int,
) -> Exported:
    """The objects and the file of URLs of one bucket. The strangers' pool is written and removed by the bucket it is in."""
    items = snapshot.bucket("items", bucket, snapshot.manifest["num_buckets"], COLUMNS)
    there, gone = keys_of(out, last, bucket), keys_of(out, before_last, bucket)
    keys = pool_keys | there
    missing = owned(items, [*pool_keys])
    missing = missing.filter(pc.invert(pc.is_in(missing["item_id"], value_set=pa.array([*there], pa.string()))))
    missing = missing.sort_by([("image_file", "ascending"), ("image_row", "ascending")])
    for start in range(0, missing.num_rows, IMAGES_AT_ONCE):
        part = missing.slice(start, IMAGES_AT_ONCE)
        images = snapshot.named_images(part)
        part_keys = [key_of(item, image) for item, image in zip(part["item_id"].to_pylist(), images, strict=True)]
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(lambda pair: write_object(join(out, pair[0]), pair[1]["bytes"]), zip(part_keys, images, strict=True)))
        keys |= dict(zip(part["item_id"].to_pylist(), part_keys, strict=True))
    image_key = [keys[item] for item in items["item_id"].to_pylist()]
    columns = {name: items[name] for name in COLUMNS[:5]} | {
        "image_key": image_key,
        "image_url": [f"{url_base}/{key}" for key in image_key],
    }
    path = f"urls/run_id={snapshot.run_id}/bucket={bucket}.parquet"
    write_table(pa.table(columns, schema=schemas.URLS), join(out, path), row_group_size=2000)
    stale = set(gone.values()) - set(there.values()) - set(image_key)
    for key in stale:
        delete(join(out, key))
    return Exported(urls=items.num_rows, written=missing.num_rows, removed=len(stale), files=[path])


def keys_of(out: str, export: ImageExport | None, bucket: int) -> dict[str, str]:
    """The keys of the objects that a bucket of an earlier export owns, by item."""
    if export is None:
        return {}
    urls = owned(read_table(join(out, export.files[bucket]), "export", ["user_id", "item_id", "image_key"]), export.pool)
    return dict(zip(urls["item_id"].to_pylist(), urls["image_key"].to_pylist(), strict=True))


def owned(items: pa.Table, pool: list[str]) -> pa.Table:
    """Without the items that strangers have from the pool: those stand under its own name too, in its own bucket."""
    shared = pc.is_in(items["item_id"], value_set=pa.array(pool, pa.string()))
    return items.filter(pc.or_(pc.equal(items["user_id"], POOL), pc.invert(shared)))


def key_of(item: str, image: dict[str, Any]) -> str:
    """Where the image of an item is; by the first two digits, since stores spread their load by the beginning of a key."""
    return f"objects/{item[:2]}/{item}.{image['path'].rsplit('.', 1)[-1]}"


def write_object(uri: str, image: bytes) -> None:
    filesystem, path = open_filesystem(uri)
    with one_line(uri, "written"):
        if is_local(filesystem):
            replace_file(Path(path), image)
        else:
            kind = mimetypes.guess_type(uri)[0] or "application/octet-stream"
            filesystem.pipe_file(path, image, ContentType=kind, CacheControl=KEPT_FOR_EVER)
