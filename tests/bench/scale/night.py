"""The stages of one night of many users, one per process: each reads the files of the stage before.

Everything is real but two things. The prior is untrained and tiny, and takes three steps. The decoder returns
the same small JPEG for every item.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rebeca_ray import schemas
from rebeca_ray.catalog.exports.key_values import export_key_values
from rebeca_ray.catalog.gc import collect
from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.read import open_snapshot
from rebeca_ray.catalog.verify import verify
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import (
    InteractionSettings,
    LayoutSettings,
    NetworkSettings,
    SamplerSettings,
    SelectionSettings,
)
from rebeca_ray.data.histories import Histories
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.decoder.interface import DecodedImage, Rows
from rebeca_ray.generation import render
from rebeca_ray.generation.assemble import assemble, describe_snapshot
from rebeca_ray.generation.context import RunContext
from rebeca_ray.generation.decide import decide_all
from rebeca_ray.generation.decisions import Decisions
from rebeca_ray.generation.gate import check_plan
from rebeca_ray.generation.plan import plan_items, request_histories
from rebeca_ray.generation.progress import Progress
from rebeca_ray.generation.render import render_all
from rebeca_ray.generation.request import check_request
from rebeca_ray.prior.checkpoint import save_prior
from rebeca_ray.prior.scaler import EmbedScaler
from rebeca_ray.prior.selector import Selector
from rebeca_ray.storage.objects import read_json, write_json
from tests.bench.scale.measure import files_below
from tests.conftest import NO_GATE, context_of, publish, untrained_prior
from tests.tiny_decoder import write_tiny_decoder

D, USERS_PER_BUCKET, ITEMS_PER_USER, RATINGS_PER_USER, REAL_ITEMS = 32, 5_000, 1, 2, 1_000
IMAGES_PER_FILE = 2_500
RATED_USERS = 1_000_000  # of more users, the others are new
NETWORK = NetworkSettings(num_layers=1, num_heads=2, width=16, num_tokens=4, max_history=8)
ROWS_AT_ONCE = 500_000


def user_ids(start: int, stop: int) -> pa.Array:
    return pa.array([f"user-{number:08d}" for number in range(start, stop)])


def write_inputs(folder: Path, users: int) -> None:
    """Write request, interactions, items, prior and decoder."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    names = pa.array([f"real-{number}" for number in range(REAL_ITEMS)])
    embeds = random.standard_normal((REAL_ITEMS, D)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeds.ravel()), type=schemas.image_embeds(D))
    pq.write_table(pa.table({"item_id": names, "image_embeds": column}), folder / "items.parquet")
    request, ratings = [("user_id", pa.string())], [("user_id", pa.string()), ("item_id", pa.string())]
    with (
        pq.ParquetWriter(folder / "request.parquet", pa.schema(request)) as requests,
        pq.ParquetWriter(folder / "interactions.parquet", pa.schema(ratings)) as interactions,
    ):
        for start in range(0, users, ROWS_AT_ONCE):
            ids = user_ids(start, min(users, start + ROWS_AT_ONCE))
            requests.write_table(pa.table({"user_id": ids}))
            first = random.integers(0, REAL_ITEMS, len(ids))
            for number in range(RATINGS_PER_USER if start < RATED_USERS else 0):
                rated = names.take(pa.array((first + number) % REAL_ITEMS))
                interactions.write_table(pa.table({"user_id": ids, "item_id": rated}))
    prior = replace(
        untrained_prior(NETWORK, D),
        scaler=EmbedScaler(embed_dim=D, norm=3.0),
        selector=Selector(D, num_factors=8),
        metrics={"val_loss": 1.0},
        curve="epoch,train_loss,val_loss,learning_rate\n1,1.0,0.9,0.001\n",
    )
    save_prior(prior, str(folder / "prior"))
    decoder = write_tiny_decoder(folder / "decoder", D).model_copy(update={"batch_size": 256})
    write_json(decoder.model_dump(), str(folder / "decoder.json"))


