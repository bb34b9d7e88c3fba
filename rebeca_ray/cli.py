"""The `rebeca` command. Every command imports its work when it runs, so that `--help` answers at once."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Nightly generated image recommendations (REBECA on Ray).")
stickers = typer.Typer(no_args_is_help=True, help="The bundled world of rated stickers.")
catalog = typer.Typer(no_args_is_help=True, help="Look at published catalogs.")
app.add_typer(stickers, name="stickers")
app.add_typer(catalog, name="catalog")

Config = Annotated[Path, typer.Option("--config", help="YAML file; see jobs/configs")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="changes to the config")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved config and stop")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="where report.html goes")] = Path("demo"),
    data: Annotated[Path, typer.Option(help="where interactions, prior and catalog go; the default configs read them there")] = Path(
        "~/rebeca-stickers"
    ),
    users: Annotated[int, typer.Option(min=100, help="simulated users")] = 2000,
    seed: Annotated[int, typer.Option(help="seed of the simulation")] = 0,
) -> None:
    """The whole flow on the bundled stickers: simulate, embed, train, generate, publish, check, report."""
    from rebeca_ray.job import plain_errors
    from rebeca_ray.stickers.demo import run_demo

    with plain_errors():
        run_demo(out=out, data=data.expanduser(), num_users=users, seed=seed)


@app.command()
def embed(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Items with images -> the same items with CLIP embeddings."""
    from rebeca_ray import job
    from rebeca_ray.config import EmbedConfig

    job.execute(EmbedConfig, job.embed, config, overrides or [], dry_run=dry_run)


@app.command()
def train(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Interactions + embedded items -> a prior directory."""
    from rebeca_ray import job
    from rebeca_ray.config import TrainConfig

    job.execute(TrainConfig, job.train, config, overrides or [], dry_run=dry_run)


@app.command()
def distill(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """A trained prior -> one that needs a few passes an embedding."""
    from rebeca_ray import job
    from rebeca_ray.config import DistillConfig

    job.execute(DistillConfig, job.distill, config, overrides or [], dry_run=dry_run)


@app.command()
def generate(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Prior + decoder + request -> a published snapshot."""
    from rebeca_ray import job
    from rebeca_ray.config import GenerateConfig

    job.execute(GenerateConfig, job.generate, config, overrides or [], dry_run=dry_run)


@app.command()
def export(
    config: Config,
    out: Annotated[Path, typer.Option(help="folder to write, for decoder.engine_dir")],
    overrides: Overrides = None,
) -> None:
    """The decoder of a `rebeca generate` config -> ONNX graphs, checked."""
    from rebeca_ray.config import GenerateConfig, load_config
    from rebeca_ray.export import export_decoder
    from rebeca_ray.job import console, plain_errors

    with plain_errors():
        export_decoder(load_config(GenerateConfig, config, overrides).decoder, out)
        console.print(f"exported decoder -> {out}")


@app.command()
def convert(
    pickle: Annotated[Path, typer.Argument(help="an IP-Adapter or LoRA as .bin")],
    out: Annotated[Path, typer.Argument(help="the .safetensors file to write")],
) -> None:
    """Weights in a pickle -> the same as safetensors; nothing in the pickle is run."""
    from rebeca_ray.decoder_files import convert_pickle
    from rebeca_ray.job import console, plain_errors

    with plain_errors():
        console.print(f"{convert_pickle(pickle, out)} tensors -> {out}")


@app.command()
def serve(
    config: Config,
    overrides: Overrides = None,
    http_port: Annotated[int, typer.Option()] = 8000,
    grpc_port: Annotated[int, typer.Option()] = 8001,
    metrics_port: Annotated[int, typer.Option()] = 8002,
    instances: Annotated[int, typer.Option(min=1, help="copies of the decoder; two let one encode while the other draws")] = 1,
) -> None:
    """The decoder of a `rebeca generate` config behind Triton Inference Server, on 127.0.0.1, until interrupted."""
    from rebeca_ray import job
    from rebeca_ray.config import GenerateConfig, load_config

    with job.plain_errors():
        decoder = load_config(GenerateConfig, config, overrides).decoder
        job.serve(decoder, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port, instances=instances)


@stickers.command()
def simulate(
    users: Annotated[int, typer.Option(min=1, help="how many users")] = 2000,
    seed: Annotated[int, typer.Option(help="another seed, another population")] = 0,
    out: Annotated[Path, typer.Option(help="folder for the three files")] = Path("~/rebeca-stickers"),
) -> None:
    """Write interactions.parquet, request.parquet and, for evaluation only, truth.parquet."""
    from rebeca_ray.job import console, plain_errors
    from rebeca_ray.stickers.simulate import simulate as simulate_users

    with plain_errors():
        rows = simulate_users(users, seed, out.expanduser())
        console.print(f"{users:,} users, {rows:,} ratings -> {out}")


@catalog.command()
def show(root: Annotated[str, typer.Argument(help="local path or s3://bucket/prefix")]) -> None:
    """The published snapshot: what it holds and what made it."""
    from rich.table import Table

    from rebeca_ray.catalog.read import read_catalog
    from rebeca_ray.job import console, plain_errors

    with plain_errors():
        manifest = read_catalog(root).manifest
        table = Table("", "", show_header=False)
        for key in ("run_date", "run_id", "epoch", "created_at", "embed_dim"):
            table.add_row(key, str(manifest[key]))
        for section in ("counts", "versions"):
            for key, value in manifest[section].items():
                table.add_row(f"{section}.{key}", f"{value:,}" if isinstance(value, int) else str(value))
        console.print(table)


if __name__ == "__main__":
    app()
