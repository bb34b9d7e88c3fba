"""The exact configuration of Stable Diffusion 1.5, with random weights, draws as the pipeline does."""

import shutil
from pathlib import Path

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.files import identify_decoder
from tests.decoder.test_denoising import loop_for, pipeline_image, psnr, rows_for
from tests.gpu.sd15 import EMBED_DIM, write_sd15


def test_a_row_of_a_batch_equals_the_pipeline(tmp_path: Path) -> None:
    sd15 = DecoderSettings(
        model=str(write_sd15(tmp_path)), num_inference_steps=2, image_size=64, decoder_guidance_scale=5.0
    )
    assert identify_decoder(sd15).embed_dim == EMBED_DIM
    rows = rows_for(sd15, EMBED_DIM).take([0, 1])
    images, finite = loop_for(sd15).draw(rows)
    assert finite.all()
    assert images.shape == (2, 64, 64, 3)
    assert psnr(images[1] / 255.0, pipeline_image(sd15, rows, 1)) >= 45
    assert psnr(images[0] / 255.0, images[1] / 255.0) < 30
    shutil.rmtree(tmp_path)  # 2 GB
