"""The `rebeca` command. Each command imports its work when it runs, so that `--help` answers at once."""

import datetime
import signal
from pathlib import Path
from typing import Annotated, Literal

import typer

from rebeca_ray.cli import catalog_commands, data_commands, first_hour, gallery_command, output
from rebeca_ray.cli.runner import RESUMES, log_options, plain_errors, print_result, read_config

SAME_DATE = "on the same date in UTC or with its run_date"

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Generate personal image recommendations every night (REBECA on Ray).",
)
stickers = typer.Typer(no_args_is_help=True, help="Use the bundled stickers and simulated ratings.")
app.callback()(log_options)
app.add_typer(stickers, name="stickers")
app.add_typer(catalog_commands.app, name="catalog")
app.add_typer(data_commands.app, name="data")
app.command()(first_hour.doctor)
app.command()(first_hour.init)
app.command()(gallery_command.gallery)

Config = Annotated[Path, typer.Option(help="YAML file with the settings; jobs/configs has examples.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings that replace those of the config."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the config with all defaults as JSON, and stop.")
]
ResumeOption = Annotated[
    Literal["auto", "require", "never"],
    typer.Option(
        help="Whether to resume an unfinished run of the same date and inputs. "
        "auto: if there is one. require: fail without one. never: start a new run."
    ),
]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Render failed items of the unfinished run again.")
]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Publish even if the quality gate refuses; manifest and latest.json record it."
    ),
]
ImagesPerSecond = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Images per second of one decoder actor. Default: the rate of the catalog's previous run.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, with plain numbers and stable keys.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html.")] = Path("demo"),
    data: Annotated[
        Path,
        typer.Option(help="Folder for interactions, prior and catalog. The default configs read it."),
    ] = Path("~/rebeca-stickers"),
    users: Annotated[int, typer.Option(min=100, help="Number of simulated users.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the simulation.")] = 0,
) -> None:
    """Run everything on the bundled stickers: simulate, embed, train, generate, publish, check, report."""
    from rebeca_ray.stickers.demo import run_demo

    with plain_errors("a demo starts afresh: run the same command again"):
        run_demo(out=out, data=data.expanduser(), num_users=users, seed=seed)


