"""`rebeca gallery`: look at a catalog in a browser."""

import signal
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from rebeca_ray.cli.catalog_commands import Catalog
from rebeca_ray.cli.runner import plain_errors, print_result, read_config


def gallery(
    catalog: Catalog,
    other: Annotated[str | None, typer.Option(help="Another catalog, to compare with side by side.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Config of `rebeca generate`: its interactions show the liked items of each user, and its "
            "models draw while a person steers."
        ),
    ] = None,
    items: Annotated[
        str | None,
        typer.Option(help="Real items with their images, as `rebeca embed` reads them, to show liked items."),
    ] = None,
    feedback: Annotated[
        str | None,
        typer.Option(
            help="Parquet file that receives the votes that a person saves, such as a file of the "
            "interactions. It may be new. Needs --config."
        ),
    ] = None,
    bind: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Address to listen on; port 0: any free one. Beyond this machine, the printed address has "
            "a token.",
        ),
    ] = "127.0.0.1:8400",
    name: Annotated[
        list[str] | None,
        typer.Option(help="Further host name by which browsers reach the gallery. May be repeated."),
    ] = None,
) -> None:
    """Show a catalog in a browser: users, items, snapshots, comparisons. With --config, steer users too."""
    from rebeca_ray.catalog.snapshots import check_user_key
    from rebeca_ray.config.fields import absolute
    from rebeca_ray.config.jobs import GenerateConfig, dated
    from rebeca_ray.errors import InputError
    from rebeca_ray.identity import read_user_key

    with plain_errors():
        settings = read_config(GenerateConfig, config, None) if config else None
        try:
            from rebeca_ray.gallery.app import Gallery
            from rebeca_ray.gallery.serve import listen, parse_bind, serve
        except ImportError as error:
            raise InputError(
                f"gallery: {error.name} is not installed; pip install 'rebeca-ray[gallery]'"
            ) from None
        from rebeca_ray.gallery.people import Histories, RealItems
        from rebeca_ray.gallery.source import Source
        from rebeca_ray.gallery.steering import Steering

        if feedback and not (settings and settings.interactions):
            raise InputError(
                "--feedback: needs a --config with interactions, for the scale of ratings and the columns"
            )
        if feedback and settings and settings.user_key:
            raise InputError(
                "--feedback: the gallery knows pseudonyms alone, and interactions hold user ids; leave it out"
            )
        source = Source(catalog)
        if settings:
            check_user_key(catalog, read_user_key(settings.user_key))
            settings = dated(settings, date.fromisoformat(source.published.manifest.run_date))
        histories = Histories(settings.interactions) if settings and settings.interactions else None
        shown = Gallery(
            source=source,
            other=Source(other) if other else None,
            histories=histories,
            real_items=RealItems(absolute(items)) if items else None,
            config=absolute(str(config)) if config else None,
            steering=Steering(settings, histories, feedback and absolute(feedback)) if settings else None,
        )
        listening = listen(*parse_bind(bind), name or [], writes=bool(feedback))
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            print_result(f"gallery of {shown.source.root}: {listening.url} (Ctrl-C ends it)")
            serve(shown, listening)
        print_result("stopped")
