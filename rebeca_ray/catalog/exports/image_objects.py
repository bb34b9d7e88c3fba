"""Images as objects of their own, for a CDN, and a table that says who is shown which.

    <out>/objects/<two digits>/<item_id>.<kind>              never changes: the same item has the same key in every export
    <out>/urls/run_id=<id>/token=<n>/bucket=<b>.parquet      schemas.URLS of one snapshot
    <out>/urls/run_id=<id>/token=<n>/manifest.json           ImageExport, written last
    <out>/latest.json                                        the export that is whole, and who may write: as a catalog's own

An object is written once, in the first export that needs it. It is removed when neither the new export nor the one before shows it, so
that pages that were made from the table before still have their pictures. What strangers are shown stays: anybody may still be shown the
pool of some night before. An earlier table that cannot be read is taken as not there: its images are written again, none is removed.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.catalog.layout import POPULATION_USER, outside
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.errors import InputError, StorageError, UserError
from rebeca_ray.ray_runtime import for_each_bucket
from rebeca_ray.storage.filesystem import delete, delete_files, join, list_files, list_folders, storage_errors
from rebeca_ray.storage.objects import read_json, write_json
from rebeca_ray.storage.parquet import read_table, write_table
from rebeca_ray.storage.store import open_store

log = logging.getLogger(__name__)

IMAGES_AT_ONCE = 500  # in memory
WRITERS = 16
LEASE_SECONDS = 60
COLUMNS = ["user_id", "rank", "item_id", "like_probability", "origin", "image_file", "image_row"]


@dataclass(frozen=True, kw_only=True)
class ImageExport:
    """An export that is whole: of which run, with a file of URLs for each bucket."""

    folder: str  # below the export's root, as the files are
    run_id: str
    run_date: str
    num_buckets: int
    url_base: str
    files: list[str]
    urls: int
    pool: dict[str, str]  # the keys of all items that strangers ever shared
    before: str | None  # folder of the export that this one followed


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export did, or its part for a bucket: rows of URLs, objects written and removed, files of URLs."""

    urls: int
    written: int
    removed: int
    files: list[str]


def read_export(out: str, folder: str | None = None) -> ImageExport | None:
    """The latest whole export at a root, or the one in a folder; None if there is none. Raises UserError if it is something else."""
    folder = folder or read_pointer(out)[0].snapshot
    told = read_json(join(out, folder, "manifest.json")) if folder else None
    try:
        return None if told is None else ImageExport(**told)
    except TypeError:
        raise InputError(
            f"export {out}: holds something else than an export of images; choose another folder"
        ) from None


def export_images(snapshot: Snapshot, out: str, url_base: str) -> Exported:
    """Write a snapshot's images that are not there yet, and its table of URLs: `url_base`, a slash, and the object's key.

    An export that died is repeated: objects are written over by the same bytes. Of a snapshot that is exported already with these URLs
    nothing is written. Raises LeaseHeldError while another export to `out` is at work.
    """
    out, url = outside(snapshot.root, out, "out"), urlsplit(url_base)
    if not ((url.scheme and url.netloc) or url_base.startswith("/")) or any(
        letter.isspace() for letter in url_base
    ):
        raise InputError(
            f"url_base {url_base!r}: is no URL; give one such as https://cdn.example.com/recs, or a path that begins with /"
        )
    url_base = url_base.rstrip("/")
    if others := {*list_folders(out)} - {"objects", "urls"}:
        raise InputError(
            f"out {out}: holds something else ({min(others)}) than an export of images; choose another folder"
        )
    read_export(out)
    with hold_lease(out, f"export of {snapshot.run_id}", LEASE_SECONDS) as lease:
        last = read_export(out)
        done_already = last is not None and (last.run_id, last.url_base) == (snapshot.run_id, url_base)
        if last and done_already and len(list_files(join(out, last.folder), ".parquet")) == len(last.files):
            return Exported(urls=last.urls, written=0, removed=0, files=last.files)
        before_last = read_export(out, last.before) if last and last.before else None
        num_buckets = snapshot.manifest.num_buckets
        there, gone = (
            export if export and export.num_buckets == num_buckets else None for export in (last, before_last)
        )  # or unknown
        shared = snapshot.for_user(POPULATION_USER, COLUMNS)
        pool = last.pool.copy() if last else {}
        pool |= {item: key_of(item, image) for item, image in images_of(snapshot, shared).items()}
        folder = f"urls/run_id={snapshot.run_id}/token={lease.fencing_token}"

        def work(bucket: int) -> Exported:
            return export_bucket(snapshot, out, folder, url_base, pool, there, gone, bucket)

        done = total(for_each_bucket(work, range(num_buckets)))
        export = ImageExport(
            folder=folder,
            run_id=snapshot.run_id,
            run_date=snapshot.manifest.run_date,
            num_buckets=num_buckets,
            url_base=url_base,
            files=done.files,
            urls=done.urls,
            pool=pool,
            before=last.folder if last else None,
        )
        write_json(asdict(export), join(out, folder, "manifest.json"))
        lease.publish(run_id=export.run_id, run_date=export.run_date, snapshot=folder)
        if before_last:
            delete(join(out, before_last.folder))
    return done


