"""Draw the images of embeddings with datasets, accelerate and diffusers: the plain loop.

accelerate launch --cpu --num_processes 2 tests/bench/plain_accelerate.py EMBEDDINGS OUT MODEL ROWS_PER_BATCH
"""

import io
import sys

import accelerate
import datasets
import diffusers
import pyarrow as pa
import pyarrow.parquet as pq
import torch


def main(embeddings: str, out: str, model: str, size: int) -> None:
    state = accelerate.PartialState(cpu=True)
    torch.set_num_threads(1)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None, dtype=torch.float32)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.load_ip_adapter(
        model, subfolder="ip_adapter", weight_name="ip-adapter.safetensors", image_encoder_folder=None
    )
    pipe.set_progress_bar_config(disable=True)
    rows = datasets.load_dataset("parquet", data_files=embeddings, split="train").with_format("torch")
    drawn = []
    with state.split_between_processes(range(len(rows))) as numbers:
        for start in range(0, len(numbers), size):
            batch = rows[list(numbers[start : start + size])]
            embeds = batch["image_embeds"][:, None]
            images = pipe(
                prompt=[""] * len(embeds),
                ip_adapter_image_embeds=[torch.cat([torch.zeros_like(embeds), embeds])],
                generator=[torch.Generator().manual_seed(int(seed)) for seed in batch["seed"]],
                num_inference_steps=5,
                guidance_scale=3.0,
            ).images
            for item, image in zip(batch["item_id"], images, strict=True):
                image.save(file := io.BytesIO(), "PNG")
                drawn.append({"item_id": item, "image": file.getvalue()})
    pq.write_table(pa.Table.from_pylist(drawn), f"{out}/{state.process_index}.parquet")


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
