"""The demo: the whole main job on the bundled world, then a page of its results."""

import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import yaml

from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.catalog.versions import current_version
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import EmbedConfig, GenerateConfig, TrainConfig
from rebeca_ray.config.load import parse_config
from rebeca_ray.config.sections import SamplerSettings
from rebeca_ray.console import console
from rebeca_ray.data.embedding import embed_items
from rebeca_ray.data.histories import histories_table, index_items
from rebeca_ray.data.interactions import Interactions, read_interactions
from rebeca_ray.data.items import read_image_embeds
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.errors import InputError
from rebeca_ray.evaluation.permutation import personality_line
from rebeca_ray.evaluation.retrieval import retrieve
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.prior.checkpoint import TrainedPrior, load_prior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.sampling import sample_liked
from rebeca_ray.prior.user_blocks import UserBlock
from rebeca_ray.prior.users import UserVectors
from rebeca_ray.schemas import TEST
from rebeca_ray.stickers.build.data import Stickers, load_stickers, to_pixels
from rebeca_ray.stickers.judge import Judge
from rebeca_ray.stickers.report import write_report
from rebeca_ray.stickers.simulate import simulate
from rebeca_ray.stickers.truth import RETRIEVAL, Truth, TruthCheck
from rebeca_ray.storage.objects import write_json
from rebeca_ray.storage.writable import require_writable
from rebeca_ray.training.calibrate import factors_of
from rebeca_ray.training.train import train_prior

NUM_NO_USER = 40


@dataclass
class Phases:
    """Wall-clock seconds of each phase. Each phase is printed as it ends."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        console.rule(name, align="left")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        console.print(f"[dim]{self.seconds[name]:.1f} s[/dim]")


def settings_in(data: Path, name: str) -> dict[str, object]:
    """Return a shipped sticker config, with the demo's folder in place of `~/rebeca-stickers`."""
    text = (Path(__file__).parent / "configs" / f"{name}_stickers.yaml").read_text()
    return dict(yaml.safe_load(text.replace("~/rebeca-stickers", str(data))))


