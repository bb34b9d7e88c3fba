"""The `rebeca` command. Every command imports its work when it runs, so that `--help` answers at once."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from rebeca_ray.cli.runner import plain_errors
from rebeca_ray.console import console

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Nightly generated image recommendations (REBECA on Ray).",
)
stickers = typer.Typer(no_args_is_help=True, help="The bundled world of rated stickers.")
catalog = typer.Typer(no_args_is_help=True, help="Look at published catalogs.")
exports = typer.Typer(no_args_is_help=True, help="The published snapshot, for what does not read Parquet.")
app.add_typer(stickers, name="stickers")
app.add_typer(catalog, name="catalog")
catalog.add_typer(exports, name="export")

Config = Annotated[Path, typer.Option("--config", help="YAML file; see jobs/configs")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="changes to the config")
]
ResumeOption = Annotated[
    Literal["auto", "require", "never"],
    typer.Option(
        help="go on with an unfinished run of the same date and the same things: if there is one, or else fail"
    ),
]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="draw again what failed in the unfinished run of this date")
]
Force = Annotated[bool, typer.Option("--force", help="publish what the quality gate refuses; it is recorded")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved config and stop")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="where report.html goes")] = Path("demo"),
    data: Annotated[
        Path,
        typer.Option(help="where interactions, prior and catalog go; the default configs read them there"),
    ] = Path("~/rebeca-stickers"),
    users: Annotated[int, typer.Option(min=100, help="simulated users")] = 2000,
    seed: Annotated[int, typer.Option(help="seed of the simulation")] = 0,
) -> None:
    """The whole flow on the bundled stickers: simulate, embed, train, generate, publish, check, report."""
    from rebeca_ray.stickers.demo import run_demo

    with plain_errors():
        run_demo(out=out, data=data.expanduser(), num_users=users, seed=seed)


@app.command()
def embed(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Items with images -> the same items with CLIP embeddings."""
    from rebeca_ray.cli import output, runner
    from rebeca_ray.config.jobs import EmbedConfig

    runner.execute(EmbedConfig, output.embed, config, overrides or [], dry_run=dry_run)


