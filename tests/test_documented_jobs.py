"""The jobs, the gallery and the exports of the pages run as they stand, beside configs of tiny models."""

import functools
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import uvicorn
import yaml
from pydantic import BaseModel

from rebeca_ray import nightly
from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.decoder import export
from rebeca_ray.decoder.interface import DecodedImage
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.errors import ResumableError
from rebeca_ray.evaluation import quantization
from rebeca_ray.gallery import serve
from rebeca_ray.generation import pipeline
from rebeca_ray.prior.checkpoint import load_prior
from tests.conftest import NO_GATE, USERS
from tests.test_documented_commands import (
    DISTILL,
    ESTIMATE,
    EXPORT,
    GALLERY,
    GENERATE,
    NIGHTLY,
    TRAIN,
    code_of,
    run,
)
from tests.test_documented_commands import nights as nights  # a fixture
from tests.training.conftest import world as world  # a fixture
from tests.training.in_process import loop_in_process as loop_in_process  # a fixture
from tests.training.small_world import configure, training_csv
from tests.training.test_distill import history_world


def write_yaml(path: str, config: BaseModel) -> None:
    Path(path).write_text(yaml.safe_dump(config.model_dump(mode="json")))


@pytest.fixture
def here(config: GenerateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GenerateConfig:
    """Work beside `generate.yaml`, with all stages in this process; return the config. It has no gate."""
    monkeypatch.chdir(tmp_path)
    in_process = functools.partial(pipeline.generate_catalog, in_process=True)
    monkeypatch.setattr(pipeline, "generate_catalog", in_process)
    monkeypatch.setattr(nightly, "generate_catalog", in_process)
    config = config.model_copy(update={"gate": NO_GATE})
    write_yaml("generate.yaml", config)
    return config


def end_early(option: str, config: GenerateConfig, patch: pytest.MonkeyPatch) -> int:
    """Prepare the run that an option is for: stopped, with failed items, or refused. Return its exit code."""
    decode = LocalDecoder.decode

    def stop(*_: object) -> None:
        raise ResumableError("stopped")

    def fail_first(decoder: LocalDecoder, rows: Any) -> list[DecodedImage]:
        return [DecodedImage(seed=1, error="bad luck"), *decode(decoder, rows)[1:]]

    if option == "--resume require":
        patch.setattr(pipeline, "assemble", stop)
        return 75
    if option == "--retry-failed":
        patch.setattr(LocalDecoder, "decode", fail_first)
        return 3
    gate = NO_GATE.model_copy(update={"min_items": 1000})
    write_yaml("generate.yaml", config.model_copy(update={"gate": gate}))
    return 4


@pytest.mark.parametrize("command", GENERATE)
def test_the_generate_commands_publish(
    command: str, here: GenerateConfig, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if "/models/decoder" in command:
        command = command.replace("/models/decoder", request.getfixturevalue("exported").engine_dir)
    if option := re.search(r" (--resume require|--retry-failed|--force)$", command):
        with monkeypatch.context() as patch:
            code = end_early(option[1], here, patch)
            assert code_of(command.removesuffix(option[0]))[0] == code
    run(command)
    manifest = read_catalog(here.catalog).manifest
    new = 44 if "num_images=10" in command else 16
    assert (manifest.counts.new, manifest.counts.failed) == (new, 0)
    assert manifest.gate.forced == ("--force" in command)


@pytest.mark.usefixtures("here")
def test_the_nights_of_two_dates_and_an_estimate_run() -> None:
    assert len(NIGHTLY) == 2
    assert len(ESTIMATE) == 1
    Path("nightly.yaml").write_text("generate: generate.yaml\ncatch_up: 0\n")
    for command in NIGHTLY:
        run(command)
        if "run_date=" in command:
            assert read_catalog("catalog").manifest.run_date == "2026-03-02"
    assert read_catalog("catalog").manifest.run_date > "2026-03-02"
    assert re.search(r"requested items +│ 16 ", run(ESTIMATE[0]))


@pytest.mark.usefixtures("loop_in_process")
def test_training_runs(world: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = TRAIN
    monkeypatch.chdir(world["folder"])
    config = configure(world, samples_per_user=64)
    write_yaml("train.yaml", config)
    run(command)
    assert config.optimization.max_epochs == 6
    assert 6 < len(training_csv(config)) - 1 <= 50  # it may stop early


def test_distillation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = DISTILL
    monkeypatch.chdir(tmp_path)
    config = history_world(tmp_path)
    write_yaml("distill.yaml", config)
    run(command)
    assert load_prior(config.out).sampling.distilled_steps == 4


@pytest.fixture
def stop_signals() -> Iterator[None]:
    """Restore the handler of SIGTERM, which a server replaces."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.usefixtures("stop_signals")
def test_the_gallery_serves_and_stops(
    here: GenerateConfig, nights: list[Snapshot], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start each on a free port, fetch its first page, and stop it."""
    ratings = {"user_id": USERS[:2], "item_id": ["a", "b"], "rating": pa.array([5, 4], pa.float32())}
    pq.write_table(pa.table(ratings), "interactions.parquet")
    interactions = InteractionSettings(path=str(Path("interactions.parquet").absolute()))
    write_yaml("generate.yaml", here.model_copy(update={"interactions": interactions}))
    pages, serve_gallery = list[str](), serve.serve
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())  # which keeps a token

    class OnePage(uvicorn.Server):
        """A server that ends after its first page. A signal would end the test's process too."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            (listening,) = sockets or []
            threading.Thread(target=self.fetch, args=[addresses[listening.fileno()]]).start()

        def fetch(self, url: str) -> None:
            try:
                with browser.open(url, timeout=60) as page:
                    pages.append(page.read().decode())
            finally:
                self.should_exit = True

    addresses: dict[int, str] = {}

    def serve_once(gallery: Any, listening: serve.Listening) -> None:
        addresses[listening.server.fileno()] = listening.url
        serve_gallery(gallery, listening)

    monkeypatch.setattr(serve, "serve", serve_once)
    monkeypatch.setattr(uvicorn, "Server", OnePage)
    assert len(GALLERY) >= 5
    for number, command in enumerate(GALLERY, start=1):
        for written in ("~/rebeca-stickers/", "s3://bucket/"):
            command = command.replace(written, "")
        command = command.replace("candidate", "catalog")
        assert run(f"{command} --bind 127.0.0.1:0").endswith("stopped\n")
        assert len(pages) == number, command
        assert all(user in pages[-1] for user in USERS[:3])


def test_the_gallery_ends_on_sigterm(nights: list[Snapshot]) -> None:
    command = [str(Path(sys.executable).parent / "rebeca"), "gallery", nights[0].root, "--bind=127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "http://127.0.0.1:" in process.stdout.readline()
        process.terminate()
        assert process.stdout.read().endswith("stopped\n")  # a signal while it prints may repeat the line
    assert process.returncode == 0


def test_the_exports_get_decoder_folder_and_items(
    here: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tests/decoder/test_export.py` and `tests/evaluation/test_quantization.py` run the work itself."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(export, "export_decoder", lambda *given: calls.append(given))
    cosines = quantization.Cosines(float32=0.9, int8=0.8)
    monkeypatch.setattr(quantization, "export_quantized", lambda *given: calls.append(given) or cosines)
    plain, quantized = EXPORT
    assert run(plain) == "exported decoder -> /models/decoder\n"
    assert "0.8" in run(quantized)
    assert calls == [
        (here.decoder, Path("/models/decoder")),
        (here.decoder, Path("/models/decoder-int8"), "/data/items"),
    ]
