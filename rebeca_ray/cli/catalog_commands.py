"""`rebeca catalog`: look at published snapshots, verify, publish, collect, export them, erase people."""

from typing import Annotated, Literal

import typer

from rebeca_ray.cli import output
from rebeca_ray.cli.runner import RESUMES, plain_errors, print_result

app = typer.Typer(no_args_is_help=True, help="List, verify, publish, clean up and export snapshots.")
exports = typer.Typer(no_args_is_help=True, help="Export the published snapshot for systems without Parquet.")
app.add_typer(exports, name="export")

Catalog = Annotated[
    str,
    typer.Argument(
        metavar="CATALOG", help="The catalog's folder: a local path or an address such as s3://bucket/prefix."
    ),
]
RunId = Annotated[
    str | None, typer.Option("--run-id", help="Run of the snapshot. Default: the published one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, with plain numbers and stable keys.")]


@app.command(name="list")
def list_(catalog: Catalog, as_json: AsJson = False) -> None:
    """List all complete snapshots, oldest first."""
    from rebeca_ray.catalog.pointer import read_pointer
    from rebeca_ray.catalog.snapshots import list_snapshots
    from rebeca_ray.errors import InputError

    with plain_errors():
        pointer, version = read_pointer(catalog)
        snapshots = list_snapshots(catalog)
        if version is None and not snapshots:
            raise InputError(
                f"catalog {catalog}: no catalog there (no latest.json); give the folder of a catalog"
            )
        form = output.snapshot_list_json if as_json else output.snapshot_list
        print_result(form(pointer, snapshots), as_json=as_json)


@app.command()
def show(catalog: Catalog, run_id: RunId = None, as_json: AsJson = False) -> None:
    """Show the manifest of a snapshot: contents, quality, versions. With --json, print all of it."""
    from rebeca_ray.catalog.read import read_catalog
    from rebeca_ray.catalog.snapshots import find_snapshot

    with plain_errors():
        manifest = find_snapshot(catalog, run_id) if run_id else read_catalog(catalog).manifest
        form = output.manifest_json if as_json else output.manifest_table
        print_result(form(manifest), as_json=as_json)


