"""The decoder behind a real Triton server draws the same images; slow, lost and wrong servers are handled."""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tritonclient.grpc as grpcclient
import yaml
from tritonclient.utils import InferenceServerException

from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.config.decoder import DecoderSettings, SafetySettings, TritonSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.decoder.triton_client import MODEL, TritonDecoder, request_inputs
from rebeca_ray.decoder.triton_server import triton_server
from rebeca_ray.errors import ServerLostError, UserError
from rebeca_ray.generation.parts import BUSY
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.generation.render import RenderImages
from rebeca_ray.stickers.build.data import to_pixels
from tests.conftest import D, plan, prepare
from tests.seaweedfs import free_port

PORTS = ("http_port", "grpc_port", "metrics_port")


def served(settings: DecoderSettings, grpc_port: int, **triton: float) -> DecoderSettings:
    values = TritonSettings(
        url=f"127.0.0.1:{grpc_port}", **{"deadline_seconds": 60, "ready_seconds": 60, **triton}
    )
    return settings.model_copy(update={"backend": "triton", "triton": values})


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    return {name: free_port() for name in PORTS}


@pytest.fixture(scope="module")
def process(tiny_decoder: DecoderSettings, ports: dict[str, int]) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a server with the tiny decoder."""
    with triton_server(tiny_decoder, **ports, instances=1) as process:
        yield process


@pytest.fixture(scope="module")
def server(
    process: "subprocess.Popen[bytes]", tiny_decoder: DecoderSettings, ports: dict[str, int]
) -> DecoderSettings:
    """Return settings for a client of that server."""
    return served(tiny_decoder, ports["grpc_port"])


@pytest.fixture
def rows(tiny_decoder: DecoderSettings) -> Rows:
    embeds = np.random.default_rng(0).standard_normal((11, D)).astype(np.float32)
    words = ["", "noto food pizza", "日本"] * 3 + ["", ""]
    return Rows.of(tiny_decoder, embeds, range(11), words, words[::-1])


def test_the_server_draws_the_same_images_as_this_process(
    server: DecoderSettings, tiny_decoder: DecoderSettings, rows: Rows
) -> None:
    rows.image_embeds_BD[4, 0] = np.nan
    rows.guidance_scale_B[5], rows.ip_adapter_scale_B[6] = 2.0, 0.5
    drawn = TritonDecoder(server).decode(rows)
    assert drawn == LocalDecoder(tiny_decoder).decode(rows)
    assert drawn[4].error == "image_embeds is not finite"
    assert drawn[4].image is None


def test_a_server_with_another_family_draws_the_same_images_as_this_process(
    tiny_sdxl: DecoderSettings, rows: Rows
) -> None:
    other = {name: free_port() for name in PORTS}
    with triton_server(tiny_sdxl, **other, instances=1):
        drawn = TritonDecoder(served(tiny_sdxl, other["grpc_port"])).decode(rows)
    assert drawn == LocalDecoder(tiny_sdxl).decode(rows)
    assert all(outcome.image for outcome in drawn)


def test_requests_of_several_clients_share_batches_without_mixing(
    server: DecoderSettings, tiny_decoder: DecoderSettings, rows: Rows
) -> None:
    expected = LocalDecoder(tiny_decoder).decode(rows)
    clients = [TritonDecoder(server) for _ in range(3)]
    before = statistics(clients[0])
    answers: dict[int, object] = {}

    def ask(row: int) -> None:
        answers[row] = clients[row % 3].decode(rows.take([row]))[0]

    threads = [threading.Thread(target=ask, args=(row,)) for row in range(11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[row] for row in range(11)] == expected
    until = time.monotonic() + 10  # the server counts an answer after it is sent
    while (counted := statistics(clients[0]))[0] < before[0] + 11 and time.monotonic() < until:
        time.sleep(0.05)
    images, batches = (after - first for after, first in zip(counted, before, strict=True))
    assert images == 11
    assert batches < 11


def statistics(decoder: TritonDecoder) -> tuple[int, int]:
    """Return the number of images and of batches so far."""
    (model,) = decoder.client.get_inference_statistics(MODEL, as_json=True)["model_stats"]
    return int(model["inference_count"]), int(model["execution_count"])


def test_a_malformed_request_is_refused_alone(server: DecoderSettings, rows: Rows) -> None:
    client = grpcclient.InferenceServerClient(server.triton.url)
    inputs = {tensor.name(): tensor for tensor in request_inputs(rows.take([0]))}
    with pytest.raises(InferenceServerException, match="decoder: inputs image_embeds and seed are needed"):
        client.infer(MODEL, [tensor for name, tensor in inputs.items() if name != "seed"])
    wrong = grpcclient.InferInput("image_embeds", [1, D + 1], "FP32")
    wrong.set_data_from_numpy(np.zeros((1, D + 1), np.float32))
    with pytest.raises(
        InferenceServerException,
        match=rf"unexpected shape for input 'image_embeds'.*Expected \[-1,{D}\], got \[1,{D + 1}\]",
    ):
        client.infer(MODEL, [wrong, *(tensor for name, tensor in inputs.items() if name != "image_embeds")])
    with pytest.raises(InferenceServerException, match="decoder: seed -5 is negative"):
        client.infer(MODEL, request_inputs(replace(rows.take([0]), seeds=[-5])))
    words = grpcclient.InferInput("prompt", [1, 2], "UINT8")
    words.set_data_from_numpy(np.array([[0xFF, 0xFE]], np.uint8))
    with pytest.raises(InferenceServerException, match=r"decoder: 'utf-8' codec can't decode"):
        client.infer(MODEL, [words, *(tensor for name, tensor in inputs.items() if name != "prompt")])
    too_many = Rows.concatenate([rows.take([0])] * 5)
    with pytest.raises(InferenceServerException, match="batch-size must be <= 4"):
        client.infer(MODEL, request_inputs(too_many))
    short = client.infer(MODEL, [inputs["image_embeds"], inputs["seed"]])  # the rest is optional
    assert short.as_numpy("image_size")[0, 0] > 0


def test_shared_memory_traces_and_logs_are_closed(server: DecoderSettings, ports: dict[str, int]) -> None:
    client = grpcclient.InferenceServerClient(server.triton.url)
    for call in (
        client.get_system_shared_memory_status,
        client.get_cuda_shared_memory_status,
        lambda: client.register_system_shared_memory("all", "/psm", 8),
        client.unregister_system_shared_memory,
        client.get_trace_settings,
        lambda: client.update_trace_settings(settings={"trace_level": ["TENSORS"]}),
        client.get_log_settings,
        lambda: client.update_log_settings({"log_file": "/tmp/log"}),
    ):
        with pytest.raises(InferenceServerException, match="This protocol is restricted"):
            call()
    for path in ("systemsharedmemory/status", "cudasharedmemory/status", "trace/setting", "logging"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://127.0.0.1:{ports['http_port']}/v2/{path}", timeout=5)
        assert caught.value.code == 403


def test_a_refused_request_raises_an_input_error(server: DecoderSettings, rows: Rows) -> None:
    with pytest.raises(
        UserError, match=r"decoder.triton 127.0.0.1:\d+: .*unexpected shape for input 'image_embeds'"
    ):
        TritonDecoder(server).decode(replace(rows, image_embeds_BD=np.zeros((11, 3), np.float32)))


def test_a_server_that_marks_images_otherwise_is_refused(server: DecoderSettings) -> None:
    TritonDecoder(server.model_copy(update={"provenance": "c2pa"}))  # its caller signs
    with pytest.raises(UserError, match=r"with the provenance xmp, this config needs none; start the server"):
        TritonDecoder(server.model_copy(update={"provenance": "none"}))


def test_a_server_of_another_decoder_is_refused(server: DecoderSettings) -> None:
    with pytest.raises(
        UserError,
        match=r"serves another decoder than this config says \(they differ in num_inference_steps\); "
        "start the server with the same",
    ):
        TritonDecoder(server.model_copy(update={"num_inference_steps": 7}))


def test_a_missing_server_is_reported_with_the_remedy(tiny_decoder: DecoderSettings) -> None:
    with pytest.raises(
        ServerLostError,
        match=r"no server ready within 1 s \(.*refused.*\); "
        r"start one on every node that renders \(rebeca serve",
    ):
        TritonDecoder(served(tiny_decoder, free_port(), ready_seconds=1))


def test_the_client_waits_for_a_slow_server_and_then_gives_up(
    process: "subprocess.Popen[bytes]", server: DecoderSettings, rows: Rows
) -> None:
    port = int(server.triton.url.rpartition(":")[2])
    patient = TritonDecoder(served(server, port, deadline_seconds=5))
    hasty = TritonDecoder(served(server, port, deadline_seconds=1, ready_seconds=1))
    expected = patient.decode(rows)
    os.kill(process.pid, signal.SIGSTOP)
    threading.Timer(7, os.kill, (process.pid, signal.SIGCONT)).start()
    assert patient.decode(rows) == expected  # misses one deadline, then sends again
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(ServerLostError, match="Deadline Exceeded"):
            hasty.decode(rows)
    finally:
        os.kill(process.pid, signal.SIGCONT)


@pytest.mark.usefixtures("ray_local")
def test_both_backends_write_the_same_catalog(server: DecoderSettings, config: GenerateConfig) -> None:
    run = prepare(config).run  # plans and renders locally
    local = {
        row["item_id"]: row["image"]["bytes"] for row in pq.read_table(f"{run.root}/{run.images}").to_pylist()
    }
    through = config.model_copy(update={"catalog": f"{config.catalog}-triton", "decoder": server})
    assert generate_catalog(through).manifest.counts.new == len(local) == 16
    snapshot = read_catalog(through.catalog)
    items = snapshot.items()
    expected = [local[item] for item in items["item_id"].to_pylist()]
    assert np.abs(to_pixels(expected).astype(int) - to_pixels(snapshot.images(items))).max() <= 3


@pytest.mark.usefixtures("ray_local")
def test_a_render_actor_that_lost_its_server_is_restarted(
    process: "subprocess.Popen[bytes]", server: DecoderSettings, config: GenerateConfig
) -> None:
    """The options are those of Ray Data: an actor restarts, and its task is retried."""
    import ray

    planned = plan(config, pq.read_table(config.request)).select(
        ["item_id", "bucket", "image_embeds", "prompt", "negative_prompt"]
    )
    hasty = server.model_copy(
        update={"triton": server.triton.model_copy(update={"deadline_seconds": 1, "ready_seconds": 4})}
    )
    actor = ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=0.5)(RenderImages).remote(hasty)
    process_id = actor.__ray_call__.remote
    first, before = ray.get([actor.__call__.remote(planned), process_id(lambda self: os.getpid())])
    os.kill(process.pid, signal.SIGSTOP)
    threading.Timer(7, os.kill, (process.pid, signal.SIGCONT)).start()
    again, after = ray.get([actor.__call__.remote(planned), process_id(lambda self: os.getpid())])
    assert again.drop_columns([BUSY]) == first.drop_columns([BUSY])
    assert before != after
    ray.kill(actor)


def test_out_of_memory_on_the_server_halves_its_batch(tiny_decoder: DecoderSettings, rows: Rows) -> None:
    small = tiny_decoder.model_copy(update={"safety": SafetySettings(checker="tests.small_memory:checker")})
    ports = {name: free_port() for name in PORTS}
    with triton_server(small, **ports, instances=1):
        drawn = TritonDecoder(served(small, ports["grpc_port"])).decode(rows)
    assert [image.error for image in drawn] == [None] * 11
    assert all(image.image for image in drawn)


def test_an_unknown_engine_stops_the_server_and_names_the_reason(
    tiny_decoder: DecoderSettings, capfd: pytest.CaptureFixture[str]
) -> None:
    ports = {name: free_port() for name in PORTS}
    unknown = tiny_decoder.model_copy(update={"engine": "steam"})
    with (
        pytest.raises(UserError, match="tritonserver ended with code 1 before it was ready"),
        triton_server(unknown, **ports, instances=1),
    ):
        pass
    expected = "engine = 'steam': input should be 'torch', 'onnx', 'openvino' or 'tensorrt'"
    assert f"config.pbtxt: parameters: {expected}" in capfd.readouterr().err


@pytest.mark.usefixtures("process")
def test_a_taken_port_is_refused_at_start(tiny_decoder: DecoderSettings, ports: dict[str, int]) -> None:
    """Otherwise the server on that port would look like ours, and ready."""
    taken = {**{name: free_port() for name in PORTS}, "http_port": ports["http_port"]}
    refused = pytest.raises(
        UserError, match=rf"--http-port {ports['http_port']}: another process listens there"
    )
    with refused, triton_server(tiny_decoder, **taken, instances=1):
        pass


@pytest.mark.usefixtures("ray_local")
def test_a_missing_server_ends_the_run_before_planning(config: GenerateConfig) -> None:
    nowhere = served(config.decoder, free_port(), ready_seconds=1)
    with pytest.raises(ServerLostError, match="no server ready within 1 s"):
        generate_catalog(config.model_copy(update={"decoder": nowhere}))
    assert not (Path(config.catalog) / "work").exists()


def test_a_server_that_is_killed_and_restarted_loses_and_repeats_nothing(
    process: "subprocess.Popen[bytes]",
    server: DecoderSettings,
    tiny_decoder: DecoderSettings,
    ports: dict[str, int],
    rows: Rows,
    tmp_path: Path,
) -> None:
    """The last test of the server, which it kills. `rebeca serve` starts another in its place."""
    many = Rows.concatenate([rows] * 20)
    expected = LocalDecoder(tiny_decoder).decode(rows) * 20
    answers: list[object] = []
    decoder = TritonDecoder(server)
    before = statistics(decoder)[1]
    thread = threading.Thread(target=lambda: answers.extend(decoder.decode(many)))
    thread.start()
    while statistics(decoder)[1] < before + 5:
        time.sleep(0.01)
    backends = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    for backend in backends:  # it outlives its server and holds a gigabyte
        with suppress(ProcessLookupError):
            os.kill(int(backend), signal.SIGKILL)
    assert thread.is_alive()
    with rebeca_serve(tiny_decoder, ports, tmp_path) as line:
        assert f"ready: grpc 127.0.0.1:{ports['grpc_port']}" in line
        thread.join(60)
    assert answers == expected
    with pytest.raises(ServerLostError):
        TritonDecoder(served(tiny_decoder, ports["grpc_port"], ready_seconds=1))


@contextmanager
def rebeca_serve(decoder: DecoderSettings, ports: dict[str, int], folder: Path) -> Iterator[str]:
    """Run the command until SIGTERM, which it obeys; yield its first line, for which scripts wait."""
    values = decoder.model_dump(mode="json", exclude_defaults=True)
    config = folder / "c.yaml"
    config.write_text(yaml.safe_dump({"prior": "p", "request": "r", "catalog": "c", "decoder": values}))
    options = [part for name, port in ports.items() for part in (f"--{name.replace('_', '-')}", str(port))]
    command = [Path(sys.executable).parent / "rebeca", "serve", "--config", config, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline()
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    assert code == 0
