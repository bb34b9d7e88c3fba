"""Images as single objects, for a CDN, and a table that lists each user's image URLs.

    <out>/objects/<two digits>/<item_id>.<kind>              immutable: one key per item, in every export
    <out>/urls/run_id=<id>/token=<n>/bucket=<b>.parquet      schemas.URLS of one snapshot
    <out>/urls/run_id=<id>/token=<n>/manifest.json           ImageExport, written last
    <out>/latest.json                                        latest complete export, and the writer's lease

The first export that needs an object writes it. An export removes an object that neither itself nor the
export before it shows. Pages that were made from the previous table therefore keep their images. Items of a
population pool stay for ever, because a cold-start user may still see the pool of an earlier night. An
unreadable earlier table counts as missing: its images are written again, and none is removed.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.catalog.exports.old_exports import remove_old_exports
from rebeca_ray.catalog.layout import POPULATION_USER, inside, outside
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.catalog.row_groups import EncodedImage
from rebeca_ray.errors import InputError, StorageError, UserError
from rebeca_ray.ray_runtime import for_each_bucket
from rebeca_ray.storage.failures import only_warn
from rebeca_ray.storage.filesystem import delete_files, join, list_files, list_folders, storage_errors
from rebeca_ray.storage.objects import read_json, write_json
from rebeca_ray.storage.parquet import read_table, write_table
from rebeca_ray.storage.store import open_store

log = logging.getLogger(__name__)

IMAGES_AT_ONCE = 500  # in memory
WRITERS = 16
LEASE_SECONDS = 60
ITEM_COLUMNS = ["user_id", "rank", "item_id", "like_probability", "origin"]  # as in the table of URLs
IMAGE_LOCATION = ["image_file", "image_row"]


@dataclass(frozen=True, kw_only=True)
class ImageExport:
    """A complete export of one run, with one file of URLs per bucket."""

    folder: str  # below the export's root, like the files
    run_id: str
    run_date: str
    num_buckets: int
    url_base: str
    files: list[str]
    urls: int
    pool: dict[str, str]  # keys by item, of all population pools so far
    before: str | None  # folder of the previous export


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Rows of URLs, objects written and removed, and files of URLs: of a whole export, or of one bucket."""

    urls: int
    written: int
    removed: int
    files: list[str]


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """The inputs that all buckets of one export share."""

    out: str
    folder: str  # below `out`
    url_base: str
    pool: dict[str, str]  # keys by item, of all population pools so far
    last: ImageExport | None  # None: missing, or of another number of buckets
    before_last: ImageExport | None  # likewise


def read_export(out: str, folder: str | None = None) -> ImageExport | None:
    """Return the latest complete export at a root, or the one in a folder; None if there is none.

    Raises InputError for anything else than an export.
    """
    folder = folder or read_pointer(out)[0].snapshot
    values = read_json(join(out, folder, "manifest.json")) if folder else None
    try:
        if values is None:
            return None
        export = ImageExport(**values)
        for path in (export.folder, export.before or export.folder, *export.files):
            inside(path)
        return export
    except (TypeError, ValueError, AttributeError):
        raise InputError(
            f"export {out}: holds something else than an export of images; choose another folder"
        ) from None


def export_images(snapshot: Snapshot, out: str, url_base: str) -> Exported:
    """Write the missing images of a snapshot and its table of URLs: `url_base`, a slash, the object's key.

    A repeat of a failed export overwrites objects with the same bytes. A repeat of a complete export with the
    same URLs writes nothing. Raises LeaseHeldError while another export writes to `out`.
    """
    out = outside(snapshot.root, out, "out")
    url_base = checked_url_base(url_base)
    if others := {*list_folders(out)} - {"objects", "urls"}:
        raise InputError(
            f"out {out}: holds something else ({min(others)}) than an export of images; choose another folder"
        )
    read_export(out)
    with hold_lease(out, f"export of {snapshot.run_id}", LEASE_SECONDS) as lease:
        last = read_export(out)
        if last and (last.run_id, last.url_base) == (snapshot.run_id, url_base) and is_whole(out, last):
            return Exported(urls=last.urls, written=0, removed=0, files=last.files)
        before_last = read_export(out, last.before) if last and last.before else None
        num_buckets = snapshot.manifest.num_buckets
        job = ExportJob(
            out=out,
            folder=f"urls/run_id={snapshot.run_id}/token={lease.fencing_token}",
            url_base=url_base,
            pool=pool_keys(snapshot, last),
            last=last if last and last.num_buckets == num_buckets else None,
            before_last=before_last if before_last and before_last.num_buckets == num_buckets else None,
        )

        def work(bucket: int) -> Exported:
            return export_bucket(snapshot, job, bucket)

        done = total(for_each_bucket(work, range(num_buckets), name="export images"))
        export = ImageExport(
            folder=job.folder,
            run_id=snapshot.run_id,
            run_date=snapshot.manifest.run_date,
            num_buckets=num_buckets,
            url_base=url_base,
            files=done.files,
            urls=done.urls,
            pool=job.pool,
            before=last.folder if last else None,
        )
        write_json(asdict(export), join(out, job.folder, "manifest.json"))
        lease.publish(run_id=export.run_id, run_date=export.run_date, snapshot=job.folder)
        with only_warn(f"removing earlier exports from {out}"):
            remove_old_exports(
                join(out, "urls"),
                lease,
                last.folder.removeprefix("urls/") if last else None,
                description="manifest.json",
                parts=r"bucket=\d+\.parquet",
                keep=1,
            )
    return done


