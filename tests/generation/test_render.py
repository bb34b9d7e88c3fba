"""Rendering with a decoder whose files are replaced meanwhile."""

import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import LayoutSettings
from rebeca_ray.errors import InputError
from rebeca_ray.generation import render
from rebeca_ray.generation.parts import BusyClock
from rebeca_ray.generation.progress import Progress
from rebeca_ray.generation.render import RenderImages, render_all, rows_per_call
from rebeca_ray.storage.objects import JsonObject
from rebeca_ray.storage.records import read_record
from tests.conftest import context_of, versions_of, write_plan
from tests.generation.light_render import LightRender


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


def test_the_plan_is_read_once_for_all_shards(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(config.model_copy(update={"layout": LayoutSettings(items_per_shard=6)}))
    decisions = write_plan(context)
    reads: list[str] = []
    monkeypatch.setattr(render, "RenderImages", LightRender)

    def counted(uri: str) -> JsonObject | None:
        reads.append(uri)
        return read_record(uri)

    monkeypatch.setattr("rebeca_ray.generation.plan.read_record", counted)
    rendered = render_all(context, decisions, Progress(), deadline=None, retry_failed=False)
    assert (decisions.shards, reads) == (3, [context.run.plan_marker])
    assert sum(record.rows for record in rendered.files) == decisions.planned_items == 16


def test_the_time_of_overlapping_calls_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runs from 0 to 10, B from 5 to 20, C from 6 to 8, and D, after all of them, from 30 to 34."""
    clock, times = BusyClock(), iter([0.0, 5.0, 6.0, 8.0, 10.0, 20.0, 30.0, 34.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    for _ in "ABC":
        clock.start()
    assert [clock.stop() for _ in "CAB"] == [8.0, 2.0, 10.0]
    clock.start()
    assert clock.stop() == 4.0


@pytest.mark.parametrize(
    ("settings", "images", "rows"),
    [
        ({"device": "cpu", "num_actors": 1}, 2_000_000, 16),  # such calls are long already
        ({"device": "cuda", "num_actors": 1}, 100, 64),  # four batches
        ({"device": "cuda", "num_actors": 1000}, 2_000_000, 112),  # 18 calls for each actor
        ({"device": "cuda", "num_actors": 8}, 2_000_000, 256),  # sixteen batches
        ({"device": "cpu", "num_actors": 1, "backend": "triton"}, 2_000_000, 256),
    ],
)
def test_many_images_mean_long_calls_of_a_gpu_or_a_server(
    settings: dict[str, object], images: int, rows: int
) -> None:
    decoder = DecoderSettings(model="any", batch_size=16, dtype="float32").model_copy(update=settings)
    assert rows_per_call(decoder, images) == rows