@app.command()
def embed(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Embed item images with CLIP."""
    from rebeca_ray.config.jobs import EmbedConfig

    with plain_errors():
        if settings := read_config(EmbedConfig, config, overrides, dry_run=dry_run):
            from rebeca_ray.data.embedding import embed_items

            print_result(output.embedded(embed_items(settings), settings.out))


@app.command()
def train(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train a prior on interactions and embedded items."""
    from rebeca_ray.config.jobs import TrainConfig

    with plain_errors(RESUMES):
        if settings := read_config(TrainConfig, config, overrides, dry_run=dry_run):
            from rebeca_ray.training.train import train_prior

            print_result(output.trained(train_prior(settings), settings.out))


@app.command()
def distill(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Distill a trained prior into one that needs only a few passes per embedding."""
    from rebeca_ray.config.jobs import DistillConfig

    with plain_errors():
        if settings := read_config(DistillConfig, config, overrides, dry_run=dry_run):
            from rebeca_ray.training.distill import distill_prior

            figures = distill_prior(settings)
            print_result(output.distilled(figures, settings.out, settings.num_inference_steps))


@app.command()
def generate(
    config: Config,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: ResumeOption = "auto",
    retry_failed: RetryFailed = False,
    force: Force = False,
) -> None:
    """Generate items for the users of a request, and publish them as a snapshot."""
    from rebeca_ray.config.jobs import GenerateConfig, dated

    how = "again" if resume != "never" else "with --resume auto"
    with plain_errors(f"what was done is kept: run the same command {how} to go on, {SAME_DATE}"):
        if settings := read_config(GenerateConfig, config, overrides, dry_run=dry_run):
            from rebeca_ray.generation.pipeline import generate_catalog

            now = datetime.datetime.now(datetime.UTC)
            generated = generate_catalog(
                dated(settings, settings.date(now)),
                resume=resume,
                retry_failed=retry_failed,
                force=force,
                since=now,
            )
            print_result(output.published(generated, settings.catalog))


@app.command()
def nightly(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Run one night: embed new items, train if due, generate, collect garbage.

    Missed dates are backfilled first. A published date is skipped.
    """
    from rebeca_ray.config.jobs import NightlyConfig

    with plain_errors(RESUMES):
        if settings := read_config(NightlyConfig, config, overrides, dry_run=dry_run):
            from rebeca_ray.nightly import run_nightly

            nights, garbage = run_nightly(settings)
            print_result(output.nightly(nights, garbage, settings.generate.catalog))


@app.command()
def estimate(
    config: Config,
    overrides: Overrides = None,
    images_per_second: ImagesPerSecond = None,
    as_json: AsJson = False,
) -> None:
    """Forecast `rebeca generate` for tonight: items, time, GPU time, data and cost, beside the previous run.

    Use overrides to forecast for another cluster.
    """
    from rebeca_ray.config.jobs import GenerateConfig, dated

    with plain_errors("nothing was changed: run the same command again"):
        if settings := read_config(GenerateConfig, config, overrides):
            from rebeca_ray.catalog.read import published
            from rebeca_ray.generation.estimate import estimate as forecast_run

            date = settings.date()
            settings = dated(settings.model_copy(update={"run_date": date}), date)
            forecast = forecast_run(settings, images_per_second=images_per_second)
            snapshot = published(settings.catalog)
            last = snapshot.manifest.actual if snapshot else None
            form = output.estimate_json if as_json else output.estimate_table
            print_result(form(forecast, last), as_json=as_json)


@app.command()
def sample(
    prior: Annotated[str, typer.Option(help="Folder of the prior: a local path or s3://bucket/prefix.")],
    out: Annotated[str, typer.Option(help="Parquet file to write. It may not exist yet.")],
    users: Annotated[
        str | None, typer.Option(help="Parquet file of the users, in a column user_id. Or give --all.")
    ] = None,
    everyone: Annotated[
        bool,
        typer.Option("--all", help="Sample every user of the prior's table, or every user with ratings."),
    ] = False,
    num_images: Annotated[int, typer.Option(help="Embeddings per user.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the noise; at 0 it is that of `rebeca generate`.")] = 0,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY.SUB=VALUE]...",
            help="Further settings of SampleConfig, such as items=FOLDER interactions.path=FILE "
            "sampler.num_inference_steps=8 selection.diversity=0.2.",
        ),
    ] = None,
) -> None:
    """Sample embeddings of users into a Parquet file, without a catalog, for a decoder of your own.

    A prior that knows users by their history needs the settings interactions.path and items.
    """
    from rebeca_ray.config.jobs import SampleConfig
    from rebeca_ray.config.load import with_overrides
    from rebeca_ray.errors import InputError

    with plain_errors():
        if everyone == (users is not None):
            given = "both are given" if everyone else "neither is given"
            raise InputError(f"--users, --all: {given}; give one of them")
        options = {"prior": prior, "users": users, "out": out, "num_images": num_images, "seed": seed}
        settings = with_overrides(SampleConfig, options, overrides, where="options")
        from rebeca_ray.halves.sample import sample_embeddings

        print_result(output.sampled(sample_embeddings(settings), str(settings.out)))


@app.command()
def decode(
    config: Config,
    embeds: Annotated[
        str, typer.Option(help="Parquet file with a column image_embeds, as `rebeca sample` writes it.")
    ],
    out: Annotated[str, typer.Option(help="Parquet file to write. It may not exist yet.")],
    overrides: Overrides = None,
) -> None:
    """Decode embeddings into images with the decoder of a `rebeca generate` config, without a catalog."""
    from rebeca_ray.config.fields import absolute
    from rebeca_ray.config.jobs import GenerateConfig

    with plain_errors():
        if settings := read_config(GenerateConfig, config, overrides):
            from rebeca_ray.halves.decode import decode_embeddings

            decoded = decode_embeddings(absolute(embeds), settings.decoder, absolute(out))
            print_result(output.decoded(decoded, out))


