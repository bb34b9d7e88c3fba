"""Draw the images of embeddings with Ray Data and diffusers: the shortest honest script.

python tests/bench/plain_ray_data.py EMBEDDINGS OUT MODEL ROWS_PER_BATCH
"""

import io
import sys

import diffusers
import numpy as np
import ray
import torch


class Draw:
    def __init__(self, model: str) -> None:
        self.pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            model, safety_checker=None, dtype=torch.float32
        )
        self.pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.load_ip_adapter(
            model, subfolder="ip_adapter", weight_name="ip-adapter.safetensors", image_encoder_folder=None
        )
        self.pipe.set_progress_bar_config(disable=True)
        torch.set_num_threads(1)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        embeds = torch.from_numpy(np.stack(batch["image_embeds"]))[:, None]
        images = self.pipe(
            prompt=[""] * len(embeds),
            ip_adapter_image_embeds=[torch.cat([torch.zeros_like(embeds), embeds])],
            generator=[torch.Generator().manual_seed(int(seed)) for seed in batch["seed"]],
            num_inference_steps=5,
            guidance_scale=3.0,
        ).images
        encoded = []
        for image in images:
            image.save(file := io.BytesIO(), "PNG")
            encoded.append(file.getvalue())
        return {"item_id": batch["item_id"], "image": np.array(encoded, object)}


if __name__ == "__main__":
    embeddings, out, model, rows = sys.argv[1:]
    dataset = ray.data.read_parquet(embeddings).repartition(target_num_rows_per_block=int(rows))
    drawn = dataset.map_batches(
        Draw,
        fn_constructor_args=(model,),
        batch_size=int(rows),
        num_cpus=0.5,
        compute=ray.data.ActorPoolStrategy(size=2),
    )
    drawn.write_parquet(out)