@app.command()
def train(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Interactions + embedded items -> a prior directory."""
    from rebeca_ray.cli import output, runner
    from rebeca_ray.config.jobs import TrainConfig

    runner.execute(TrainConfig, output.train, config, overrides or [], dry_run=dry_run)


@app.command()
def distill(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """A trained prior -> one that needs a few passes an embedding."""
    from rebeca_ray.cli import output, runner
    from rebeca_ray.config.jobs import DistillConfig

    runner.execute(DistillConfig, output.distill, config, overrides or [], dry_run=dry_run)


@app.command()
def generate(
    config: Config,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: ResumeOption = "auto",
    retry_failed: RetryFailed = False,
    force: Force = False,
) -> None:
    """Prior + decoder + request -> a published snapshot."""
    from rebeca_ray.cli import output, runner
    from rebeca_ray.config.jobs import GenerateConfig

    def work(settings: GenerateConfig) -> None:
        output.generate(settings, resume=resume, retry_failed=retry_failed, force=force)

    runner.execute(GenerateConfig, work, config, overrides or [], dry_run=dry_run)


@app.command()
def nightly(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """One night: embed new items, train if it is due, generate, collect garbage; missed dates first. Does nothing twice."""
    from rebeca_ray.cli import output, runner
    from rebeca_ray.config.jobs import NightlyConfig

    runner.execute(NightlyConfig, output.nightly, config, overrides or [], dry_run=dry_run)


@app.command()
def estimate(
    config: Config,
    overrides: Overrides = None,
    images_per_second: Annotated[
        float | None,
        typer.Option(min=0, help="of one decoder actor; default: as the last run of this catalog measured"),
    ] = None,
) -> None:
    """What `rebeca generate` would draw tonight: items, hours, GPU-hours, bytes, cost. Overrides describe another cluster."""
    from rebeca_ray.cli import output
    from rebeca_ray.config.jobs import GenerateConfig
    from rebeca_ray.config.load import load_config

    with plain_errors():
        output.estimate(load_config(GenerateConfig, config, overrides), images_per_second=images_per_second)


@app.command()
def export(
    config: Config,
    out: Annotated[Path, typer.Option(help="folder to write, for decoder.engine_dir")],
    overrides: Overrides = None,
) -> None:
    """The decoder of a `rebeca generate` config -> ONNX graphs, checked."""
    from rebeca_ray.config.jobs import GenerateConfig
    from rebeca_ray.config.load import load_config
    from rebeca_ray.decoder.export import export_decoder

    with plain_errors():
        export_decoder(load_config(GenerateConfig, config, overrides).decoder, out)
        console.print(f"exported decoder -> {out}")


@app.command()
def convert(
    pickle: Annotated[Path, typer.Argument(help="an IP-Adapter or LoRA as .bin")],
    out: Annotated[Path, typer.Argument(help="the .safetensors file to write")],
) -> None:
    """Weights in a pickle -> the same as safetensors; nothing in the pickle is run."""
    from rebeca_ray.decoder.files import convert_pickle

    with plain_errors():
        console.print(f"{convert_pickle(pickle, out)} tensors -> {out}")


@app.command()
def serve(
    config: Config,
    overrides: Overrides = None,
    http_port: Annotated[int, typer.Option()] = 8000,
    grpc_port: Annotated[int, typer.Option()] = 8001,
    metrics_port: Annotated[int, typer.Option()] = 8002,
    instances: Annotated[
        int, typer.Option(min=1, help="copies of the decoder; two let one encode while the other draws")
    ] = 1,
) -> None:
    """The decoder of a `rebeca generate` config behind Triton Inference Server, on 127.0.0.1, until interrupted."""
    from rebeca_ray.cli import output
    from rebeca_ray.config.jobs import GenerateConfig
    from rebeca_ray.config.load import load_config

    with plain_errors():
        decoder = load_config(GenerateConfig, config, overrides).decoder
        output.serve(
            decoder, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port, instances=instances
        )


@stickers.command()
def simulate(
    users: Annotated[int, typer.Option(min=1, help="how many users")] = 2000,
    seed: Annotated[int, typer.Option(help="another seed, another population")] = 0,
    out: Annotated[Path, typer.Option(help="folder for the three files")] = Path("~/rebeca-stickers"),
) -> None:
    """Write interactions.parquet, request.parquet and, for evaluation only, truth.parquet."""
    from rebeca_ray.stickers.simulate import simulate as simulate_users

    with plain_errors():
        rows = simulate_users(users, seed, out.expanduser())
        console.print(f"{users:,} users, {rows:,} ratings -> {out}")


Root = Annotated[str, typer.Argument(help="local path or s3://bucket/prefix")]
RunId = Annotated[str | None, typer.Option("--run-id", help="default: the published one")]


@catalog.command(name="list")
def list_(root: Root) -> None:
    """All complete snapshots, the oldest first."""
    from rebeca_ray.cli import output

    with plain_errors():
        output.list_catalog(root)


@catalog.command()
def show(root: Root, run_id: RunId = None) -> None:
    """A snapshot: what it holds, how it was judged, what made it."""
    from rebeca_ray.cli import output

    with plain_errors():
        output.show_snapshot(root, run_id)


@catalog.command()
def verify(
    root: Root,
    run_id: RunId = None,
    level: Annotated[
        Literal["metadata", "sample", "full"],
        typer.Option(help="counts and sizes; some files, rows and images too; or all"),
    ] = "sample",
) -> None:
    """Whether a snapshot is what its manifest says; exit code 4 and a line for each thing that is not."""
    from rebeca_ray.cli import output

    with plain_errors():
        output.verify_snapshot(root, run_id, level)


@catalog.command()
def publish(
    root: Root,
    run_id: Annotated[str, typer.Option("--run-id", help="whose snapshot; see `rebeca catalog list`")],
) -> None:
    """Point readers at a complete snapshot, also at one that the quality gate refused: that is recorded."""
    from rebeca_ray.catalog.snapshots import publish_snapshot

    with plain_errors():
        manifest = publish_snapshot(root, run_id)
        console.print(f"published run {run_id} of {manifest.run_date} in {root}")


@catalog.command()
def rollback(root: Root) -> None:
    """Publish the snapshot that the published one followed."""
    from rebeca_ray.catalog.snapshots import roll_back

    with plain_errors():
        manifest = roll_back(root)
        console.print(f"published run {manifest.run_id} of {manifest.run_date} in {root} again")


@catalog.command()
def gc(
    root: Root,
    keep: Annotated[int, typer.Option(min=1, help="latest snapshots that stay")] = 7,
    grace_hours: Annotated[
        float,
        typer.Option(
            min=0, help="a snapshot stays so long after it was followed, an unfinished run after its start"
        ),
    ] = 48,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, and remove nothing")] = False,
) -> None:
    """Remove what no kept snapshot and no unfinished run needs."""
    from rebeca_ray.cli import output

    with plain_errors():
        output.collect_garbage(root, keep=keep, grace_hours=grace_hours, dry_run=dry_run)


@exports.command(name="images")
def export_images(
    root: Root,
    out: Annotated[
        str, typer.Argument(help="folder for objects/ and the tables of URLs: local, or s3://bucket/prefix")
    ],
    url_base: Annotated[
        str,
        typer.Option(
            help="what the CDN calls that folder: the URL of an image is this, a slash, and its key"
        ),
    ],
) -> None:
    """Images as objects with stable keys, and tables of who is shown which URL. Only what is new is written."""
    from rebeca_ray.cli import output

    with plain_errors():
        output.export_images(root, out, url_base)


@exports.command()
def key_values(
    root: Root,
    out: Annotated[str, typer.Argument(help="folder for the part files: local, or s3://bucket/prefix")],
    format: Annotated[
        Literal["jsonl", "redis"], typer.Option(help="JSON lines, or commands for `redis-cli --pipe`")
    ] = "jsonl",
    key_prefix: Annotated[str, typer.Option(help="of the keys in Redis; the user_id follows")] = "rebeca:",
    since: Annotated[
        str | None, typer.Option(help="a run: only users whose items differ from its snapshot's")
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="the folder of `export images`, whose URLs are added")
    ] = None,
) -> None:
    """Every user's items as one value, for a serving store to load in bulk."""
    from rebeca_ray.cli import output

    with plain_errors():
        output.export_key_values(root, out, format, key_prefix=key_prefix, since=since, images=images)


@exports.command()
def iceberg(
    root: Root,
    catalog: Annotated[
        str, typer.Option(help="database of an Iceberg SQL catalog, such as sqlite:////data/iceberg.db")
    ],
    warehouse: Annotated[str, typer.Option(help="folder for the Iceberg tables' metadata")],
    namespace: Annotated[
        str, typer.Option(help="of the tables items, images, users, errors, changes")
    ] = "rebeca",
) -> None:
    """Register the snapshot's own files as Iceberg tables; nothing is copied."""
    from rebeca_ray.cli import output

    with plain_errors():
        output.register_iceberg(root, catalog, warehouse, namespace)


if __name__ == "__main__":
    app()
