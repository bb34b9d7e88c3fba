"""Commands of the first hour: `rebeca doctor`, `rebeca init`."""

from typing import Annotated

import typer

from rebeca_ray.cli.runner import plain_errors, print_result


def doctor(
    catalog: Annotated[
        str | None,
        typer.Option(help="Folder of a catalog to come, such as s3://bucket/catalog: checks its store too."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with stable keys.")] = False,
) -> None:
    """Check this machine, and say what to do about each missing part. Exit code 2 if no job can run."""
    from dataclasses import asdict

    from rebeca_ray.cli.output import findings
    from rebeca_ray.config.fields import absolute
    from rebeca_ray.doctor import examine
    from rebeca_ray.errors import InputError

    with plain_errors():
        examined = examine(absolute(catalog) if catalog else None)
        shown = [asdict(finding) for finding in examined] if as_json else findings(examined)
        print_result(shown, as_json=as_json)
        if broken := [finding.part for finding in examined if finding.state == "broken"]:
            raise InputError(f"doctor: broken: {', '.join(broken)}, see above; no job runs before")


def init(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="New folder for configs and tables.")],
    interactions: Annotated[
        str, typer.Option(help="Ratings: Parquet, CSV or JSON lines, a file or a folder of files.")
    ],
    items: Annotated[
        str, typer.Option(help="Images: Parquet with item_id and image, or a folder of image files.")
    ],
    columns: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[COLUMN=NAME]...",
            help="Names in the file of the columns user_id, item_id, rating, timestamp and event, such as "
            "user_id=rater. By default, they are guessed. `rating=` is for no ratings.",
        ),
    ] = None,
    like_threshold: Annotated[
        float | None, typer.Option(help="Least rating that is a like. By default, the ratings decide.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with stable keys.")] = False,
) -> None:
    """Look at your data, and write configs and tables for `rebeca embed`, `train` and `generate`."""
    from rebeca_ray.cli.first_look_table import first_look
    from rebeca_ray.config.fields import absolute
    from rebeca_ray.data.first_look.columns import OPTIONAL
    from rebeca_ray.data.first_look.look import facts, look
    from rebeca_ray.data.published.csv_ratings import column_names
    from rebeca_ray.first_configs import check_folder, next_commands, this_machine, write_folder

    with plain_errors():
        target, ratings, images = absolute(folder), absolute(interactions), absolute(items)
        check_folder(target, ratings, images)
        view = look(ratings, images, column_names(columns or [], OPTIONAL), like_threshold)
        files = write_folder(view, target, this_machine())
        result = facts(view) | {"folder": target, "files": files, "commands": next_commands(folder)}
        print_result(result if as_json else first_look(result), as_json=as_json)