def total(parts: Sequence[Exported]) -> Exported:
    return Exported(
        urls=sum(part.urls for part in parts),
        written=sum(part.written for part in parts),
        removed=sum(part.removed for part in parts),
        files=[path for part in parts for path in part.files],
    )


def export_bucket(
    snapshot: Snapshot,
    out: str,
    folder: str,
    url_base: str,
    pool: dict[str, str],
    last: ImageExport | None,
    before_last: ImageExport | None,
    bucket: int,
) -> Exported:
    """The objects and the file of URLs of one bucket. Those of the strangers' pool are written by the bucket that it is in."""
    items = snapshot.bucket("items", bucket, snapshot.manifest.num_buckets, COLUMNS)
    there, gone = keys_of(out, last, bucket), keys_of(out, before_last, bucket, personal=True)
    before = there or {}
    keys = pool | before
    known = [*before, *(last.pool if last else {})]
    missing = items.filter(pc.invert(pc.is_in(items["item_id"], value_set=pa.array(known, pa.string()))))
    shared = pc.is_in(missing["item_id"], value_set=pa.array([*pool], pa.string()))
    missing = missing.filter(pc.or_(pc.equal(missing["user_id"], POPULATION_USER), pc.invert(shared)))
    missing = missing.sort_by([("image_file", "ascending"), ("image_row", "ascending")])
    written: set[str] = set()
    for start in range(0, missing.num_rows, IMAGES_AT_ONCE):
        images = images_of(snapshot, missing.slice(start, IMAGES_AT_ONCE))
        new = {item: key_of(item, image) for item, image in images.items()}
        with ThreadPoolExecutor(WRITERS) as writers:
            list(
                writers.map(
                    lambda key, image: write_image(join(out, key), image["bytes"]),
                    new.values(),
                    images.values(),
                )
            )
        keys |= new
        written.update(new)
    image_key = [keys[item] for item in items["item_id"].to_pylist()]
    columns = {name: items[name] for name in COLUMNS[:5]} | {
        "image_key": image_key,
        "image_url": [f"{url_base}/{key}" for key in image_key],
    }
    path = f"{folder}/bucket={bucket}.parquet"
    write_table(pa.table(columns, schema=schemas.URLS), join(out, path), row_group_size=2000)
    shown = {*before.values(), *image_key}
    stale = [key for item, key in (gone or {}).items() if key not in shown and item not in pool]
    if there is None:  # nobody knows what the export before shows
        stale = []
    delete_files([join(out, key) for key in stale])
    return Exported(urls=items.num_rows, written=len(written), removed=len(stale), files=[path])


def keys_of(
    out: str, export: ImageExport | None, bucket: int, *, personal: bool = False
) -> dict[str, str] | None:
    """The keys of the objects that an earlier export shows the users of a bucket, by item; None if there is none that can be read.

    `personal` are those that nobody else can be shown: not of a pool, be it one that was never exported as such.
    """
    if export is None:
        return None
    try:
        urls = read_table(join(out, export.files[bucket]), "export", ["item_id", "origin", "image_key"])
    except StorageError:
        raise
    except UserError as error:
        log.warning("%s; until then its images are taken to be missing", error)
        return None
    if personal:
        urls = urls.filter(pc.not_equal(urls["origin"], schemas.POPULATION))
    return dict(zip(urls["item_id"].to_pylist(), urls["image_key"].to_pylist(), strict=True))


def images_of(snapshot: Snapshot, items: pa.Table) -> dict[str, dict[str, Any]]:
    """Images by item, each once: two users may have one and the same of a pool of before."""
    return dict(zip(items["item_id"].to_pylist(), snapshot.named_images(items), strict=True))


def key_of(item: str, image: dict[str, Any]) -> str:
    """Where the image of an item is; by the first two digits, since stores spread their load by the beginning of a key."""
    return f"objects/{item[:2]}/{item}.{image['path'].rsplit('.', 1)[-1]}"


def write_image(uri: str, image: bytes) -> None:
    kind = uri.rsplit(".", 1)[-1]
    store = open_store(uri)
    with storage_errors(uri):
        store.put(
            image,
            content_type=f"image/{'jpeg' if kind == 'jpg' else kind}",
            cache_control="public, max-age=31536000, immutable",
        )