@dataclass(frozen=True)
class Night:
    """One night below a folder, by a run of a fixed name."""

    folder: Path
    users: int

    @property
    def num_buckets(self) -> int:
        return max(1, self.users // USERS_PER_BUCKET)

    @cached_property
    def config(self) -> GenerateConfig:
        folder = str(self.folder)
        return GenerateConfig(
            prior=f"{folder}/prior",
            decoder=DecoderSettings.model_validate(read_json(f"{folder}/decoder.json")),
            request=f"{folder}/request.parquet",
            catalog=f"{folder}/catalog",
            items=f"{folder}/items.parquet",
            interactions=InteractionSettings(path=f"{folder}/interactions.parquet"),
            num_images=ITEMS_PER_USER,
            run_id="scale",
            run_date=date(2026, 1, 1),
            sampler=SamplerSettings(
                num_inference_steps=3, batch_size=2048, prior_guidance_scale=1.0, cpus_per_actor=0.5
            ),
            selection=SelectionSettings(candidates_per_item=1),
            layout=LayoutSettings(num_buckets=self.num_buckets, images_per_file=IMAGES_PER_FILE),
            gate=NO_GATE,
        )

    @cached_property
    def run(self) -> Run:
        return Run(root=str(self.folder / "catalog"), run_date="2026-01-01", run_id="scale", fencing_token=1)

    @cached_property
    def context(self) -> RunContext:
        return replace(context_of(self.config, self.run), in_process=False)

    @cached_property
    def histories(self) -> Histories | None:
        return request_histories(self.config, self.run)

    @cached_property
    def decisions(self) -> Decisions:
        return decide_all(self.context, self.histories, lambda: None)


def check(night: Night) -> Callable[[], object]:
    decoder = identify_decoder(night.config.decoder)
    return lambda: check_request(night.config, decoder)


def histories(night: Night) -> Callable[[], object]:
    return lambda: night.histories


def decide(night: Night) -> Callable[[], object]:
    night.context, night.histories  # noqa: B018 - read before the measurement
    return lambda: night.decisions


def plan(night: Night) -> Callable[[], object]:
    night.decisions  # noqa: B018
    return lambda: plan_items(night.context, night.histories, night.decisions, Progress())


def gate(night: Night) -> Callable[[], object]:
    return lambda: check_plan(night.run, night.config.gate)


class OneImage:
    """A decoder that returns the same small JPEG for every row."""

    def __init__(self) -> None:
        file = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(noise).save(file, "JPEG", quality=90)
        self.image = file.getvalue()

    def decode(self, rows: Rows) -> list[DecodedImage]:
        return [DecodedImage(seed=seed, image=self.image, width=24, height=24) for seed in rows.seeds]


class StandInRender(render.RenderImages):
    """Renders by `OneImage`; all else is as in a night."""

    def __init__(self, *arguments: Any) -> None:
        with patch.object(render, "build_decoder", lambda _: OneImage()):
            super().__init__(*arguments)


def draw(night: Night) -> render.Rendered:
    with patch.object(render, "RenderImages", StandInRender):
        return render_all(night.context, night.decisions, Progress(), deadline=None, retry_failed=False)


def render_stage(night: Night) -> Callable[[], object]:
    night.decisions  # noqa: B018
    return lambda: draw(night)


def assemble_stage(night: Night) -> Callable[[], object]:
    rendered, progress = draw(night), Progress()  # all is rendered: this reads the markers

    def work() -> None:
        with progress.stage("assemble"):
            tables = assemble(night.context, night.decisions, rendered, lambda: None)
            manifest = describe_snapshot(night.context, night.decisions, tables, None, progress)
        write_json(manifest.model_dump(), night.run.manifest)
        publish(night.run.root, night.run)

    return work


def verify_stage(night: Night) -> Callable[[], object]:
    def work() -> None:
        defects = verify(open_snapshot(night.run.root, night.run.snapshot), "full")
        assert not defects, defects[:3]

    return work


def export(night: Night) -> Callable[[], object]:
    snapshot = open_snapshot(night.run.root, night.run.snapshot)
    return lambda: export_key_values(snapshot, str(night.folder / "values"), "jsonl")


def collect_garbage(night: Night) -> Callable[[], object]:
    return lambda: collect(night.run.root, keep=1, grace_hours=0)


STAGES: dict[str, Callable[[Night], Callable[[], object]]] = {
    "check": check,
    "histories": histories,
    "decide": decide,
    "plan": plan,
    "gate": gate,
    "render": render_stage,
    "assemble": assemble_stage,
    "verify": verify_stage,
    "export": export,
    "gc": collect_garbage,
}


def expected_files(night: Night) -> dict[str, int]:
    """Return the files that the design has: `items` and `users` per bucket, and images in full files."""
    return {"items": night.num_buckets, "users": night.num_buckets}


def count_files(night: Night) -> dict[str, list[int]]:
    """Return number and bytes of the files of a catalog, by their kind."""
    snapshot, root = Path(night.run.root) / night.run.snapshot, Path(night.run.root)
    folders = {name: snapshot / name for name in ("items", "users", "changes")}
    folders |= {"images": root / night.run.images, "values": night.folder / "values"}
    return {name: [*files_below(folder)] for name, folder in folders.items()}
