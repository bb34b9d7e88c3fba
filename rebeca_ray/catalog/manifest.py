"""The manifest of a snapshot: its counts, figures, versions, cost, and the list of its files.

The manifest is the public contract of a snapshot, and it only grows. Version 3 had other names for some keys:
`read_manifest` translates them, so the rest of the package knows the current names alone.
"""

import re
from datetime import datetime
from typing import Annotated, NotRequired

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator
from typing_extensions import TypedDict

from rebeca_ray import schemas
from rebeca_ray.catalog.figures import GateFigures
from rebeca_ray.catalog.layout import InnerPath, snapshot_folder
from rebeca_ray.errors import InputError, LeaseHeldError
from rebeca_ray.storage.filesystem import join, storage_errors
from rebeca_ray.storage.objects import JsonObject, encode_json, read_json
from rebeca_ray.storage.store import open_store

REPAIR = (
    "restore it, or publish another snapshot with `rebeca catalog publish` and remove {path}/manifest.json"
)


RunId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]  # a part of paths


class FileRow(TypedDict):
    """One row of `schemas.FILES`."""

    table: str
    bucket: int
    file: int
    path: str
    rows: int
    bytes: int
    sha256: str
    min_user_id: NotRequired[str | None]
    max_user_id: NotRequired[str | None]
    live_rows: NotRequired[int | None]


class Record(BaseModel):
    """Base of everything that a manifest holds. A later version may add keys: readers ignore them."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Counts(Record):
    """Requested items by outcome. `requested` is the sum of the six outcomes."""

    requested: int
    new: int
    carried: int
    population: int
    failed: int
    filtered: int
    deferred: int
    users: int  # with at least one item
    stale_users: int  # time ran out: they keep the items of an earlier night

    @property
    def published(self) -> int:
        """Items that a reader sees; those of the population pool count once per user."""
        return self.new + self.carried + self.population


class DecisionCounts(Record):
    """Users to plan, their items, and the shards that render them."""

    planned_users: int
    planned_items: int
    shards: int
    shared_items: int = 0  # of the planned ones: they show the image of another user's item


class PermutationFigures(Record):
    """The permutation test of the plan; see `evaluation.permutation`. Earlier manifests have the aliases."""

    matched: float = Field(validation_alias=AliasChoices("matched", "own"))
    shuffled: float = Field(validation_alias=AliasChoices("shuffled", "dealt"))
    effect: float
    p_value: float
    users: int
    z: float
    z_at_210_users: float


class Quality(Record):
    """Tests of the plan before rendering. None: there was no selector, or there were too few users."""

    permutation: PermutationFigures | None = None


class GateOutcome(Record):
    """Reasons against publishing, and whether the snapshot was published in spite of them."""

    refused: list[str] = []
    forced: bool = False


class StageFigures(Record):
    """One stage of a run. A stage with actors also has their number, rows and busy seconds."""

    seconds: float
    rows: int | None = None
    busy_seconds: float | None = None
    actors: int | None = None


class Measured(Record):
    """The stages of a run by name. The next forecast is made from them."""

    stages: dict[str, StageFigures]


class Cost(Record):
    """A forecast of a run, or its actual cost.

    Seconds are wall-clock. `cost` is in the currency of `prices`.
    """

    requested_items: int
    planned_users: int
    images: int
    plan_seconds: float
    render_seconds: float
    other_seconds: float  # decide, test, assemble
    hours: float
    gpu_hours: float
    cpu_hours: float
    bytes_written: int
    requests: int  # writes to the object store
    cost: float


class FileList(Record):
    """The Parquet file that lists all files of a snapshot, below the catalog's root."""

    path: InnerPath
    rows: int
    bytes: int
    sha256: str

    @property
    def fencing_token(self) -> int:
        """The token of its writer; 0 for a list of another name."""
        name = re.search(r"/files-(\d+)\.parquet$", self.path)
        return int(name[1]) if name else 0


