"""Small real parts for all tests: a tiny prior and decoder, a local Ray, an S3 server, nights in process."""

import logging
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rebeca_ray import log, schemas
from rebeca_ray.catalog.figures import GateFigures
from rebeca_ray.catalog.layout import Run, new_run_id
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.manifest import Counts, DecisionCounts, FileList, Manifest, Measured, StageFigures
from rebeca_ray.catalog.pointer import Pointer, read_pointer
from rebeca_ray.catalog.read import published
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import (
    DiffusionSettings,
    GateSettings,
    NetworkSettings,
    PriorSampling,
    SamplerSettings,
)
from rebeca_ray.data.histories import Histories
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.generation.assemble import assemble, describe_snapshot
from rebeca_ray.generation.context import RunContext, identify_models
from rebeca_ray.generation.decide import decide_all
from rebeca_ray.generation.decisions import Decisions
from rebeca_ray.generation.parts import PartRecord, WriteParts
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.generation.plan import plan_items, read_plan, request_histories
from rebeca_ray.generation.progress import Progress
from rebeca_ray.generation.render import Rendered, RenderImages, render_all
from rebeca_ray.generation.request import check_request
from rebeca_ray.prior.checkpoint import TrainedPrior, save_prior
from rebeca_ray.prior.denoisers import Prior
from rebeca_ray.prior.scaler import EmbedScaler
from rebeca_ray.prior.selector import Selector
from rebeca_ray.prior.users import UserTable
from rebeca_ray.storage.objects import write_json
from rebeca_ray.storage.parquet import read_table, write_table
from rebeca_ray.storage.records import read_record, write_record
from rebeca_ray.termination import SIGNALS
from tests.faulty_s3 import proxy as proxy  # a fixture
from tests.processes import all_cpus_are_free_again as all_cpus_are_free_again
from tests.processes import pytest_collection_modifyitems as pytest_collection_modifyitems
from tests.processes import pytest_configure as pytest_configure
from tests.processes import ray_local as ray_local
from tests.seaweedfs import seaweedfs
from tests.tiny_exports import cached_sd as cached_sd  # fixtures
from tests.tiny_exports import cached_sdxl as cached_sdxl
from tests.tiny_exports import exported as exported
from tests.tiny_exports import shared as shared
from tests.tiny_exports import write_once

REPO = Path(__file__).parents[1]
D = 16
TINY_NETWORK = NetworkSettings(num_layers=2, num_heads=2, width=16, num_tokens=3, user_encoder="id")
USERS = [f"user-{number}" for number in range(7)]


@pytest.fixture(autouse=True)
def _restore_signals() -> Iterator[None]:
    """Leave the signals as they were: an interrupted command leaves those that end the process at once."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        if handler is not None:  # one that is not Python's stays
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _restore_log() -> Iterator[None]:
    """Leave the package's log as it was: a command that runs in this process configures it."""
    package = logging.getLogger(log.PACKAGE)
    handlers, level, propagate = package.handlers, package.level, package.propagate
    yield
    package.handlers, package.level, package.propagate = handlers, level, propagate
    log.settings, log.level_is_given = log.LogSettings(), False


@pytest.fixture
def tiny_prior(tmp_path: Path) -> str:
    return write_tiny_prior(tmp_path)


def prior_users(names: list[str]) -> pa.Table:
    """Return the table of users of an `id` prior."""
    columns = {
        "user_id": names,
        "user_index": np.arange(len(names), dtype=np.int32),
        "num_likes": np.full(len(names), 5, np.int32),
        "history_digest": [f"digest-{user}" for user in names],
    }
    return pa.table(columns, schema=schemas.PRIOR_USERS)


def write_tiny_prior(
    folder: Path,
    *,
    users: pa.Table | None = None,
    embed_dim: int = D,
    norm: float = 3.0,
    selector: Selector | None = None,
) -> str:
    """Write a prior directory with random weights, by default for USERS and D = 16; return its path."""
    users = prior_users(USERS) if users is None else users
    if selector:
        selector.rows_VF = torch.randn(users.num_rows, selector.factors.out_features + 1)
    prior = replace(
        untrained_prior(TINY_NETWORK, embed_dim),
        scaler=EmbedScaler(embed_dim=embed_dim, norm=norm),
        user_rows=UserTable(users.num_rows, 1, 16).rows_VUH,
        users=users,
        selector=selector,
        metrics={"val_loss": 1.0},
        curve="epoch,train_loss,val_loss,learning_rate\n1,1.0,0.9,0.001\n2,0.7,0.8,0.001\n",
    )
    save_prior(prior, str(folder / "prior"))
    return str(folder / "prior")


