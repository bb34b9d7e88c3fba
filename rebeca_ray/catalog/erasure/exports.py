"""Erase some users from the exports of a catalog, in the folders that the caller names.

    <out>/urls/run_id=…/token=…/bucket=<b>.parquet      rewritten, as a whole, under the same name
    <out>/objects/…                                     removed, if no other user shows them
    <out>/<format>/run_id=…/token=…/part-*              rewritten, then the description, then the old goes

Objects go before the rows that name them, so that an erasure that was killed finds them again. An export
without a description was never finished, and goes as a whole.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.catalog.erasure.removed import Removed
from rebeca_ray.catalog.exports.image_objects import LEASE_SECONDS, ImageExport, read_export
from rebeca_ray.catalog.exports.key_values import DESCRIPTION, ENDINGS, PARTS, PartFile
from rebeca_ray.catalog.exports.old_exports import FOLDER
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.errors import InputError
from rebeca_ray.identity import bucket_of
from rebeca_ray.storage.filesystem import (
    delete_files,
    join,
    list_files,
    list_folders,
    open_filesystem,
    remove_empty_folders,
    storage_errors,
)
from rebeca_ray.storage.objects import HashingSink, read_json, write_json
from rebeca_ray.storage.parquet import open_parquet, read_table, write_table

URL_ROW_GROUP = 2000
OURS = re.compile(rf"({PARTS}|bucket=\d+\.parquet)(\.partial\S*)?")
Belongs = Callable[[bytes], bool]


def erase_from_export(
    out: str, users: list[str], item_ids: set[str], removed: Removed, leases: ExitStack
) -> None:
    """Erase some users, and the objects of items that were made for them alone, from the export at `out`.

    Unless it is a dry run, the lease of the export is held until `leases` end: an export of the old snapshot
    would bring the users back. Raises InputError for a folder that is no export, LeaseHeldError while an
    export writes there.
    """

    def token(base: str) -> int:
        if removed.dry_run:
            return 0
        return leases.enter_context(hold_lease(base, "forget", LEASE_SECONDS)).fencing_token

    if formats := formats_in(out):
        for base in (join(out, name) for name in formats):
            erase_values(base, users, token(base), removed)
    else:
        token(out)
        erase_images(out, users, item_ids, removed)


def formats_in(out: str) -> list[str]:
    """Return the formats of the key-value exports at `out`; none for an export of images.

    Raises InputError for a folder that is no export.
    """
    folders = {*list_folders(out)}
    if "urls" in folders and folders <= {"objects", "urls"}:
        return []
    if folders and folders <= {*ENDINGS}:
        return sorted(folders)
    raise InputError(
        f"folder {out}: holds no export of images, no key-values and no prior; give the folder that "
        "`rebeca catalog export images`, `rebeca catalog export key-values` or `rebeca train` wrote"
    )


def files_by_folder(base: str) -> dict[str, list[str]]:
    """Return the names of the files of every export below `base`, by its folder."""
    files = defaultdict[str, list[str]](list)
    for uri in list_files(base):
        if match := FOLDER.fullmatch(uri.removeprefix(f"{base.rstrip('/')}/")):
            folder, _, name = match.groups()
            files[folder].append(name)
    return files


def erase_images(out: str, users: list[str], item_ids: set[str], removed: Removed) -> None:
    """Erase users from the tables of URLs, and the objects that these users alone were shown."""
    exports: list[ImageExport] = []
    for folder, names in files_by_folder(join(out, "urls")).items():
        export = read_export(out, f"urls/{folder}") if "manifest.json" in names else None
        if export is None:
            remove_export(join(out, "urls", folder), names, removed)
        else:
            exports.append(export)
    tables: dict[str, pa.Table] = {}  # of the users' buckets, by path
    for export in exports:
        for bucket in sorted({bucket_of(user, export.num_buckets) for user in users}):
            path = export.files[bucket]
            tables[path] = read_table(join(out, path), "export")
    names = pa.array(users, pa.string())
    shown = {key for export in exports for key in export.pool.values()}
    gone: set[str] = set()
    erased: dict[str, pa.Table] = {}
    for path, table in tables.items():
        of_users = pc.is_in(table["user_id"], value_set=names)
        theirs, kept = table.filter(of_users), table.filter(pc.invert(of_users))
        shown.update(kept["image_key"].to_pylist())
        mine = theirs.filter(pc.not_equal(theirs["origin"], schemas.POPULATION))
        gone.update(mine["image_key"].to_pylist())
        if theirs.num_rows:
            removed.add("URLs", theirs.num_rows, join(out, path))
            erased[path] = kept
    objects = {uri.removeprefix(f"{out.rstrip('/')}/") for uri in list_files(join(out, "objects"))}
    gone |= {key for key in objects if key.rpartition("/")[2].partition(".")[0] in item_ids}
    keys = sorted((gone & objects) - shown)
    removed.add("image objects", len(keys), *(join(out, key) for key in keys))
    if removed.dry_run:
        return
    delete_files([join(out, key) for key in keys])
    for path, kept in erased.items():
        write_table(kept, join(out, path), row_group_size=URL_ROW_GROUP)
    for export in exports:
        uri = join(out, export.folder, "manifest.json")
        urls = open_parquet(join(out, export.folder), "export").num_rows
        if urls != export.urls:
            write_json({**(read_json(uri) or {}), "urls": urls}, uri)


def remove_export(folder: str, names: list[str], removed: Removed) -> None:
    """Remove the files of an export that was never finished."""
    removed.add("unfinished exports", 1, folder)
    if not removed.dry_run:
        delete_files([join(folder, name) for name in names if OURS.fullmatch(name)])
        remove_empty_folders(folder)


def erase_values(base: str, users: list[str], token: int, removed: Removed) -> None:
    """Erase users from all key-value exports of one format."""
    for folder, names in files_by_folder(base).items():
        uri = join(base, folder)
        description = read_json(join(uri, DESCRIPTION))
        if description is None:
            remove_export(uri, names, removed)
            continue
        is_theirs = theirs_among(description["format"], description["key_prefix"], users)
        parts: list[PartFile] = []
        for number, values in enumerate(description["files"]):
            part = PartFile(**values)
            parts += part_without(uri, part, is_theirs, f"{token:06d}-{number:04d}", removed)
        files = [vars(part) for part in parts]
        if removed.dry_run:
            continue
        if files != description["files"]:
            write_json({**description, "files": files}, join(uri, DESCRIPTION))
        described = {part.path for part in parts}
        delete_files([join(uri, name) for name in names if OURS.fullmatch(name) and name not in described])


def part_without(
    folder: str, part: PartFile, is_theirs: Belongs, name: str, removed: Removed
) -> list[PartFile]:
    """Return a part without the entries of some users, rewritten if it held any; none if none is left."""
    filesystem, path = open_filesystem(join(folder, part.path))
    with storage_errors(join(folder, part.path), "read"):
        data: bytes = filesystem.cat_file(path)
    entries = list(entries_of(data, part.path))
    kept = [entry for entry in entries if not is_theirs(entry)]
    gone = len(entries) - len(kept)
    removed.add("key-values", gone, *([join(folder, part.path)] if gone else []))
    if not gone or removed.dry_run:
        return [part]
    if not kept:
        return []
    bucket, ending = re.sub(r"\D.*", "", part.path.removeprefix("part-")), part.path.rpartition(".")[2]
    new = f"part-{bucket}-{name}.{ending}"
    with HashingSink(*open_filesystem(join(folder, new))) as sink:
        for entry in kept:
            sink.write(entry)
    departed = sum(is_removal(entry) for entry in kept)
    return [PartFile(path=new, users=len(kept) - departed, removed=departed, **sink.record())]


def entries_of(data: bytes, path: str) -> Iterator[bytes]:
    """Yield the lines of JSON of a part, or its commands to Redis."""
    if path.endswith(f".{ENDINGS['jsonl']}"):
        yield from data.splitlines(keepends=True)
        return
    start = 0
    while start < len(data):
        end = data.index(b"\r\n", start) + 2
        for _ in range(int(data[start + 1 : end])):  # words, each after its length
            head = data.index(b"\r\n", end) + 2
            end = head + int(data[end + 1 : head]) + 2
        yield data[start:end]
        start = end


def is_removal(entry: bytes) -> bool:
    """Return whether an entry removes a user who left."""
    return entry.startswith(b"*2\r\n") or entry.endswith(b'"items":null}\n')


def theirs_among(format: str, key_prefix: str, users: list[str]) -> Belongs:
    """Return a function that recognises the entries of some users."""
    if format == "jsonl":
        beginnings = {f'{{"user_id":{json.dumps(user)}'.encode() for user in users}
        return lambda line: line.partition(b',"items":')[0] in beginnings
    keys = {f"{key_prefix}{user}".encode() for user in users}

    def is_theirs(command: bytes) -> bool:
        """Compare the second word, the key."""
        words = command.split(b"\r\n", 3)  # number of words, length, name of the command, the rest
        length, _, rest = words[3].partition(b"\r\n")
        return rest[: int(length[1:])] in keys

    return is_theirs