@app.command()
def tune(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train on a grid of settings with Ray Tune, and show the validation loss of each."""
    from rebeca_ray.config.tuning import TuneConfig

    with plain_errors(RESUMES):
        if settings := read_config(TuneConfig, config, overrides, dry_run=dry_run):
            from rebeca_ray.studies.tuning import tune_training

            print_result(output.tuned(tune_training(settings), settings.out))


@app.command()
def evaluate(
    config: Config,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    truth: Annotated[
        Path | None,
        typer.Option(
            help="The truth.parquet of simulated users, to report true like probabilities and topics too."
        ),
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Methods to start from: paper or pipbench.")] = None,
) -> None:
    """Evaluate a catalog, or compare two, by figures per user and a report."""
    from rebeca_ray.config.evaluation import EvaluateConfig

    with plain_errors("drawn items are kept: run the same command again to go on"):
        overrides = [*([f"suite={suite}"] if suite else []), *(overrides or [])]
        if settings := read_config(EvaluateConfig, config, overrides, dry_run=dry_run):
            from rebeca_ray.stickers.captions import caption_sources
            from rebeca_ray.stickers.truth import true_like_of
            from rebeca_ray.studies.evaluate import evaluate as evaluate_catalogs
            from rebeca_ray.studies.figures import check_bounds, named_figures
            from rebeca_ray.studies.report import write_report
            from rebeca_ray.studies.tracking import track

            true_like, captions = (true_like_of(truth), caption_sources()) if truth else (None, [])
            study = evaluate_catalogs(settings, true_like, captions)
            page = write_report(study, settings.out, settings.images)
            print_result(output.evaluated(study.metrics, page))
            figures = named_figures(study.metrics)
            if settings.tracking:
                track(settings.tracking, settings.model_dump(mode="json"), figures)
            check_bounds(figures, settings.bounds)


@app.command()
def export(
    config: Config,
    out: Annotated[Path, typer.Option(help="Folder for the graphs; decoder.engine_dir reads it.")],
    overrides: Overrides = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantise the UNet; --calibrate gives items.")] = False,
    calibrate: Annotated[str | None, typer.Option(help="Embedded items for --int8.")] = None,
) -> None:
    """Export the decoder of a `rebeca generate` config as ONNX graphs, and check them."""
    from rebeca_ray.config.jobs import GenerateConfig
    from rebeca_ray.errors import InputError

    with plain_errors():
        if int8 != (calibrate is not None):
            raise InputError("export: --int8 and --calibrate go together; give both, or neither")
        if settings := read_config(GenerateConfig, config, overrides):
            if calibrate:
                from rebeca_ray.evaluation.quantization import export_quantized

                print_result(output.quantized(export_quantized(settings.decoder, out, calibrate), out))
                return
            from rebeca_ray.decoder.export import export_decoder

            export_decoder(settings.decoder, out)
            print_result(f"exported decoder -> {out}")


@app.command()
def convert(
    pickle: Annotated[Path, typer.Argument(help="Weights as a pickle: a model, an IP-Adapter or a LoRA.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Convert pickled weights to safetensors, without running code from the pickle."""
    from rebeca_ray.decoder.single_file.pickles import convert_pickle

    with plain_errors():
        print_result(f"{convert_pickle(pickle, out)} tensors -> {out}")


@app.command()
def serve(
    config: Config,
    overrides: Overrides = None,
    http_port: Annotated[int, typer.Option(help="Port for HTTP requests.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Port for gRPC: that of decoder.triton.url.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Port for Prometheus metrics.")] = 8002,
    instances: Annotated[
        int,
        typer.Option(min=1, help="Copies of the decoder: two encode and decode at once."),
    ] = 1,
) -> None:
    """Serve the decoder of a `rebeca generate` config with Triton on 127.0.0.1, until interrupted."""
    from rebeca_ray.config.jobs import GenerateConfig
    from rebeca_ray.errors import ServerLostError

    with plain_errors():
        if settings := read_config(GenerateConfig, config, overrides):
            from rebeca_ray.decoder.choices import choose, is_open
            from rebeca_ray.decoder.triton_server import triton_server

            decoder = choose(settings.decoder)
            if is_open(settings.decoder):
                print_result(
                    f"decoder: device {decoder.device}, dtype {decoder.dtype}, chosen for this machine"
                )
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            ports = {"http_port": http_port, "grpc_port": grpc_port, "metrics_port": metrics_port}
            try:
                with triton_server(decoder, **ports, instances=instances) as process:
                    print_result(output.serving(**ports))
                    if code := process.wait():
                        raise ServerLostError(f"tritonserver ended with code {code}; see its lines above")
            except KeyboardInterrupt:
                print_result("stopped")


@stickers.command()
def simulate(
    users: Annotated[int, typer.Option(min=1, help="Number of users.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed; another seed gives other users.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the three files.")] = Path("~/rebeca-stickers"),
) -> None:
    """Write interactions.parquet, request.parquet and, for evaluation only, truth.parquet."""
    from rebeca_ray.stickers.simulate import simulate as simulate_users

    with plain_errors():
        num_ratings = simulate_users(users, seed, out.expanduser())
        print_result(f"{users:,} users, {num_ratings:,} ratings -> {out}")


if __name__ == "__main__":
    app()