def untrained_prior(settings: NetworkSettings, embed_dim: int = D) -> TrainedPrior:
    """Return an untrained prior with random weights."""
    torch.manual_seed(0)
    return TrainedPrior(
        network=wake(Prior(settings, embed_dim)),
        settings=settings,
        diffusion=DiffusionSettings(num_train_timesteps=100),
        scaler=EmbedScaler(embed_dim=embed_dim, norm=3.0),
        sampling=PriorSampling(prior_guidance_scale=2.0),
        condition_dropout=0.15,
        clip=None,
    )


def wake(prior: Prior) -> Prior:
    """Replace the zero weights at the start of training, so that an untrained prior reacts to its inputs."""
    for name, parameter in prior.denoiser.named_parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5 if name.endswith("cross_gate") else 0.2)
    return prior.eval()


@pytest.fixture(scope="session")
def tiny_decoder(shared: Path) -> DecoderSettings:
    """Write Stable Diffusion and an IP-Adapter in their official layouts: random weights, 16 pixels."""
    from tests.tiny_decoder import write_tiny_decoder

    return write_once(shared, "tiny_decoder", lambda folder: write_tiny_decoder(folder, D))


@pytest.fixture(scope="session")
def tiny_sdxl(shared: Path) -> DecoderSettings:
    """Write Stable Diffusion XL and an IP-Adapter in their official layouts: random weights, 16 pixels."""
    from tests.tiny_sdxl import write_tiny_sdxl

    return write_once(shared, "tiny_sdxl", lambda folder: write_tiny_sdxl(folder, D))


def write_request(folder: Path) -> str:
    """Write a request of five users, one with a prompt and one with four images: 16 items in all."""
    columns = {
        "user_id": USERS[:5],
        "num_images": pa.array([None, 4, None, None, None], pa.int32()),
        "prompt": [None, None, "noto food pizza", None, None],
    }
    pq.write_table(pa.table(columns), folder / "request.parquet")
    return str(folder / "request.parquet")


def write_items(folder: Path) -> str:
    embeds = np.random.default_rng(3).standard_normal((20, D)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeds.ravel()), type=schemas.image_embeds(D))
    pq.write_table(
        pa.table({"item_id": [f"real-{number}" for number in range(20)], "image_embeds": column}),
        folder / "items.parquet",
    )
    return str(folder / "items.parquet")


def generate_config(folder: Path, decoder: DecoderSettings) -> GenerateConfig:
    return GenerateConfig(
        prior=write_tiny_prior(folder),
        decoder=decoder,
        request=write_request(folder),
        catalog=str(folder / "catalog"),
        items=write_items(folder),
        num_images=3,
        sampler=SamplerSettings(
            num_inference_steps=4, batch_size=32, prior_guidance_scale=2.0, cpus_per_actor=0.5
        ),
    )


@pytest.fixture
def config(tmp_path: Path, tiny_decoder: DecoderSettings) -> GenerateConfig:
    return generate_config(tmp_path, tiny_decoder)


NO_GATE = GateSettings(max_p_value=None, max_filtered=None, max_duplicates=None, max_drop=None, max_rise=None)


def versions_of(config: GenerateConfig) -> dict[str, str]:
    return identify_models(config, identify_decoder(config.decoder)).versions


def run_of(config: GenerateConfig, fencing_token: int = 1) -> Run:
    return Run(
        root=config.catalog,
        run_date=config.date().isoformat(),
        run_id=config.run_id or new_run_id(),
        fencing_token=fencing_token,
    )


def context_of(config: GenerateConfig, run: Run | None = None) -> RunContext:
    """Return the context of a run in this process."""
    decoder = identify_decoder(config.decoder)
    return RunContext(
        config=config,
        run=run or run_of(config),
        models=identify_models(config, decoder),
        previous=published(config.catalog),
        requested=check_request(config, decoder),
        began_at=datetime.now(UTC),
        in_process=True,
    )


def decide(config: GenerateConfig, run: Run, histories: Histories | None = None) -> Decisions:
    return decide_all(context_of(config, run), histories, lambda: None)


def plan(config: GenerateConfig, request: pa.Table, histories: Histories | None = None) -> pa.Table:
    """Plan the items of a request in this process; return them."""
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(request, f"{folder}/request.parquet")
        config = config.model_copy(
            update={"request": f"{folder}/request.parquet", "catalog": f"{folder}/catalog"}
        )
        context = context_of(config)
        plan_items(context, histories, decide_all(context, histories, lambda: None), Progress())
        return planned_items(context.run)


def planned_items(run: Run) -> pa.Table:
    """Return the rows of a complete plan."""
    parts = [read_table(f"{run.work}/{part.path}", "plan") for part in read_plan(run)]
    return pa.concat_tables(parts) if parts else schemas.plan(D).empty_table()


class Prepared(NamedTuple):
    """A run whose images are rendered."""

    context: RunContext
    decisions: Decisions
    rendered: Rendered

    @property
    def run(self) -> Run:
        return self.context.run