@app.command()
def verify(
    catalog: Catalog,
    run_id: RunId = None,
    level: Annotated[
        Literal["metadata", "sample", "full"],
        typer.Option(
            help="How thorough. metadata: counts and file sizes. "
            "sample: also some files, rows and images. full: all of them."
        ),
    ] = "sample",
    provenance: Annotated[
        bool,
        typer.Option(
            "--provenance",
            help="Also check the marks that say that a machine made the images, of a sample of them; "
            "with --level full, of all.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare a snapshot with its manifest. Prints a line per difference; the exit code is then 4."""
    from rebeca_ray.catalog.provenance import check_provenance
    from rebeca_ray.catalog.read import open_snapshot, read_catalog
    from rebeca_ray.catalog.snapshots import find_snapshot
    from rebeca_ray.catalog.verify import verify as find_damage
    from rebeca_ray.errors import QualityGateError

    with plain_errors("nothing was changed: run the same command again"):
        snapshot = (
            open_snapshot(catalog, find_snapshot(catalog, run_id).path) if run_id else read_catalog(catalog)
        )
        damage = find_damage(snapshot, level)
        marks = check_provenance(snapshot, level) if provenance and not damage else None
        damage += marks.defects if marks else []
        form = output.verified_json if as_json else output.verified
        print_result(form(snapshot, level, damage, marks), as_json=as_json)
        if damage:
            raise QualityGateError(
                f"catalog {catalog}: run {snapshot.run_id} is damaged ({len(damage)} differences, above); "
                "`rebeca catalog rollback` it, or restore the files"
            )


@app.command()
def publish(
    catalog: Catalog,
    run_id: Annotated[str, typer.Option("--run-id", help="Run to publish; `rebeca catalog list` shows all.")],
) -> None:
    """Publish a complete snapshot, even one that the quality gate refused; latest.json records it."""
    from rebeca_ray.catalog.snapshots import publish_snapshot

    with plain_errors("`rebeca catalog list` shows the published run"):
        manifest = publish_snapshot(catalog, run_id)
        print_result(f"published run {run_id} of {manifest.run_date} in {catalog}")


@app.command()
def rollback(catalog: Catalog) -> None:
    """Publish the snapshot that the current one was made from."""
    from rebeca_ray.catalog.snapshots import roll_back

    with plain_errors("`rebeca catalog list` shows the published run"):
        manifest = roll_back(catalog)
        print_result(f"published run {manifest.run_id} of {manifest.run_date} in {catalog} again")


@app.command()
def gc(
    catalog: Catalog,
    keep: Annotated[int, typer.Option(min=1, help="Number of latest snapshots to keep.")] = 7,
    grace_hours: Annotated[
        float,
        typer.Option(
            min=0,
            help="Hours to keep a snapshot after its successor was published, "
            "and an unfinished run after its start.",
        ),
    ] = 48,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files to remove, and remove nothing.")
    ] = False,
) -> None:
    """Remove files that no kept snapshot and no unfinished run needs."""
    from rebeca_ray.catalog.gc import collect

    with plain_errors(RESUMES):
        garbage = collect(catalog, keep=keep, grace_hours=grace_hours, dry_run=dry_run)
        print_result(output.collected(garbage, dry_run=dry_run))


@app.command()
def forget(
    catalog: Catalog,
    user: Annotated[list[str] | None, typer.Option(help="Id of a user to erase; may be repeated.")] = None,
    users: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Parquet or CSV file of the users to erase, in a column user_id. -: one id per line of "
            "standard input.",
        ),
    ] = None,
    places: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="FOLDER",
            help="Folder of `export images`, of `export key-values` or of a prior; may be repeated.",
        ),
    ] = None,
    storage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER", help="Storage of trainings: histories and checkpoints; may be repeated."
        ),
    ] = None,
    iceberg: Annotated[
        tuple[str, str, str] | None,
        typer.Option(
            metavar="DATABASE WAREHOUSE NAMESPACE", help="Iceberg tables, as `export iceberg` wrote them."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files to rewrite or to remove, and change nothing.")
    ] = False,
) -> None:
    """Erase users from all snapshots, and from the given places; keep them away from later runs. Prints JSON.

    Needs the secret key of the tombstones in REBECA_ERASURE_KEY, and for a catalog with pseudonyms theirs in
    REBECA_USER_KEY. Unfinished runs are given up.
    """
    from rebeca_ray.forget import Iceberg, Places, read_users
    from rebeca_ray.forget import forget as erase

    with plain_errors(RESUMES):
        tables = Iceberg(*iceberg) if iceberg else None
        given = Places(folders=places or [], storages=storage or [], iceberg=tables)
        names = [*(user or []), *(read_users(users) if users is not None else [])]
        print_result(erase(catalog, names, given, dry_run=dry_run).values(), as_json=True)


@app.command()
def pseudonyms(
    catalog: Catalog,
    users: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Parquet or CSV file of users, in a column user_id. -: one id per line of standard input.",
        ),
    ] = "-",
) -> None:
    """Print the pseudonyms of users, one per line, in their order. Needs the key in REBECA_USER_KEY."""
    from rebeca_ray.catalog.snapshots import user_key_of
    from rebeca_ray.errors import InputError
    from rebeca_ray.forget import read_users

    with plain_errors():
        key = user_key_of(catalog)
        if key is None:
            raise InputError(f"catalog {catalog}: has user ids as they are, no pseudonyms; read it by them")
        print_result("\n".join(key.pseudonyms(read_users(users))))


@app.command()
def groups(
    catalog: Catalog,
    groups: Annotated[
        str, typer.Argument(metavar="GROUPS", help="Parquet or CSV file with the columns user_id and group.")
    ],
    run_id: RunId = None,
    min_users: Annotated[
        int, typer.Option(min=2, help="Fewest users of a group. Smaller groups are merged.")
    ] = 20,
    as_json: AsJson = False,
) -> None:
    """Compare groups of users: liking, diversity, failures, unsafe items, cold starts."""
    from rebeca_ray.catalog.read import open_snapshot, read_catalog
    from rebeca_ray.catalog.snapshots import find_snapshot
    from rebeca_ray.cli.groups_table import groups_json, groups_table
    from rebeca_ray.evaluation.groups import compare_groups

    with plain_errors("nothing was changed: run the same command again"):
        snapshot = (
            open_snapshot(catalog, find_snapshot(catalog, run_id).path) if run_id else read_catalog(catalog)
        )
        report = compare_groups(snapshot, groups, min_users)
        print_result(groups_json(report) if as_json else groups_table(report), as_json=as_json)


