"""Commands of the first hour: `rebeca doctor`."""

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
