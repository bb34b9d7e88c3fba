"""Orphans of an Iceberg table: metadata files of commits that were killed or refused.

    metadata/00007-<uuid>.metadata.json     a version of the table
    metadata/snap-<id>-0-<uuid>.avro        the manifests of one snapshot
    metadata/<uuid>-m0.avro                 one manifest

The two kinds of Avro files of one commit share its uuid.
"""

import logging
import re
from datetime import datetime
from typing import TYPE_CHECKING

from rebeca_ray.storage.filesystem import delete_files, list_files, open_filesystem

if TYPE_CHECKING:
    from pyiceberg.table import Table

log = logging.getLogger(__name__)

UUID = r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"
VERSION = re.compile(rf"(\d{{5}})-{UUID}\.metadata\.json")
AVRO = re.compile(rf"(?:snap-\d+-\d+-{UUID}|{UUID}-m\d+)\.avro")


def remove_orphans(table: "Table", older_than: datetime) -> None:
    """Remove the files of a table's metadata that no version names and that were written before a time.

    Versions that are too old for the table's log stay, and so do files with other names.
    """
    files = {name_of(uri): uri for uri in list_files(f"{table.location()}/metadata")}
    versions = {name_of(table.metadata_location)}
    versions |= {name_of(entry.metadata_file) for entry in table.metadata.metadata_log}
    first = min(versions)
    commits = {AVRO.fullmatch(name_of(snapshot.manifest_list)) for snapshot in table.metadata.snapshots}
    committed = {match[1] for match in commits if match}
    orphans = [name for name in files if VERSION.fullmatch(name) and name[:5] >= first[:5]]
    orphans = [name for name in orphans if name not in versions]
    avro = [name for name in files if (match := AVRO.fullmatch(name)) and not {*match.groups()} & committed]
    if avro:  # a snapshot that somebody expired may have left manifests that others use
        try:
            used = manifests_of(table)
        except OSError as error:  # one of another snapshot is gone: nobody knows which ones it used
            log.warning("%s: its manifests cannot be read, so none is removed (%s)", table.location(), error)
        else:
            orphans += [name for name in avro if name not in used]
    delete_files([files[name] for name in orphans if written_before(files[name], older_than)])


def name_of(uri: str) -> str:
    return uri.rpartition("/")[2]


def manifests_of(table: "Table") -> set[str]:
    """Return the names of all Avro files that the snapshots of a table need."""
    names = set()
    for snapshot in table.metadata.snapshots:
        names.add(name_of(snapshot.manifest_list))
        names |= {name_of(manifest.manifest_path) for manifest in snapshot.manifests(table.io)}
    return names


def written_before(uri: str, time: datetime) -> bool:
    """Return whether a file is there and was written before a time."""
    filesystem, path = open_filesystem(uri)
    try:
        return bool(filesystem.modified(path) < time)
    except FileNotFoundError:  # another export removed it
        return False