@exports.command(name="images")
def images_command(
    catalog: Catalog,
    out: Annotated[
        str,
        typer.Argument(
            help="Folder for the images and the tables of URLs: a local path or s3://bucket/prefix."
        ),
    ],
    url_base: Annotated[
        str,
        typer.Option(help="URL of OUT for browsers, on a CDN. An image's URL is this, a slash, and its key."),
    ],
) -> None:
    """Export images as objects with stable keys, and a table of each user's URLs.

    Objects that an earlier export wrote are not written again.
    """
    from rebeca_ray.catalog.exports.image_objects import export_images
    from rebeca_ray.catalog.read import read_catalog

    with plain_errors():
        snapshot = read_catalog(catalog)
        print_result(output.exported_images(snapshot, export_images(snapshot, out, url_base), out))


@exports.command(name="key-values")
def key_values_command(
    catalog: Catalog,
    out: Annotated[
        str, typer.Argument(help="Folder for the part files: a local path or s3://bucket/prefix.")
    ],
    format: Annotated[
        Literal["jsonl", "redis"],
        typer.Option(help="jsonl: JSON lines. redis: commands for `redis-cli --pipe`."),
    ] = "jsonl",
    key_prefix: Annotated[
        str, typer.Option(help="Beginning of each key in Redis; the user_id follows.")
    ] = "rebeca:",
    since: Annotated[
        str | None,
        typer.Option(
            metavar="RUN_ID", help="Export only users whose items changed since this run's snapshot."
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Folder of `export images`; its URLs are added to the values."),
    ] = None,
) -> None:
    """Export one value per user, with all items, for the bulk load of a serving store."""
    from rebeca_ray.catalog.exports.key_values import export_key_values
    from rebeca_ray.catalog.read import read_catalog

    with plain_errors():
        exported = export_key_values(
            read_catalog(catalog), out, format, key_prefix=key_prefix, since=since, images=images
        )
        print_result(output.exported_key_values(exported))


@exports.command(name="atlas")
def atlas_command(
    catalog: Catalog,
    out: Annotated[str, typer.Argument(help="Parquet file to write. It may not exist yet.")],
    max_items: Annotated[
        int, typer.Option(min=2, help="Most items on the map; more are sampled evenly. 20,000 take minutes.")
    ] = 20_000,
) -> None:
    """Export a map of the items for Apple's embedding-atlas: thumbnails, positions, neighbours."""
    from rebeca_ray.catalog.exports.atlas import export_atlas
    from rebeca_ray.catalog.read import read_catalog
    from rebeca_ray.config.fields import absolute
    from rebeca_ray.storage.writable import require_new_parquet

    with plain_errors():
        require_new_parquet(absolute(out))
        print_result(
            output.exported_atlas(export_atlas(read_catalog(catalog), absolute(out), max_items), out)
        )


@exports.command(name="iceberg")
def iceberg_command(
    catalog: Catalog,
    database: Annotated[
        str,
        typer.Option(
            "--catalog", help="Database URL of an Iceberg SQL catalog, such as sqlite:////data/iceberg.db."
        ),
    ],
    warehouse: Annotated[str, typer.Option(help="Folder for the metadata of the Iceberg tables.")],
    namespace: Annotated[
        str, typer.Option(help="Iceberg namespace of the tables items, images, users, errors, changes.")
    ] = "rebeca",
) -> None:
    """Register the snapshot's files as Iceberg tables, without copying them."""
    from rebeca_ray.catalog.exports.iceberg import register_snapshot
    from rebeca_ray.catalog.read import read_catalog

    with plain_errors():
        snapshot = read_catalog(catalog)
        changes = register_snapshot(snapshot, database, warehouse, namespace)
        print_result(output.registered(snapshot, namespace, changes))