class Manifest(Record):
    """One snapshot, of one catalog. `previous_path` is the folder of the snapshot that it follows."""

    schema_version: int
    catalog_id: str | None = None
    run_id: RunId
    run_date: RunId
    fencing_token: int
    created_at: str
    previous_run_id: str | None
    previous_path: InnerPath | None
    inputs: str | None = None  # digest of everything that the run was made from
    counts: Counts
    decisions: DecisionCounts
    carried_buckets: int
    figures: GateFigures
    versions: dict[str, str]
    decoder_weights: dict[str, str]
    safety_checker: str | None = None  # null in manifests from before the bundled checker
    embed_dim: int = Field(gt=0)
    clip_fingerprint: str | None = None
    user_key_fingerprint: str | None = None  # null: user ids as they were given
    num_buckets: int = Field(gt=0)
    next_file: int
    bytes: int
    bytes_written: int
    files: FileList
    quality: Quality = Quality()
    gate: GateOutcome = GateOutcome()
    measured: Measured
    forecast: Cost | None = None
    actual: Cost | None = None

    @field_validator("created_at")
    @classmethod
    def check_time(cls, value: str) -> str:
        if datetime.fromisoformat(value).tzinfo is None:
            raise ValueError("has no time zone")
        return value

    @property
    def path(self) -> str:
        """The snapshot's folder, below the root."""
        return snapshot_folder(self.run_date, self.run_id)


def read_manifest(root: str, path: str) -> Manifest:
    """Return the manifest of the snapshot in a folder below the root.

    Raises InputError if it is gone, damaged, of a newer version than this one reads, or older than
    version 3.
    """
    values = read_json(join(root, path, "manifest.json"))
    if values is None:
        raise InputError(
            f"catalog {root}: snapshot {path} has no manifest.json; it was removed or never finished: "
            "publish another with `rebeca catalog publish`"
        )
    version = values.get("schema_version")
    if not isinstance(version, int):
        raise InputError(
            f"catalog {root}: {path}/manifest.json tells no schema_version: this is no catalog "
            "(an export of one?); give its root"
        )
    if version < schemas.OLDEST_SCHEMA_VERSION:
        raise InputError(
            f"catalog {root}: schema version {version}, older than this version reads: "
            f"{schemas.OLDEST_SCHEMA_VERSION} to {schemas.SCHEMA_VERSION}; generate into another root"
        )
    if version > schemas.SCHEMA_VERSION:
        raise InputError(
            f"catalog {root}: schema version {version}, this version reads {schemas.SCHEMA_VERSION}; "
            "upgrade rebeca-ray"
        )
    try:
        return Manifest.model_validate(values if version > 3 else renamed_from_version_3(values))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"catalog {root}: the manifest of snapshot {path}: {name}: {first['msg']}; "
            f"{REPAIR.format(path=path)}"
        ) from None


def renamed_from_version_3(values: JsonObject) -> JsonObject:
    """Return a version 3 manifest under the key names of version 4."""
    top = {
        "epoch": "fencing_token",
        "previous": "previous_run_id",
        "clip": "clip_fingerprint",
        "foreseen": "forecast",
        "spent": "actual",
    }
    renamed = {top.get(name, name): value for name, value in values.items()}
    for section, old, new in (("counts", "late_users", "stale_users"), ("decisions", "units", "shards")):
        inner = renamed.get(section)
        if isinstance(inner, dict):
            renamed[section] = {new if name == old else name: value for name, value in inner.items()}
    return renamed


def write_manifest(manifest: Manifest, root: str, version: str | None) -> None:
    """Write the manifest of a snapshot in place of the one of `version`.

    Raises LeaseHeldError if another attempt at the same run wrote one since that version was read.
    """
    uri = join(root, manifest.path, "manifest.json")
    data = encode_json(manifest.model_dump())
    with storage_errors(uri):
        store = open_store(uri)
        if store.compare_and_swap(data, version):
            return
        written = store.read_versioned()  # the answer to a stored write may be lost
    if written is None or written[0] != data:
        raise LeaseHeldError(
            f"catalog {root}: run {manifest.run_id} was finished by another attempt; "
            "this one publishes nothing"
        )


def manifest_version(uri: str) -> str | None:
    """Return the version of a stored manifest, None if there is none.

    An attempt reads it before it checks its lease: if it falls asleep after the check, it cannot replace the
    manifest of its heir.
    """
    with storage_errors(uri):
        stored = open_store(uri).read_versioned()
    return stored[1] if stored else None
