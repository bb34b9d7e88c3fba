"""Rendering with a decoder whose files are replaced meanwhile."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.errors import InputError
from rebeca_ray.generation.progress import Progress
from rebeca_ray.generation.render import RenderImages, render_all
from tests.conftest import context_of, versions_of, write_plan


def test_a_decoder_that_is_replaced_while_rendering_is_refused(
    config: GenerateConfig, tmp_path: Path
) -> None:
    shutil.copytree(config.decoder.model, tmp_path / "decoder")
    decoder = config.decoder.model_copy(update={"model": str(tmp_path / "decoder")})
    context = context_of(config.model_copy(update={"decoder": decoder}))
    decisions = write_plan(context)
    RenderImages(decoder, fingerprint=versions_of(context.config)["decoder"])
    adapter = tmp_path / "decoder" / "ip_adapter" / "ip-adapter.safetensors"
    weights = load_file(adapter)
    weights["image_proj.proj.bias"][0] += 1
    save_file(weights, adapter)
    with pytest.raises(
        InputError, match=rf"decoder {tmp_path}/decoder: was replaced while this run was rendering; run again"
    ):
        render_all(context, decisions, Progress(), deadline=None, retry_failed=False)
