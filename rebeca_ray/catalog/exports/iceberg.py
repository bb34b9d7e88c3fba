"""The published snapshot as Iceberg tables, with the catalog's files registered in place. Nothing is copied.

One commit per table (`items`, `images`, `users`, `errors`, `changes`) moves it to a snapshot: the commit
drops the files that are no longer listed, and adds the new ones. A commit records its run, so that a repeat
does nothing.
"""

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pyarrow as pa

from rebeca_ray.catalog.exports.iceberg_orphans import remove_orphans
from rebeca_ray.catalog.layout import outside
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.catalog.read_errors import explained
from rebeca_ray.config.fields import absolute
from rebeca_ray.errors import Failure, InputError, ResumableError, StorageError, UserError, describe, redacted
from rebeca_ray.schemas import TABLES, VERSION_3_NAMES
from rebeca_ray.storage.failures import only_warn
from rebeca_ray.storage.leftovers import no_return
from rebeca_ray.storage.store import classify, iceberg_properties

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.manifest import DataFile
    from pyiceberg.table import Table


RUN = "rebeca.run_id"  # a property of the tables
# `rebeca catalog gc` removes the catalog's files, and the clean-up of Iceberg must not.
PROPERTIES = {"gc.enabled": "false"}
SQLITE_FAILURES = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_BUSY")
FAILURES = (Failure.UNREACHABLE, Failure.FAILED, Failure.FULL)  # of a store, and no mistake of a person


def register_snapshot(
    snapshot: Snapshot,
    catalog: str,
    warehouse: str,
    namespace: str = "rebeca",
    *,
    without_history: bool = False,
) -> dict[str, tuple[int, int]]:
    """Bring the tables of a namespace to the snapshot, and return the files that each gained and lost.

    `catalog` is the database of an Iceberg SQL catalog (`sqlite:////path/catalog.db`). `warehouse` is the
    folder for the tables' metadata. With `without_history`, the tables are dropped first, and nothing of
    their history stays. Raises InputError where pyiceberg is not installed, ResumableError where
    another writer commits at the same time.
    """
    outside(snapshot.root, warehouse, "warehouse")
    check_namespace(namespace)
    iceberg = connected(catalog, warehouse)
    from pyiceberg.exceptions import CommitFailedException, ValidationException
    from sqlalchemy.exc import SQLAlchemyError

    done = {}
    try:
        iceberg.create_namespace_if_not_exists(namespace)
        for name in TABLES:
            identifier = f"{namespace}.{name}"
            if without_history and iceberg.table_exists(identifier):
                iceberg.drop_table(identifier)
            # Without the first check, pyiceberg writes metadata for a table that exists.
            if not iceberg.table_exists(identifier):
                iceberg.create_table_if_not_exists(
                    identifier, snapshot.stored_schema(name).remove_metadata(), properties=PROPERTIES
                )
            table = iceberg.load_table(identifier)
            try:
                done[name] = bring_to(table, snapshot, name)
                if without_history:
                    remove_orphans(iceberg.load_table(identifier), datetime.now(UTC))
                    continue
                with only_warn(f"removing orphans of {identifier}"):
                    remove_orphans(table, no_return())
            except (pa.ArrowException, OSError) as error:
                # A damaged file of the catalog, and not one of the warehouse.
                if classify(error) is Failure.DAMAGED or any(
                    path in str(error) for path in snapshot.paths(name)
                ):
                    with explained(snapshot):
                        raise
                raise
    except (CommitFailedException, ValidationException) as error:
        raise ResumableError(
            f"iceberg {catalog}: {namespace} was changed by another writer ({describe(error)}); run it again"
        ) from None
    except (SQLAlchemyError, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise refused(catalog, error) from None
    return done


def check_namespace(namespace: str) -> None:
    """Raise InputError for the name of a namespace with an empty part."""
    if not all(namespace.split(".")):
        raise InputError(f"namespace {namespace!r}: has an empty part; give one such as rebeca")


def require_namespace(catalog: str, warehouse: str, namespace: str) -> None:
    """Raise InputError for a catalog without a namespace, StorageError for one that does not answer."""
    from sqlalchemy.exc import SQLAlchemyError

    check_namespace(namespace)
    try:
        exists = connected(catalog, warehouse).namespace_exists(namespace)
    except SQLAlchemyError as error:
        raise refused(catalog, error) from None
    if not exists:
        raise InputError(
            f"iceberg {redacted(catalog)}: has no namespace {namespace}; "
            "give the one that `rebeca catalog export iceberg` wrote"
        )


def connected(catalog: str, warehouse: str) -> "Catalog":
    """Return an SQL catalog. Raises InputError for an unusable database, or without pyiceberg."""
    try:
        return open_iceberg(catalog, warehouse)
    except ImportError as error:
        raise InputError(
            f"iceberg {catalog}: {error.name} is not installed; "
            "pip install 'rebeca-ray[iceberg]' (and the driver)"
        ) from None


def open_iceberg(catalog: str, warehouse: str) -> "Catalog":
    """Return an SQL catalog. Raises InputError for an unusable database, ImportError for a missing driver."""
    from pyiceberg.catalog.sql import SqlCatalog
    from sqlalchemy.exc import SQLAlchemyError

    # pyiceberg warns of missing statistics. Embeddings have none, on purpose.
    logging.getLogger("pyiceberg.io.pyarrow").setLevel(logging.ERROR)
    warehouse = warehouse if "://" in warehouse else f"file://{absolute(warehouse)}"
    try:
        return SqlCatalog("rebeca", uri=catalog, warehouse=warehouse, **iceberg_properties())
    except SQLAlchemyError as error:
        raise refused(catalog, error) from None


def refused(catalog: str, error: Exception) -> UserError:
    database = str(getattr(getattr(error, "orig", None), "sqlite_errorname", ""))
    failed = classify(error) in FAILURES or database.startswith(SQLITE_FAILURES)
    kind = StorageError if failed else InputError
    return kind(
        f"iceberg {catalog}: cannot be used ({describe(error)}); "
        "give a database as sqlite:////absolute/path.db, "
        "and a warehouse as file:///absolute/path or s3://bucket/prefix"
    )


def bring_to(table: "Table", snapshot: Snapshot, name: str) -> tuple[int, int]:
    """Bring a table to the snapshot in one commit, and return the number of files added and dropped."""
    if table.properties.get(RUN) == snapshot.run_id:
        return 0, 0
    listed = dict.fromkeys(snapshot.uris(name))
    registered: dict[str, DataFile] = {task.file.file_path: task.file for task in table.scan().plan_files()}
    unlisted = [file for path, file in registered.items() if path not in listed]
    new = [path for path in listed if path not in registered]
    columns = snapshot.stored_schema(name).remove_metadata()
    with table.transaction() as transaction:
        # Version 3 has other names for some columns. pyiceberg takes only files with the table's names.
        with transaction.update_schema() as schema:
            for current, stored in zip(snapshot.schema(name).names, columns.names, strict=True):
                for other in {current, VERSION_3_NAMES.get(current, current)} - {stored}:
                    if other in table.schema().column_names:
                        schema.rename_column(other, stored)
        with transaction.update_schema() as schema:  # a later version may have more columns
            schema.union_by_name(columns)
        if unlisted:
            with transaction.update_snapshot().overwrite() as overwrite:
                for file in unlisted:
                    overwrite.delete_data_file(file)
        if new:
            transaction.add_files(new)
        transaction.set_properties({RUN: snapshot.run_id})
    return len(new), len(unlisted)
