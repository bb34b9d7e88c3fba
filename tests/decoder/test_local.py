"""The decoder in this process: a failure costs its row alone, and no unsafe or black image is returned."""

import io
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from rebeca_ray.config.decoder import DecoderSettings, SafetySettings
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.decoder.safety import load_checker
from rebeca_ray.errors import UserError
from rebeca_ray.identity import retry_seed
from tests.conftest import D


@pytest.fixture
def decoder(tiny_decoder: DecoderSettings) -> LocalDecoder:
    return LocalDecoder(tiny_decoder)


def rows_for(settings: DecoderSettings, count: int = 6) -> Rows:
    return Rows.of(
        settings, np.random.default_rng(0).standard_normal((count, D)).astype(np.float32), range(count)
    )


def pixels(image: bytes | None) -> np.ndarray:
    assert image is not None
    return np.asarray(Image.open(io.BytesIO(image)))


def test_an_image_does_not_depend_on_other_rows_or_the_tile(decoder: LocalDecoder) -> None:
    rows = rows_for(decoder.settings)
    together = decoder.decode(rows)
    assert [drawn.seed for drawn in together] == list(rows.seeds)
    assert {(drawn.width, drawn.height, drawn.error) for drawn in together} == {(16, 16, None)}
    assert pixels(together[0].thumbnail).shape == (8, 8, 3)
    for row in range(6):
        assert decoder.decode(rows.take([row])) == [together[row]]


def test_embeddings_that_are_not_finite_get_an_error(decoder: LocalDecoder) -> None:
    rows = rows_for(decoder.settings)
    rows.image_embeds_BD[2, 3] = np.nan
    drawn = decoder.decode(rows)
    assert [image.error for image in drawn] == [None, None, "image_embeds is not finite", None, None, None]
    assert [image.image is None for image in drawn] == [False, False, True, False, False, False]