def prepare(config: GenerateConfig, *, break_first: bool = False) -> Prepared:
    """Decide, plan and render a run in this process. With `break_first`, the first planned item fails."""
    context = context_of(config)
    decisions = write_plan(context, break_first=break_first)
    rendered = render_all(context, decisions, Progress(), deadline=None, retry_failed=False)
    return Prepared(context, decisions, rendered)


def write_plan(context: RunContext, *, break_first: bool = False) -> Decisions:
    """Decide and plan a run in this process."""
    histories = request_histories(context.config, context.run)
    decisions = decide_all(context, histories, lambda: None)
    plan_items(context, histories, decisions, Progress())
    if break_first:
        break_first_item(context.run)
    return decisions


def break_first_item(run: Run) -> None:
    """Give the first planned item an embedding that no decoder can draw, and record the changed file."""
    values = read_record(run.plan_marker) or {}
    part = values["parts"][0]
    uri = f"{run.work}/{part['path']}"
    planned = read_table(uri, "plan")
    embeds = planned["image_embeds"].combine_chunks().flatten().to_numpy().copy()
    embeds[0] = np.nan
    index = planned.column_names.index("image_embeds")
    kind = planned.schema.field(index).type
    broken = planned.set_column(
        index,
        planned.schema.field(index),
        pa.FixedSizeListArray.from_arrays(pa.array(embeds), type=kind),
    )
    part |= write_table(broken, uri, row_group_size=100, embed_column="image_embeds")
    write_record(values, run.plan_marker)


def render_rows(context: RunContext, shard: int, planned: pa.Table, attempt: int = 0) -> list[PartRecord]:
    """Render planned items of a shard as one attempt; return the records of the written files."""
    writer = WriteParts(
        root=context.run.root,
        folder=context.run.images,
        by=("bucket",),
        fencing_token=1,
        row_group_size=100,
        records=context.run.records(shard),
        metadata=schemas.IMAGES.metadata,
        shard=shard,
        attempt=attempt,
    )
    records = writer(RenderImages(context.config.decoder)(planned)).to_pylist()
    return [PartRecord.from_dict(record) for record in records]


def assembled(
    config: GenerateConfig, prepared: Prepared, *, requested: int | None = None, error_budget: float = 0.0
) -> Manifest:
    """Assemble a prepared run and write its manifest, without publishing; return the manifest."""
    context = replace(
        prepared.context,
        config=config.model_copy(update={"error_budget": error_budget}),
        requested=prepared.context.requested if requested is None else requested,
        previous=published(config.catalog),
    )
    progress = Progress()
    with progress.stage("assemble"):
        tables = assemble(context, prepared.decisions, prepared.rendered, lambda: None)
        manifest = describe_snapshot(context, prepared.decisions, tables, None, progress)
    write_json(manifest.model_dump(), context.run.manifest)
    return manifest


def snapshot_of(config: GenerateConfig, *, error_budget: float = 0.0) -> Manifest:
    """Run and publish one night in this process, without a quality gate; return its manifest."""
    config = config.model_copy(update={"error_budget": error_budget, "gate": NO_GATE})
    return generate_catalog(config, in_process=True).manifest


def synthetic_manifest(run: Run, files: FileList, **changes: Any) -> Manifest:
    """Return a manifest without a run: all counts are zero, and `changes` replace fields."""
    counts = dict.fromkeys(Counts.model_fields, 0)
    values = {
        "schema_version": schemas.SCHEMA_VERSION,
        "run_id": run.run_id,
        "run_date": run.run_date,
        "fencing_token": run.fencing_token,
        "created_at": "2026-01-01T00:00:00+00:00",
        "previous_run_id": None,
        "previous_path": None,
        "counts": Counts(**counts),
        "decisions": DecisionCounts(planned_users=0, planned_items=0, shards=0),
        "carried_buckets": 0,
        "figures": GateFigures(failed=0.0, filtered=0.0, judged_items=0),
        "versions": {},
        "decoder_weights": {},
        "embed_dim": D,
        "num_buckets": 1,
        "next_file": 0,
        "bytes": 0,
        "bytes_written": 0,
        "files": files,
        "measured": Measured(stages={"assemble": StageFigures(seconds=0.0)}),
    }
    return Manifest(**{**values, **changes})


def without_id(root: str) -> Pointer:
    """Return the pointer without the random id of its catalog."""
    return replace(read_pointer(root)[0], catalog_id=None)


def publish(root: str, run: Run) -> None:
    with hold_lease(root, run.run_id, 60) as lease:
        lease.publish(run_id=run.run_id, run_date=run.run_date, snapshot=run.snapshot)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with seaweedfs(tmp_path_factory.mktemp("s3")) as environment:
        yield environment
