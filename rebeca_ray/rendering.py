"""Rendering: planned items become encoded images in Parquet files. One Ray Data graph.

work/…/plan -> decode and encode -> images/run_id=…/bucket=…/part-<epoch>-*.parquet
"""

import os
import sys
from dataclasses import asdict

import pyarrow as pa
import pyarrow.fs
from ray.data.datasource import FilenameProvider

from rebeca_ray import identity, schemas
from rebeca_ray.catalog.layout import Run
from rebeca_ray.config import GenerateConfig
from rebeca_ray.decoding import DecodedImage, Rows, ServerLostError, build_decoder, check_decoder
from rebeca_ray.settings import DecoderSettings
from rebeca_ray.storage import ChecksumHandler, arrow_filesystem, join, open_filesystem

ROW_GROUP = 100
BATCHES_A_CALL = 4  # of a server, which waits for nothing but between calls
IMAGES_A_FILE = 256  # some 100 MB of 512-pixel PNG


def render_items(config: GenerateConfig, run: Run) -> None:
    """Draw every planned item. A row that fails keeps its place, with a null image and the reason."""
    import ray

    filesystem, plan_path = open_filesystem(run.plan)
    image_filesystem, image_path = open_filesystem(join(run.root, run.images))
    decoder, served = config.decoder, config.decoder.backend == "triton"
    rows = decoder.batch_size * (BATCHES_A_CALL if served else 1)
    (
        ray.data.read_parquet(plan_path, filesystem=arrow_filesystem(filesystem))
        .select_columns(["item_id", "image_embeds", "prompt", "negative_prompt"])
        .repartition(target_num_rows_per_block=rows)
        .map_batches(
            RenderImages,
            fn_constructor_args=(decoder,),
            batch_size=rows,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=decoder.num_actors),
            num_cpus=decoder.cpus_per_actor,
            num_gpus=0 if served or decoder.device == "cpu" else 1,
            resources={"decoder_slot": 1} if served else None,
        )
        .write_parquet(
            image_path,
            filesystem=pyarrow.fs.PyFileSystem(ChecksumHandler(image_filesystem, run.checksums)),
            filename_provider=PartNames(run.epoch),
            min_rows_per_file=IMAGES_A_FILE,
            row_group_size=ROW_GROUP,
            compression="zstd",
            use_dictionary=["item_id"],
            write_statistics=["item_id"],
        )
    )


def check_renderer(decoder: DecoderSettings) -> None:
    """Where a render actor would run, see whether its server or its safety checker is there, before anything is planned."""
    if decoder.backend == "local" and not decoder.safety.checker:
        return
    import ray

    served = decoder.backend == "triton"
    needed = {
        "num_cpus": decoder.cpus_per_actor,
        "num_gpus": 0 if served or decoder.device == "cpu" else 1,  # a checker may be on the GPU
        "resources": {"decoder_slot": 1.0} if served else {},
    }
    work = ray.remote(max_retries=0)(check_decoder).options(**needed)
    try:
        ray.get(work.remote(decoder))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


class PartNames(FilenameProvider):
    """`part-<epoch>-<write>-<task>.parquet`: a retried task writes over its own file."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
        return f"part-{self.epoch:06d}-{write_uuid}-{task_index:06d}.parquet"


class RenderImages:
    """One planned row in, one row of `schemas.IMAGES` out, in the same order."""

    def __init__(self, settings: DecoderSettings) -> None:
        self.settings, self.decoder = settings, build_decoder(settings)

    def __call__(self, batch: pa.Table) -> pa.Table:
        item_ids = batch["item_id"].to_pylist()
        rows = Rows.of(
            self.settings,
            batch["image_embeds"].combine_chunks().flatten().to_numpy().reshape(batch.num_rows, -1),
            [identity.image_seed(item) for item in item_ids],
            batch["prompt"].to_pylist(),
            batch["negative_prompt"].to_pylist(),
        )
        kind = self.settings.image_format.lower()
        images = [
            {**asdict(drawn), "item_id": item, "image": drawn.image and {"bytes": drawn.image, "path": f"{item}.{kind}"}}
            for item, drawn in zip(item_ids, self.decode(rows), strict=True)
        ]
        assert len(images) == batch.num_rows
        return pa.Table.from_pylist(images, schema=schemas.IMAGES)

    def decode(self, rows: Rows) -> list[DecodedImage]:
        """An actor whose server is lost ends, so that Ray starts another where a decoder slot is free, and tries these rows again."""
        try:
            return self.decoder.decode(rows)
        except ServerLostError as error:
            print(f"render actor ends: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # an exception would fail the run, and Ray takes a polite exit for the actor's own wish