def checked_url_base(url_base: str) -> str:
    """Return the base of all URLs without a final slash. Raises InputError unless it is a URL or a path."""
    url = urlsplit(url_base)
    is_address = bool(url.scheme and url.netloc) or url_base.startswith("/")
    if not is_address or any(letter.isspace() for letter in url_base):
        raise InputError(
            f"url_base {url_base!r}: is no URL; give one such as https://cdn.example.com/recs, "
            "or a path that begins with /"
        )
    return url_base.rstrip("/")


def is_whole(out: str, export: ImageExport) -> bool:
    """Return whether all files of URLs of an export still exist."""
    return len(list_files(join(out, export.folder), ".parquet")) == len(export.files)


def pool_keys(snapshot: Snapshot, last: ImageExport | None) -> dict[str, str]:
    """Return the keys by item of all population pools so far, and of this snapshot's."""
    pool = snapshot.for_user(POPULATION_USER, [*ITEM_COLUMNS, *IMAGE_LOCATION])
    keys = {item: key_of(item, image) for item, image in images_of(snapshot, pool).items()}
    return {**(last.pool if last else {}), **keys}


def total(parts: Sequence[Exported]) -> Exported:
    return Exported(
        urls=sum(part.urls for part in parts),
        written=sum(part.written for part in parts),
        removed=sum(part.removed for part in parts),
        files=[path for part in parts for path in part.files],
    )


def export_bucket(snapshot: Snapshot, job: ExportJob, bucket: int) -> Exported:
    """Write the missing objects and the file of URLs of one bucket, and remove its stale objects.

    The bucket of the population user writes the objects of the population pool.
    """
    num_buckets = snapshot.manifest.num_buckets
    items = snapshot.bucket("items", bucket, num_buckets, [*ITEM_COLUMNS, *IMAGE_LOCATION])
    last_keys = keys_of(job.out, job.last, bucket)
    before_last_keys = keys_of(job.out, job.before_last, bucket, personal=True)
    existing = last_keys or {}
    keys = job.pool | existing
    missing = missing_items(items, job, existing)
    written: set[str] = set()
    for start in range(0, missing.num_rows, IMAGES_AT_ONCE):
        images = images_of(snapshot, missing.slice(start, IMAGES_AT_ONCE))
        new = {item: key_of(item, image) for item, image in images.items()}
        with ThreadPoolExecutor(WRITERS) as writers:
            list(
                writers.map(
                    lambda key, image: write_image(join(job.out, key), image["bytes"]),
                    new.values(),
                    images.values(),
                )
            )
        keys |= new
        written.update(new)
    image_keys = [keys[item] for item in items["item_id"].to_pylist()]
    columns = {name: items[name] for name in ITEM_COLUMNS} | {
        "image_key": image_keys,
        "image_url": [f"{job.url_base}/{key}" for key in image_keys],
    }
    path = f"{job.folder}/bucket={bucket}.parquet"
    write_table(pa.table(columns, schema=schemas.URLS), join(job.out, path), row_group_size=2000)
    stale: list[str] = []
    if last_keys is not None:  # without them the shown objects are unknown, and all stay
        shown = {*last_keys.values(), *image_keys}
        candidates = (before_last_keys or {}).items()
        stale = [key for item, key in candidates if key not in shown and item not in job.pool]
    delete_files([join(job.out, key) for key in stale])
    return Exported(urls=items.num_rows, written=len(written), removed=len(stale), files=[path])


def missing_items(items: pa.Table, job: ExportJob, existing: dict[str, str]) -> pa.Table:
    """Return the items of a bucket that it must write an object for, sorted by image location."""
    known = [*existing, *(job.last.pool if job.last else {})]
    missing = items.filter(pc.invert(pc.is_in(items["item_id"], value_set=pa.array(known, pa.string()))))
    shared = pc.is_in(missing["item_id"], value_set=pa.array([*job.pool], pa.string()))
    of_this_bucket = pc.or_(pc.equal(missing["user_id"], POPULATION_USER), pc.invert(shared))
    return missing.filter(of_this_bucket).sort_by([(name, "ascending") for name in IMAGE_LOCATION])


def keys_of(
    out: str, export: ImageExport | None, bucket: int, *, personal: bool = False
) -> dict[str, str] | None:
    """Return the keys by item that an earlier export shows the users of a bucket; None if it is unreadable.

    `personal` leaves out every item of a population pool, also of a pool that was never exported as one.
    """
    if export is None:
        return None
    try:
        urls = read_table(join(out, export.files[bucket]), "export", ["item_id", "origin", "image_key"])
    except StorageError:
        raise
    except UserError as error:
        log.warning("%s; until then its images count as missing", error)
        return None
    if personal:
        urls = urls.filter(pc.not_equal(urls["origin"], schemas.POPULATION))
    return dict(zip(urls["item_id"].to_pylist(), urls["image_key"].to_pylist(), strict=True))


def images_of(snapshot: Snapshot, items: pa.Table) -> dict[str, EncodedImage]:
    """Return images by item, each once: two users may share an item of an earlier population pool."""
    return dict(zip(items["item_id"].to_pylist(), snapshot.named_images(items), strict=True))


def key_of(item: str, image: EncodedImage) -> str:
    """Return the key of an item's image. Two digits lead, because stores spread load by the start of keys."""
    return f"objects/{item[:2]}/{item}.{image['path'].rsplit('.', 1)[-1]}"


def write_image(uri: str, image: bytes) -> None:
    kind = uri.rsplit(".", 1)[-1]
    store = open_store(uri)
    with storage_errors(uri):
        store.put(
            image,
            content_type=f"image/{kind}",
            cache_control="public, max-age=31536000, immutable",
        )
