"""Rendering: planned items become encoded images in Parquet files. One Ray Data graph.

work/…/plan -> decode and encode -> images/run_id=…/bucket=…/part-<epoch>-*.parquet
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
from ray.data.datasource import FilenameProvider

from rebeca_ray import identity, schemas
from rebeca_ray.catalog.layout import Run
from rebeca_ray.config import DecoderSettings, GenerateConfig
from rebeca_ray.errors import UserError
from rebeca_ray.storage import ChecksumHandler, arrow_filesystem, join, open_filesystem

ROW_GROUP = 100
IMAGES_A_FILE = 256  # some 100 MB of 512-pixel PNG


def render_items(config: GenerateConfig, run: Run) -> None:
    """Draw every planned item. A row that fails keeps its place, with a null image and the reason."""
    import ray

    filesystem, plan_path = open_filesystem(run.plan)
    image_filesystem, image_path = open_filesystem(join(run.root, run.images))
    decoder = config.decoder
    (
        ray.data.read_parquet(plan_path, filesystem=arrow_filesystem(filesystem))
        .select_columns(["item_id", "image_embeds", "prompt"])
        .repartition(target_num_rows_per_block=decoder.batch_size)
        .map_batches(
            RenderImages,
            fn_constructor_args=(decoder,),
            batch_size=decoder.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=decoder.num_actors),
            num_cpus=decoder.cpus_per_actor,
            num_gpus=1 if decoder.device == "cuda" else 0,
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


class PartNames(FilenameProvider):
    """`part-<epoch>-<write>-<task>.parquet`: a retried task writes over its own file."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
        return f"part-{self.epoch:06d}-{write_uuid}-{task_index:06d}.parquet"


class RenderImages:
    """One planned row in, one row of `schemas.IMAGES` out, in the same order."""

    def __init__(self, settings: DecoderSettings) -> None:
        from rebeca_ray.decoding import DiffusersDecoder  # here, so that processes that only read and write start without torch

        self.settings, self.decoder = settings, DiffusersDecoder(settings)

    def __call__(self, batch: pa.Table) -> pa.Table:
        item_ids, prompts = batch["item_id"].to_pylist(), batch["prompt"].to_pylist()
        embeds_BD = batch["image_embeds"].combine_chunks().flatten().to_numpy().reshape(batch.num_rows, -1)
        seeds = [identity.image_seed(item) for item in item_ids]
        finite = np.isfinite(embeds_BD).all(axis=1)
        rows: list[dict[str, Any]] = [
            {"item_id": item, "seed": seed, "error": None if ok else "image_embeds is not finite"}
            for item, seed, ok in zip(item_ids, seeds, finite, strict=True)
        ]
        for index, drawn in self.draw(np.flatnonzero(finite), embeds_BD, seeds, prompts):
            if isinstance(drawn, str):
                rows[index]["error"] = drawn
            else:
                rows[index].update(self.encode(item_ids[index], drawn))
        assert len(rows) == batch.num_rows
        return pa.Table.from_pylist(rows, schema=schemas.IMAGES)

    def draw(self, chosen: np.ndarray, embeds_BD: np.ndarray, seeds: list[int], prompts: list[str]) -> list[tuple[int, np.ndarray | str]]:
        """`(index, image or reason)` of every chosen row; a batch that raises is tried row by row."""
        import torch

        from rebeca_ray.decoding import NonFiniteImagesError

        if len(chosen) == 0:
            return []
        try:
            images = self.decoder.decode(embeds_BD[chosen], [seeds[i] for i in chosen], [prompts[i] for i in chosen])
            return list(zip(chosen.tolist(), images, strict=True))
        except NonFiniteImagesError as error:
            drawn = zip(chosen.tolist(), error.images, error.finite, strict=True)
            return [(index, image if ok else str(error)) for index, image, ok in drawn]
        except torch.OutOfMemoryError:
            raise UserError(
                f"decoder: {self.settings.batch_size} images at once do not fit the device's memory; lower decoder.batch_size"
            ) from None
        except torch.AcceleratorError:  # the device is lost, not the rows: stop the run instead of failing them all
            raise
        except RuntimeError as error:  # what torch and the decoder raise; anything else is our mistake and should stop the run
            if len(chosen) == 1:
                return [(int(chosen[0]), f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")]
            return [result for index in chosen for result in self.draw(np.array([index]), embeds_BD, seeds, prompts)]

    def encode(self, item_id: str, image_HWC: np.ndarray) -> dict[str, Any]:
        from rebeca_ray.decoding import encode_image

        kind, quality = self.settings.image_format, self.settings.image_quality
        return {
            "image": {"bytes": encode_image(image_HWC, kind, quality), "path": f"{item_id}.{kind.lower()}"},
            "thumbnail": encode_image(image_HWC, kind, quality, max_size=self.settings.thumbnail_size),
            "width": image_HWC.shape[1],
            "height": image_HWC.shape[0],
        }