def run_demo(*, out: Path, data: Path, num_users: int, seed: int) -> TruthCheck:
    """Run all phases. Write the files to `data`, and the page to `out/report.html`."""
    phases = Phases()
    data = data.absolute()
    prepare_folders(out, data)
    embed = parse_config(EmbedConfig, settings_in(data, "embed"), where="demo")
    train = parse_config(TrainConfig, settings_in(data, "train"), where="demo")
    settings = settings_in(data, "generate")
    generate = parse_config(GenerateConfig, settings, where="demo")
    # The report judges by ratings that neither the training nor the generator sees.
    apart = {"hold_out": 0.05, "test": 0.1}
    interactions_apart = train.interactions.model_copy(update=apart)
    train = train.model_copy(update={"interactions": interactions_apart})
    generate = generate.model_copy(update={"interactions": interactions_apart, "hide_hold_out": True})
    # With this config, the gallery and `rebeca generate` draw the same images again.
    settings |= {"interactions": {"path": train.interactions.path, **apart}, "hide_hold_out": True}
    (data / "generate.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))

    with phases("Simulate users"):
        ratings = simulate(num_users, seed, data)
        console.print(f"{num_users:,} users, {ratings:,} ratings")
    with phases("Embed items with CLIP"):
        num_items = embed_items(embed)
        console.print(f"{num_items:,} items")
    with phases("Train the prior"):
        train_prior(train)
    with phases("Plan, render, publish"):
        generated = generate_catalog(generate)
        counts, stages = generated.manifest.counts, generated.seconds
        console.print(
            f"{counts.new:,} images for {counts.users:,} users: plan {stages['plan']:.1f} s, "
            f"render {stages['render']:.1f} s ({counts.new / stages['render']:.1f} images/s), "
            f"assemble and publish {stages['assemble']:.1f} s"
        )
        if test := generated.manifest.quality.permutation:
            console.print(personality_line(test))
    with phases("Check against the hidden truth"):
        judge, stickers = Judge(), load_stickers()
        interactions = read_interactions(train.interactions)
        snapshot = read_catalog(generate.catalog)
        check = check_truth(data, judge, stickers, interactions, snapshot, generate)
        print_check(check, judge)
    with phases("Write the report"):
        page = write_report(
            out,
            prior=Path(current_version(generate.prior, "prior")),
            snapshot=snapshot,
            interactions=interactions,
            check=check,
            judge=judge,
            phases=phases.seconds,
        )
    figures = {
        "seconds": {name: round(value, 1) for name, value in phases.seconds.items()},
        "seconds_of_stages": stages,
        "items_embedded": num_items,
        "images_rendered": counts.new,
        "images_per_second": round(counts.new / stages["render"], 2),
        "like_probability": {name: round(value, 4) for name, value in check.figures().items()},
        "judge_accuracy": judge.held_out_accuracy,
    }
    write_json(figures, str(out / "figures.json"))
    print_next_steps(page, data, generate, generated.manifest.run_date)
    return check


def prepare_folders(out: Path, data: Path) -> None:
    """Remove what an earlier demo left in `data`. Raises InputError for a folder that holds anything else."""
    require_writable(str(out), "--out")
    require_writable(str(data), "--data")
    if data.exists() and any(data.iterdir()) and not (data / "truth.parquet").exists():
        raise InputError(f"--data {data}: holds something else than a demo's data; give an empty folder")
    data.mkdir(parents=True, exist_ok=True)
    # A demo starts afresh.
    for name in ("items", "prior", "train", "catalog"):
        shutil.rmtree(data / name, ignore_errors=True)


def print_next_steps(page: Path, data: Path, config: GenerateConfig, run_date: str) -> None:
    """Print where the results are, and commands to go on with."""
    from rich.markup import escape

    console.rule()
    console.print(
        f"[bold]Report:[/bold]   {escape(str(page))}\n"
        f"[bold]Catalog:[/bold]  {escape(config.catalog)}\n"
        f"[bold]Prior:[/bold]    {escape(config.prior)}"
    )
    tomorrow = date.fromisoformat(run_date) + timedelta(days=1)
    console.print(
        "\nNext:\n"
        f"  source {Path(sys.prefix) / 'bin' / 'activate'}\n"
        f"  rebeca gallery {config.catalog} --config {data}/generate.yaml "
        "--items package:stickers/assets/items.parquet    # a page in the browser\n"
        f"  rebeca catalog show {config.catalog}\n"
        f"  python infra/examples/rank_example.py --catalog {config.catalog} --items {data}/items "
        f"--interactions {data}/interactions.parquet --prior {config.prior}\n"
        f"  rebeca generate --config {data}/generate.yaml run_date={tomorrow}"
        "    # no user changed, so all items are carried over\n"
        f"  rebeca estimate --config {data}/generate.yaml refresh.rotation=0.5 run_date={tomorrow}"
        "    # forecasts a run that renders half of the users again\n"
        "  export RAY_AUTH_MODE=token; ray start --head        # then, on this cluster:\n"
        f"  ray job submit --working-dir . -- jobs/generate_catalog.py --config {data}/generate.yaml",
        highlight=False,
        soft_wrap=True,
    )


def check_truth(
    data: Path,
    judge: Judge,
    stickers: Stickers,
    interactions: Interactions,
    snapshot: Snapshot,
    generate: GenerateConfig,
) -> TruthCheck:
    """Judge the seven sets of `TruthCheck` for the users of the snapshot."""
    items = snapshot.items(["user_id", "image_file", "image_row"])
    owners = items["user_id"].to_pylist()
    pixels = to_pixels(snapshot.images(items))
    users = sorted(set(owners))
    truth = Truth(data / "truth.parquet", judge, users)
    random = np.random.default_rng(0)

    held_users, held_rows = held_out_likes(interactions, stickers, set(users))
    stickers_NHWC = stickers.image_NCHW.permute(0, 2, 3, 1).numpy()
    prior = load_prior(generate.prior)
    (plain_users, plain_rows), (mmr_users, mmr_rows) = (
        retrieved_items(prior, generate, interactions, stickers, users, diversity)
        for diversity in (0.0, generate.selection.diversity)
    )
    return TruthCheck(
        matched=float(truth.like_probability(owners, pixels).mean()),
        shuffled=truth.mean_over_users(users, pixels),
        random_real=float(
            truth.like_probability(
                owners, stickers_NHWC[random.integers(0, len(stickers_NHWC), len(owners))]
            ).mean()
        ),
        no_user=truth.mean_over_users(users, no_user_images(prior, generate.sampler, generate.decoder)),
        held_out=float(truth.like_probability(held_users, stickers_NHWC[held_rows]).mean()),
        retrieved=float(truth.like_probability(plain_users, stickers_NHWC[plain_rows]).mean()),
        retrieved_with_mmr=float(truth.like_probability(mmr_users, stickers_NHWC[mmr_rows]).mean()),
    )


def held_out_likes(
    interactions: Interactions, stickers: Stickers, users: set[str]
) -> tuple[list[str], np.ndarray]:
    """Return the held-out likes of `users`, as users and rows of `stickers`."""
    chosen = (
        (interactions.split == TEST)
        & (interactions.like == 1)
        & np.isin(interactions.user_id, list(users))[interactions.user_index]
    )
    owners = interactions.user_id[interactions.user_index[chosen]].tolist()
    return owners, rows_of(interactions.item_id[chosen], stickers)


def rows_of(item_ids: Iterable[str], stickers: Stickers) -> np.ndarray:
    row_of = {item: row for row, item in enumerate(stickers.item_id)}
    return np.array([row_of[item] for item in item_ids], int)


def retrieved_items(
    prior: TrainedPrior,
    generate: GenerateConfig,
    interactions: Interactions,
    stickers: Stickers,
    users: list[str],
    diversity: float,
) -> tuple[list[str], np.ndarray]:
    """Return `num_images` items retrieved for each of `users`, as users and rows of `stickers`.

    The selector reads the training ratings alone, and a held-out item may be retrieved.
    """
    # The demo's config names both inputs, and simulated users like some items and dislike others.
    assert generate.items is not None
    assert generate.interactions is not None
    assert prior.selector is not None
    items = read_image_embeds(generate.items)
    item_index = index_items(interactions, pa.array(items.item_id, pa.string()), generate.interactions.path)
    training = UserBlock(histories_table(interactions, item_index, bucket=0), np.zeros(1, int))
    index_of = {user: index for index, user in enumerate(interactions.user_id.tolist())}
    user_G = np.array([index_of[user] for user in users])
    x0_ID = prior.scaler.scale(torch.from_numpy(items.image_embeds)).numpy()
    rows_of_users = retrieve(
        prior.selector,
        factors_of(prior.selector, training, user_G, x0_ID),
        x0_ID,
        training.rated_items(user_G),
        generate.num_images,
        diversity,
    )
    owners = [user for user, rows in zip(users, rows_of_users, strict=True) for _ in rows]
    return owners, rows_of(items.item_id[np.concatenate(rows_of_users)], stickers)


def no_user_images(prior: TrainedPrior, sampler: SamplerSettings, decoder: DecoderSettings) -> np.ndarray:
    """Return images of the prior without user condition: it gets the rating, but no user."""
    resolved = sampler.resolve(prior.sampling, prior.diffusion.num_train_timesteps)
    null_user = UserVectors(token_GUH=prior.network.null_user_UH.detach()[None])
    x0 = sample_liked(
        prior,
        Diffusion.build(prior.diffusion),
        null_user,
        np.zeros(NUM_NO_USER, int),
        range(NUM_NO_USER),
        resolved,
    )
    embeds = prior.scaler.unscale(x0).numpy()
    return np.stack(LocalDecoder(decoder).draw(Rows.of(decoder, embeds, range(NUM_NO_USER))))


def print_check(check: TruthCheck, judge: Judge) -> None:
    from rich.table import Table

    table = Table("", "mean true like probability of", "", title_justify="left")
    for letter, description, figure in check.rows():
        table.add_row(letter, description, f"{figure:.3f}")
    console.print(table)
    console.print(check.verdict)
    console.print(f"[dim]{RETRIEVAL}[/dim]")
    console.print(f"[dim]{judge.accuracy_line}[/dim]")