def test_a_tile_that_fails_costs_only_the_row_at_fault(
    decoder: LocalDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = decoder.loop.draw

    def picky(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        if "bad" in rows.prompts:
            raise RuntimeError("out of\nluck")
        return whole(rows)

    monkeypatch.setattr(decoder.loop, "draw", picky)
    rows = replace(rows_for(decoder.settings), prompts=["", "bad", "", "", "", ""])
    assert [image.error for image in decoder.decode(rows)] == [
        None,
        "RuntimeError: out of luck",
        None,
        None,
        None,
        None,
    ]


def test_an_overflow_draws_no_black_image_and_nothing_twice(decoder: LocalDecoder) -> None:
    tiles = []

    def overflow_in_the_second_row(
        module: torch.nn.Module, inputs: tuple[torch.Tensor], drawn: torch.Tensor
    ) -> None:
        tiles.append(len(drawn))
        drawn[1, 0, 3, 3] = torch.inf

    vae = decoder.loop.networks.vae_decoder.vae  # type: ignore[attr-defined]
    vae.decoder.conv_out.register_forward_hook(overflow_in_the_second_row)
    drawn = decoder.decode(rows_for(decoder.settings, 3))
    assert [image.error for image in drawn] == [
        None,
        "the decoder drew values that are not finite in float32",
        None,
    ]
    assert drawn[1].image is None
    assert tiles == [decoder.settings.batch_size]


@pytest.mark.parametrize(
    "memory",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_halves_the_tile_and_reports_it(
    decoder: LocalDecoder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    memory: RuntimeError,
) -> None:
    expected, whole, tiles = decoder.decode(rows_for(decoder.settings)), decoder.loop.draw, []

    def small_memory(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        tiles.append(len(rows))
        if len(rows) > 1:
            raise memory
        return whole(rows)

    monkeypatch.setattr(decoder.loop, "draw", small_memory)
    drawn = decoder.decode(rows_for(decoder.settings))
    assert tiles == [4, 2, 1, 1, 1, 1, 1, 1]
    assert [image.error for image in drawn] == [None] * 6
    for one, other in zip(drawn, expected, strict=True):  # tiles of another size round differently
        assert np.abs(pixels(one.image).astype(int) - pixels(other.image)).max() <= 1
    assert caplog.messages[-1] == (
        "decoder: 2 images at once do not fit the device's memory; continuing with 1. "
        "Set decoder.batch_size=1 to start there"
    )
    monkeypatch.setattr(decoder.loop, "draw", lambda rows: (_ for _ in ()).throw(memory))
    with pytest.raises(UserError, match="not even one image fits the device's memory"):
        decoder.decode(rows_for(decoder.settings))


def test_a_lost_device_stops_the_run(decoder: LocalDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        raise torch.AcceleratorError("the device fell off the bus")

    monkeypatch.setattr(decoder.loop, "draw", lost)
    with pytest.raises(torch.AcceleratorError):
        decoder.decode(rows_for(decoder.settings))


def checked(settings: DecoderSettings, **safety: object) -> LocalDecoder:
    """A decoder whose checker rejects the first image of rows 0 and 1, and every image of row 2."""
    decoder = LocalDecoder(settings.model_copy(update={"safety": SafetySettings(**safety)}))
    plain = LocalDecoder(settings)
    first = plain.draw(rows_for(settings))[:2]
    third = [
        plain.draw(replace(rows_for(settings), seeds=[retry_seed(seed, k) for seed in range(6)]))[2]
        for k in range(3)
    ]

    def checker(images: np.ndarray) -> np.ndarray:
        return np.array(
            [0.9 if any(np.array_equal(image, bad) for bad in [*first, *third]) else 0.1 for image in images]
        )

    decoder.checker = checker
    return decoder


def test_an_unsafe_image_is_drawn_again_with_the_seed_of_the_next_attempt(
    tiny_decoder: DecoderSettings,
) -> None:
    decoder = checked(tiny_decoder, policy="regenerate", max_attempts=3)
    drawn = decoder.decode(rows_for(tiny_decoder))
    assert [image.seed for image in drawn] == [retry_seed(0, 1), retry_seed(1, 1), retry_seed(2, 2), 3, 4, 5]
    assert [image.image is None for image in drawn] == [False, False, True, False, False, False]
    assert [image.safety_probability for image in drawn] == pytest.approx([0.1, 0.1, 0.9, 0.1, 0.1, 0.1])
    assert all(image.error is None for image in drawn)
    again = LocalDecoder(tiny_decoder).decode(
        replace(rows_for(tiny_decoder).take([0]), seeds=[retry_seed(0, 1)])
    )[0]
    assert drawn[0].image == again.image
    assert retry_seed(7, 0) == 7


def test_unsafe_images_are_dropped_or_flagged(tiny_decoder: DecoderSettings) -> None:
    dropped = checked(tiny_decoder, policy="drop").decode(rows_for(tiny_decoder))
    assert [image.image is None for image in dropped] == [True, True, True, False, False, False]
    assert all(image.error is None for image in dropped)
    flagged = checked(tiny_decoder, policy="flag").decode(rows_for(tiny_decoder))
    assert [image.image is None for image in flagged] == [False] * 6
    assert [image.safety_probability for image in flagged] == pytest.approx([0.9, 0.9, 0.9, 0.1, 0.1, 0.1])
    assert min(pixels(image.image).max() for image in flagged) > 0


def test_a_probability_that_is_not_a_number_counts_as_unsafe(tiny_decoder: DecoderSettings) -> None:
    decoder = LocalDecoder(tiny_decoder.model_copy(update={"safety": SafetySettings(policy="drop")}))
    decoder.checker = lambda images: np.array([np.nan, *[0.1] * (len(images) - 1)])
    rows = rows_for(tiny_decoder, decoder.batch_size)  # one tile
    assert [image.image is None for image in decoder.decode(rows)] == [True, *[False] * (len(rows) - 1)]


def dark(images: np.ndarray) -> np.ndarray:
    return np.array([1 - image.mean() / 255 for image in images])


def broken(images: np.ndarray) -> np.ndarray:
    raise KeyError("weights")


def short(images: np.ndarray) -> np.ndarray:
    return np.zeros(1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "raised KeyError: 'weights'; fix it"),
        ("short", r"gave \(1,\) for 3 images, expected one number each"),
    ],
)
def test_a_checker_that_fails_stops_the_run(tiny_decoder: DecoderSettings, name: str, message: str) -> None:
    checker = f"tests.decoder.test_local:{name}"
    decoder = LocalDecoder(tiny_decoder.model_copy(update={"safety": SafetySettings(checker=checker)}))
    with pytest.raises(UserError, match=f"decoder.safety.checker {checker}: {message}"):
        decoder.decode(Rows.of(tiny_decoder, np.ones((3, D), np.float32), range(3)))


def test_a_custom_checker_is_named_by_module_and_function(tiny_decoder: DecoderSettings) -> None:
    settings = tiny_decoder.model_copy(
        update={"safety": SafetySettings(checker="tests.decoder.test_local:dark")}
    )
    checker = load_checker(settings)
    assert checker is not None
    assert checker(np.zeros((1, 4, 4, 3), np.uint8)) == [1.0]
    for name in ("tests.decoder.test_local:absent", "no_such_module:dark", "words"):
        with pytest.raises(UserError, match="give bundled, stable-diffusion, module:function"):
            load_checker(tiny_decoder.model_copy(update={"safety": SafetySettings(checker=name)}))


def test_the_checker_of_the_model_leaves_the_images_unchanged(
    tiny_decoder: DecoderSettings, tmp_path: Path
) -> None:
    folder = tmp_path / "sd"
    shutil.copytree(tiny_decoder.model, folder)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = StableDiffusionSafetyChecker(
        CLIPConfig(
            vision_config={**small, "image_size": 16, "patch_size": 8}, text_config=small, projection_dim=8
        )
    )
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        folder / "feature_extractor"
    )
    settings = tiny_decoder.model_copy(
        update={"model": str(folder), "safety": SafetySettings(checker="stable-diffusion")}
    )
    images = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    before = images.copy()
    for threshold, verdict in ((2.0, 0.0), (-2.0, 1.0)):  # cosines lie between the two
        torch.nn.init.constant_(model.concept_embeds_weights, threshold)
        model.save_pretrained(folder / "safety_checker")
        checker = load_checker(settings)
        assert checker is not None
        assert checker(images).tolist() == [verdict] * 3
    assert np.array_equal(images, before)
    with pytest.raises(UserError, match="has none .* give bundled, module:function, or none"):
        load_checker(tiny_decoder.model_copy(update={"safety": SafetySettings(checker="stable-diffusion")}))


def test_a_tile_is_checked_and_encoded_while_the_next_one_is_drawn(
    decoder: LocalDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of the first tile ends only once the second tile is being drawn."""
    second_begun, tiles = threading.Event(), []
    whole = decoder.loop.draw

    def draw(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        tiles.append(rows.seeds)
        if len(tiles) == 2:
            second_begun.set()
        return whole(rows)

    def check(images: np.ndarray) -> np.ndarray:
        assert second_begun.wait(30)
        return np.zeros(len(images))

    size = decoder.batch_size
    rows = rows_for(decoder.settings, 2 * size + 1)
    alone = [decoder.decode(rows.take([row]))[0].image for row in range(len(rows))]
    monkeypatch.setattr(decoder.loop, "draw", draw)
    decoder.checker = check
    drawn = decoder.decode(rows)
    assert [len(tile) for tile in tiles] == [size] * 3  # the last one is padded
    assert [image.image for image in drawn] == alone
    assert {image.safety_probability for image in drawn} == {0.0}


def test_a_call_is_checked_and_encoded_while_the_next_call_draws(
    decoder: LocalDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of the first call ends only once the second call is drawing. Two never draw at a time."""
    second_begun, drawing, draws, threads = threading.Event(), threading.Lock(), [], torch.get_num_threads()
    whole = decoder.loop.draw

    def draw(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        assert drawing.acquire(blocking=False), "two calls draw at a time"
        draws.append(torch.get_num_threads())
        if len(draws) == 2:
            second_begun.set()
        drawing.release()
        return whole(rows)

    def check(images: np.ndarray) -> np.ndarray:
        torch.set_num_threads(1)  # as the bundled checker does; new threads take the number over
        assert second_begun.wait(30)
        return np.zeros(len(images))

    rows = rows_for(decoder.settings, 2)
    alone = [decoder.decode(rows.take([row]))[0].image for row in range(len(rows))]
    monkeypatch.setattr(decoder.loop, "draw", draw)
    decoder.checker, decoder.threads = check, threads + 1
    try:
        with ThreadPoolExecutor(2) as calls:
            drawn = [outcomes[0] for outcomes in calls.map(decoder.decode, (rows.take([0]), rows.take([1])))]
    finally:
        torch.set_num_threads(threads)
    assert [image.image for image in drawn] == alone
    assert draws == [threads + 1] * 2


def test_a_small_image_is_its_own_thumbnail(tiny_decoder: DecoderSettings) -> None:
    for size, is_same in ((8, False), (15, False), (16, True), (128, True)):
        settings = tiny_decoder.model_copy(update={"thumbnail_size": size})
        (drawn,) = LocalDecoder(settings).decode(rows_for(settings, 1))
        assert (drawn.thumbnail == drawn.image) is is_same
        assert pixels(drawn.thumbnail).shape == (min(size, 16), min(size, 16), 3)
