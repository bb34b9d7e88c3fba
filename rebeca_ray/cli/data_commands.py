"""`rebeca data`: read published data sets in their original layouts, and write interactions and items."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rebeca_ray.cli import output
from rebeca_ray.cli.runner import plain_errors, print_result

if TYPE_CHECKING:
    from rebeca_ray.data.published.dataset import PublishedData

app = typer.Typer(no_args_is_help=True, help="Import published data sets, folders of likes, and CSV files.")

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="Folder of the data set, unpacked in its original layout.")
]
Out = Annotated[
    str, typer.Option(help="New folder for interactions.parquet, items, and a file per published split.")
]
AllowMissing = Annotated[
    bool, typer.Option("--allow-missing", help="Leave out ratings whose image is missing.")
]
Repeated = Annotated[
    Literal["refuse", "last"],
    typer.Option(
        help="Treatment of several ratings of one image by one user. refuse: fail. last: keep the last."
    ),
]


@app.command(name="flickr-aes")
def flickr_aes(
    source: Source, out: Out, allow_missing: AllowMissing = False, repeated: Repeated = "refuse"
) -> None:
    """Import FLICKR-AES: photos rated from 1 to 5 by workers."""
    from rebeca_ray.data.published.flickr_aes import read_flickr_aes

    write(lambda: read_flickr_aes(source, keep_last=repeated == "last"), out, allow_missing)


@app.command()
def pamela(
    source: Source, out: Out, allow_missing: AllowMissing = False, repeated: Repeated = "refuse"
) -> None:
    """Import PAMELA: generated images rated from 1 to 5, with validation and test."""
    from rebeca_ray.data.published.pamela import read_pamela

    write(lambda: read_pamela(source, keep_last=repeated == "last"), out, allow_missing)


@app.command()
def lapis(
    source: Source, out: Out, allow_missing: AllowMissing = False, repeated: Repeated = "refuse"
) -> None:
    """Import LAPIS: artworks rated from 0 to 100, with validation and test."""
    from rebeca_ray.data.published.lapis import read_lapis

    write(lambda: read_lapis(source, keep_last=repeated == "last"), out, allow_missing)


@app.command(name="pick-a-pic")
def pick_a_pic(source: Source, out: Out, allow_missing: AllowMissing = False) -> None:
    """Import Pick-a-Pic: a like and a dislike per pair of generated images, with validation and test."""
    from rebeca_ray.data.published.pick_a_pic import read_pick_a_pic

    write(lambda: read_pick_a_pic(source), out, allow_missing)


@app.command()
def folder(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Folder of <user>/likes/<image> and <user>/dislikes/<image>."),
    ],
    out: Out,
) -> None:
    """Import likes and dislikes from a folder per user."""
    from rebeca_ray.data.published.user_folders import read_user_folders

    write(lambda: read_user_folders(source), out, allow_missing=False)


@app.command(name="csv")
def csv_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="CSV file of ratings, with a header line.")],
    images: Annotated[
        str, typer.Option(help="Folder of the images, named as the items, with or without a suffix.")
    ],
    out: Out,
    columns: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[COLUMN=NAME]...",
            help="Names in the file of the columns user_id, item_id, rating and timestamp, such as "
            "user_id=rater.",
        ),
    ] = None,
    allow_missing: AllowMissing = False,
    repeated: Repeated = "refuse",
) -> None:
    """Import ratings from a CSV file, and their images from a folder."""
    from rebeca_ray.data.published.csv_ratings import column_names, read_csv_ratings

    def read() -> PublishedData:
        return read_csv_ratings(source, images, column_names(columns or []), keep_last=repeated == "last")

    write(read, out, allow_missing)


def write(read: Callable[[], PublishedData], out: str, allow_missing: bool) -> None:
    """Read a data set, write it, and print the counts and the next commands."""
    from rebeca_ray.data.published.write import check_out, write_published

    with plain_errors():
        check_out(out)  # before hours of reading
        print_result(output.imported(write_published(read(), out, allow_missing=allow_missing), out))
