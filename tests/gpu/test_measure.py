"""The measurement of a GPU, tested on a CPU: exact configurations, figures, time limits, no need of Ray."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rebeca_ray.decoder.families import sd, sdxl
from tests.bench.gpu_report import GpuReport, count_tflop
from tests.gpu.measure import run_part
from tests.gpu.sd15 import CONTEXT, EMBED_DIM, attach_adapter, build_sd15
from tests.gpu.sdxl import build_sdxl, sdxl_unet


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_stable_diffusion_1_5_has_its_published_size_and_work() -> None:
    pipeline = build_sd15("meta")
    assert parameters(pipeline.unet) == 859_520_964
    attach_adapter(pipeline, CONTEXT)
    projection = sd.take_projection(pipeline.unet)
    image_BKH = projection(torch.zeros((1, EMBED_DIM), device="meta", dtype=torch.float16))
    unet = sd.ConditionedUNet(pipeline.unet)
    text_BLH, scale_B = image_BKH.new_zeros((1, 77, 768)), image_BKH.new_zeros(1)
    latents = image_BKH.new_zeros((1, 4, 64, 64))
    inputs = (latents, scale_B, text_BLH, image_BKH, scale_B)
    shapes = []
    assert count_tflop(lambda: shapes.append(unet(*inputs).shape)) == pytest.approx(0.8036, abs=1e-4)
    assert shapes == [latents.shape]
    assert count_tflop(lambda: sd.VaeDecoder(pipeline.vae)(latents)) == pytest.approx(2.515, abs=1e-3)


def test_stable_diffusion_xl_has_its_published_size_and_work() -> None:
    pipeline = build_sdxl("meta")
    assert parameters(pipeline.text_encoder_2) == 694_659_840
    assert parameters(sdxl_unet("meta")) == 2_567_463_684  # the pipeline's has an adapter too
    projection = sd.take_projection(pipeline.unet)
    image_BKH = projection(torch.zeros((1, EMBED_DIM), device="meta", dtype=torch.float16))
    unet = sdxl.ConditionedUNet(pipeline.unet)
    text_BLH, scale_B = image_BKH.new_zeros((1, 77, 2048)), image_BKH.new_zeros(1)
    pooled_BP, time_ids_BT = image_BKH.new_zeros((1, 1280)), image_BKH.new_zeros((1, 6))
    latents = image_BKH.new_zeros((1, 4, 128, 128))
    inputs = (latents, scale_B, text_BLH, pooled_BP, time_ids_BT, image_BKH, scale_B)
    shapes = []
    # 2.99 of the published 10^12 multiply-adds are 5.98, and attention's products are not among them.
    assert count_tflop(lambda: shapes.append(unet(*inputs).shape)) == pytest.approx(6.7656, abs=1e-4)
    assert shapes == [latents.shape]


def test_work_is_two_per_multiplication_also_in_inference_mode() -> None:
    layer, rows = nn.Linear(30, 50, bias=False), torch.zeros(20, 30)
    with torch.inference_mode():
        assert count_tflop(lambda: layer(rows)) == 2 * 20 * 30 * 50 / 1e12


def test_an_error_and_a_later_process_leave_the_figures_before_them(tmp_path: Path) -> None:
    def no_memory() -> float:
        raise torch.OutOfMemoryError("no memory for 32 images")

    first = GpuReport(tmp_path, tiny=True)
    first.write({**first.read(), "roofline_tflops": 10.0})
    labels = {"model": "sd15", "variant": "torch"}
    first.measure({**labels, "batch": 1}, tflop=0.5, warm=list, rate=lambda: 4.0)
    first.measure({**labels, "batch": 32}, tflop=0.5, warm=list, rate=no_memory)
    later = GpuReport(tmp_path, tiny=True)
    later.measure({**labels, "batch": 1}, tflop=0.5, warm=list, rate=lambda: 6.0)
    later.add_part("sd15", "done", 1.25)
    (file,) = tmp_path.iterdir()
    report = json.loads(file.read_text())
    assert report["torch"] == torch.__version__
    assert report["parts"] == {"sd15": {"outcome": "done", "seconds": 1.2}}
    measured = {"per_second": 6.0, "tflop_per_item": 0.5, "tflops": 3.0, "roofline_share": 0.3}
    assert report["figures"] == [
        {**labels, "batch": 32, "error": "no memory for 32 images"},
        {**labels, "batch": 1, **measured},
    ]
    later.print()  # both kinds of figures fit the table


@pytest.mark.parametrize(
    ("program", "seconds", "outcome"),
    [
        ("pass", 100, "done"),
        ("raise SystemExit(3)", 100, "failed with exit status 3"),
        ("import time; time.sleep(600)", 1, "stopped after 1 s"),
    ],
)
def test_a_part_ends_in_its_time(program: str, seconds: float, outcome: str) -> None:
    assert run_part([sys.executable, "-c", program], seconds) == outcome


def test_the_measurement_runs_without_ray() -> None:
    program = (
        "import sys; sys.modules['ray'] = None\n"
        "import tests.gpu.measure, tests.gpu.test_decoding\n"
        "import tests.bench.decoding_gpu, tests.bench.sampling_gpu\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)
