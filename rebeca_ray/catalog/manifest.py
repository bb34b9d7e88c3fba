"""What a snapshot says of itself: its manifest, and the list of its files, checked."""

import hashlib
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from rebeca_ray import schemas
from rebeca_ray.errors import Failure, InputError, StorageError, describe
from rebeca_ray.storage.filesystem import join, open_filesystem
from rebeca_ray.storage.objects import read_json
from rebeca_ray.storage.store import classify, failure_types

REPAIR = (
    "restore it, or publish another snapshot with `rebeca catalog publish` and remove {path}/manifest.json"
)


class Manifest(TypedDict):
    """What readers need of one; it holds more."""

    run_id: str
    embed_dim: Annotated[int, Field(gt=0)]
    num_buckets: Annotated[int, Field(gt=0)]
    previous_path: str | None


MANIFEST = TypeAdapter(Manifest)


def read_manifest(root: str, path: str) -> dict[str, Any]:
    """The manifest of the snapshot in a folder below the root.

    Raises UserError if it is gone, damaged, of a newer version than this one reads, or of one before the format was settled.
    """
    manifest = read_json(join(root, path, "manifest.json"))
    if manifest is None:
        raise InputError(
            f"catalog {root}: snapshot {path} has no manifest.json; it was removed or never finished: publish another with "
            "`rebeca catalog publish`"
        )
    version = manifest.get("schema_version")
    if not isinstance(version, int):
        raise InputError(
            f"catalog {root}: {path}/manifest.json tells no schema_version: this is no catalog (an export of one?); give its root"
        )
    if version < schemas.OLDEST_SCHEMA_VERSION:
        raise InputError(
            f"catalog {root}: schema version {version}, of before the format was settled; this version reads "
            f"{schemas.OLDEST_SCHEMA_VERSION} to {schemas.SCHEMA_VERSION}: generate into another root"
        )
    if version > schemas.SCHEMA_VERSION:
        raise InputError(
            f"catalog {root}: schema version {version}, this version reads {schemas.SCHEMA_VERSION}; upgrade rebeca-ray"
        )
    try:
        MANIFEST.validate_python(manifest, strict=True)
    except ValidationError as error:
        name, why = error.errors()[0]["loc"][0], error.errors()[0]["msg"]
        raise InputError(
            f"catalog {root}: the manifest of snapshot {path}: {name}: {why}; {REPAIR.format(path=path)}"
        ) from None
    return manifest


def read_file_list(root: str, path: str, manifest: dict[str, Any]) -> pa.Table:
    """The file list that a manifest names, compared with the checksum it tells."""
    try:
        listing = manifest["files"]
        filesystem, base = open_filesystem(root)
        data = filesystem.cat_file(join(base, listing["path"]))
        if hashlib.sha256(data).hexdigest() == listing["sha256"]:
            return pq.ParquetFile(pa.BufferReader(data)).read(
                use_threads=False
            )  # a command of a moment may end before threads do
        why = "its sha256 is not the manifest's"
    except (KeyError, TypeError):
        why = "manifest.json does not name it"
    except (pa.ArrowException, *failure_types()) as error:
        why = describe(error)
        if classify(error) not in (Failure.DAMAGED, Failure.MISSING):
            raise StorageError(
                f"catalog {root}: {listing['path']} cannot be read ({why}); check the network and the credentials"
            ) from None
    raise InputError(
        f"catalog {root}: the file list of snapshot {path} is missing or damaged ({why}); {REPAIR.format(path=path)}"
    )
