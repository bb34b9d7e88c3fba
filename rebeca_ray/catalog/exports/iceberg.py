"""The published snapshot as Iceberg tables: its own files, registered where they lie. Nothing is copied.

Each table (`items`, `images`, `users`, `errors`, `changes`) moves to a snapshot in one commit, which drops the files that are no longer
listed and adds the new ones. A commit says of which run it is, so that doing it again does nothing.
"""

import logging
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rebeca_ray.catalog.layout import outside
from rebeca_ray.catalog.read import TABLES, Snapshot
from rebeca_ray.config.fields import absolute
from rebeca_ray.errors import Failure, InputError, UserError, describe
from rebeca_ray.storage.store import classify, iceberg_properties

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.table import Table


RUN = "rebeca.run_id"  # a property of the tables
PROPERTIES = {
    "gc.enabled": "false"
}  # the files are the catalog's: `rebeca catalog gc` removes them, Iceberg's own clean-up must not


def register_snapshot(
    snapshot: Snapshot, catalog: str, warehouse: str, namespace: str = "rebeca"
) -> dict[str, tuple[int, int]]:
    """Bring the tables of a namespace to the snapshot; returns how many files each gained and lost.

    `catalog` is the database of an Iceberg SQL catalog (`sqlite:////path/catalog.db`), `warehouse` the folder for the tables' metadata.
    Raises UserError where pyiceberg is not installed, or another commit came between.
    """
    outside(snapshot.root, warehouse, "warehouse")
    if not all(namespace.split(".")):
        raise InputError(f"namespace {namespace!r}: has an empty part; give one such as rebeca")
    try:
        found = open_iceberg(catalog, warehouse)
    except ImportError as error:
        raise InputError(
            f"iceberg {catalog}: {error.name} is not installed; pip install 'rebeca-ray[iceberg]' (and the driver)"
        ) from None
    from pyiceberg.exceptions import CommitFailedException
    from sqlalchemy.exc import SQLAlchemyError

    done = {}
    try:
        found.create_namespace_if_not_exists(namespace)
        for name in TABLES:
            own = f"{namespace}.{name}"
            if not found.table_exists(own):  # or it would write metadata that nobody needs
                found.create_table_if_not_exists(
                    own, snapshot.schema(name).remove_metadata(), properties=PROPERTIES
                )
            table = found.load_table(own)
            try:
                done[name] = bring_to(table, snapshot, name)
            except (pa.ArrowException, OSError) as error:
                if classify(error) is Failure.DAMAGED or any(
                    path in str(error) for path in snapshot.paths(name)
                ):  # and not of the warehouse
                    with snapshot.explained():
                        raise
                raise
    except CommitFailedException as error:
        raise InputError(
            f"iceberg {catalog}: {namespace} was changed by another writer ({error}); run it again"
        ) from None
    except (SQLAlchemyError, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise refused(catalog, error) from None
    return done


def open_iceberg(catalog: str, warehouse: str) -> "Catalog":
    """An SQL catalog. Raises UserError if its database cannot be opened, ImportError for a driver that is not there."""
    from pyiceberg.catalog.sql import SqlCatalog
    from sqlalchemy.exc import SQLAlchemyError

    logging.getLogger("pyiceberg.io.pyarrow").setLevel(
        logging.ERROR
    )  # embeddings have no statistics, on purpose
    warehouse = warehouse if "://" in warehouse else f"file://{absolute(warehouse)}"
    try:
        return SqlCatalog("rebeca", uri=catalog, warehouse=warehouse, **iceberg_properties())
    except SQLAlchemyError as error:
        raise refused(catalog, error) from None


def refused(catalog: str, error: Exception) -> UserError:
    return InputError(
        f"iceberg {catalog}: cannot be used ({describe(error)}); give a database as sqlite:////absolute/path.db, and a warehouse as "
        "file:///absolute/path or s3://bucket/prefix"
    )


def bring_to(table: "Table", snapshot: Snapshot, name: str) -> tuple[int, int]:
    """One commit; how many files it added and dropped."""
    if table.properties.get(RUN) == snapshot.run_id:
        return 0, 0
    listed = dict.fromkeys(snapshot.uris(name))
    there: dict[str, Any] = {task.file.file_path: task.file for task in table.scan().plan_files()}
    gone = [file for path, file in there.items() if path not in listed]
    new = [path for path in listed if path not in there]
    with table.transaction() as transaction:
        with transaction.update_schema() as schema:  # of a later version
            schema.union_by_name(snapshot.schema(name).remove_metadata())
        if gone:
            with transaction.update_snapshot().overwrite() as overwrite:
                for file in gone:
                    overwrite.delete_data_file(file)
        if new:
            transaction.add_files(new)
        transaction.set_properties({RUN: snapshot.run_id})
    return len(new), len(gone)
