"""LoRAs and attention to liked images: what they see changes the images of their user, and no others."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rebeca_ray import schemas
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.evaluation import EvaluateConfig, LoraSettings
from rebeca_ray.decoder.build import build_decoder
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.errors import InputError
from rebeca_ray.schemas import TRAINING
from rebeca_ray.studies.drawing import draw_set
from rebeca_ray.studies.methods import Materials, wishes_of
from rebeca_ray.studies.own_decoders import draw
from rebeca_ray.studies.own_decoders.draw import References, draw_with_own_decoder
from rebeca_ray.studies.own_decoders.fabric import FabricDecoder, Memory, ReferenceAttention
from rebeca_ray.studies.own_decoders.lora import check_trainable, rank_of, train_lora
from tests.conftest import D
from tests.decoder.test_denoising import rows_for
from tests.studies.conftest import ITEMS_PER_TASTE, TASTES

COLOURS = ("red", "green", "blue")


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def config(study: EvaluateConfig, tiny_decoder: DecoderSettings, tmp_path: Path) -> EvaluateConfig:
    """The study with an image of one colour for all items of a taste."""
    ids = [f"i{item:03}" for item in range(TASTES * ITEMS_PER_TASTE)]
    images = [{"bytes": picture(COLOURS[item // ITEMS_PER_TASTE]), "path": None} for item in range(len(ids))]
    pq.write_table(
        pa.table({"item_id": ids, "image": pa.array(images, schemas.IMAGE)}), tmp_path / "images.parquet"
    )
    return study.model_copy(
        update={
            "decoder": tiny_decoder,
            "images": str(tmp_path / "images.parquet"),
            "lora": LoraSettings(steps=3, batch_size=2, learning_rate=0.05),
        }
    )


@pytest.fixture
def few(materials: Materials) -> Materials:
    """The first three users, one of each taste."""
    return replace(
        materials,
        catalog=materials.catalog.of_users(range(TASTES)),
        judge=replace(materials.judge, user_U=materials.judge.user_U[:TASTES]),
    )


def test_a_lora_is_the_same_again_and_learns_its_images(
    tiny_decoder: DecoderSettings, tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("one", "again", "blue")]
    settings = LoraSettings(steps=3, batch_size=2, learning_rate=0.05)
    for file, colour in zip(files, ("red", "red", "blue"), strict=True):
        train_lora(tiny_decoder, [picture(colour)] * 3, "liked image.", settings, file)
    one, again, blue = (load_file(file) for file in files)
    assert one.keys() == again.keys() == blue.keys()
    assert {name.rsplit(".", 3)[1] for name in one} >= {"to_q", "to_k", "to_v"}
    assert all(torch.equal(one[name], again[name]) for name in one)
    ups = [name for name in one if "lora_B" in name]
    assert all(one[name].any() for name in ups)  # they start at zero
    assert not all(torch.equal(one[name], blue[name]) for name in ups)
    assert {weight.shape[0] for name, weight in one.items() if "lora_A" in name} == {rank_of(3)}


def test_a_lora_lowers_the_loss_on_its_image(tiny_decoder: DecoderSettings, tmp_path: Path) -> None:
    """The noise that the UNet predicts comes closer to the true one after training."""
    from diffusers import DDPMScheduler

    from rebeca_ray.decoder.families.sd import load_parts
    from rebeca_ray.decoder.files import find_decoder
    from rebeca_ray.decoder.lora import merge_lora
    from rebeca_ray.studies.own_decoders.lora import encode_latents

    file = tmp_path / "lora.safetensors"
    settings = LoraSettings(steps=150, batch_size=4, learning_rate=0.01)
    train_lora(tiny_decoder, [picture("red")], "liked image.", settings, file)
    parts = load_parts(tiny_decoder, find_decoder(tiny_decoder), torch.float32)
    schedule = DDPMScheduler.from_config(parts["scheduler"].config)
    with torch.no_grad():
        latents = encode_latents(parts["vae"], [picture("red")], 16).expand(64, -1, -1, -1)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
        timesteps = torch.arange(0, 960, 15)
        tokens = parts["tokenizer"]("liked image.", padding="max_length", max_length=24, return_tensors="pt")
        text = parts["text_encoder"](tokens.input_ids).last_hidden_state.expand(64, -1, -1)
        noisy = schedule.add_noise(latents, noise, timesteps)
        before = (parts["unet"](noisy, timesteps, text).sample - noise).square().mean()
        merge_lora("lora", file, {name: parts[name] for name in ("unet", "text_encoder")})
        after = (parts["unet"](noisy, timesteps, text).sample - noise).square().mean()
    assert after < 0.95 * before


@pytest.mark.parametrize(("count", "rank"), [(0, 4), (19, 4), (20, 8), (49, 8), (50, 16), (900, 16)])
def test_the_rank_grows_with_the_number_of_images(count: int, rank: int) -> None:
    assert rank_of(count) == rank


@pytest.mark.parametrize("method", ["lora_shared", "lora_per_user", "fabric"])
def test_each_user_has_their_images_and_a_second_start_draws_none(
    method: str, config: EvaluateConfig, few: Materials, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = draw_with_own_decoder(method, few, config)
    assert drawn.user_id == few.catalog.user_id
    assert drawn.user_N.tolist() == few.catalog.user_N.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(set(drawn.item_id)) == len(drawn.encoded) == 9
    assert not drawn.embeds_ND.any()
    files = list(Path(config.out, "sets").iterdir())
    assert len(files) == (1 if method == "lora_shared" else 3)

    def fail(*arguments: object) -> None:
        raise AssertionError("the images are there")

    monkeypatch.setattr(draw, "LocalDecoder", fail)
    monkeypatch.setattr(draw, "FabricDecoder", fail)
    monkeypatch.setattr(draw, "train_lora", fail)
    assert draw_with_own_decoder(method, few, config).encoded == drawn.encoded


@pytest.mark.parametrize("method", ["lora_per_user", "fabric"])
def test_a_users_images_do_not_depend_on_the_users_before(
    method: str, config: EvaluateConfig, few: Materials, tmp_path: Path
) -> None:
    together = draw_with_own_decoder(method, few, config)
    last = replace(
        few,
        catalog=few.catalog.of_users([2]),
        judge=replace(few.judge, user_U=few.judge.user_U[2:]),
    )
    alone = draw_with_own_decoder(method, last, config.model_copy(update={"out": str(tmp_path / "alone")}))
    assert alone.encoded == together.encoded[6:]


def test_references_are_the_latest_rated_items_of_training(config: EvaluateConfig, few: Materials) -> None:
    assert config.images is not None
    references = References("fabric", few, config.images)
    ratings = few.judge.ratings
    for row, user in enumerate(few.judge.user_U.tolist()):
        assert references.liked[row] == ratings.likes_of_training(user)[-4:].tolist()
        rated = ratings.rows_of(user, TRAINING).tolist()
        assert len(references.disliked[row]) == 4
        assert set(references.disliked[row]) <= set(rated) - set(ratings.likes_of_training(user).tolist())
        assert references.encoded(references.liked[row]) == [picture(COLOURS[row])] * 4
    assert References("lora_per_user", few, config.images).disliked == [[], [], []]


def test_attention_without_references_is_the_plain_one(
    config: EvaluateConfig, few: Materials, tiny_decoder: DecoderSettings
) -> None:
    """Pixels differ by rounding at most. With references, they differ."""
    plain = draw_set(
        "p1", wishes_of("p1", few), few.catalog, build_decoder(tiny_decoder), tiny_decoder, config.out
    )
    fabric = FabricDecoder(tiny_decoder)
    wishes = wishes_of("p1", few)
    none = draw_set(
        "none", replace(wishes, made_from=("none",)), few.catalog, fabric, tiny_decoder, config.out
    )
    fabric.refer_to([picture("red")], [picture("blue")])
    some = draw_set(
        "some", replace(wishes, made_from=("some",)), few.catalog, fabric, tiny_decoder, config.out
    )

    def pixels(encoded: list[bytes]) -> np.ndarray:
        return np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in encoded]).astype(int)

    assert np.abs(pixels(plain.encoded) - pixels(none.encoded)).max() <= 1
    assert np.abs(pixels(plain.encoded) - pixels(some.encoded)).max() > 1


def test_references_have_an_empty_prompt_and_weigh_most_in_the_middle_third(
    tiny_decoder: DecoderSettings, few: Materials
) -> None:
    settings = tiny_decoder.model_copy(update={"num_inference_steps": 9})
    fabric = FabricDecoder(settings)
    fabric.refer_to([picture("red")], [picture("blue"), picture("green")])
    networks = fabric.decoder.loop.networks
    without_image = settings.model_copy(update={"ip_adapter_scale": 0.0})
    empty = Rows.of(without_image, np.zeros((3, D), np.float32), [0] * 3)
    expected = networks.condition(empty).in_order(networks.family.conditioning)
    for tensor, other in zip(fabric.memory.conditioning, expected, strict=True):
        torch.testing.assert_close(tensor, other)
    weights: list[float] = []
    conditioned = networks.unet.conditioned

    def note(*inputs: torch.Tensor) -> torch.Tensor:
        if not fabric.memory.is_writing:
            weights.append(fabric.memory.weight)
        return conditioned(*inputs)

    networks.unet.conditioned = note
    fabric.decode(Rows.of(settings, np.zeros((2, D), np.float32), [1, 2]))
    assert weights == [0.1, 0.1, 0.1, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1]


def test_users_without_training_likes_or_dislikes_are_drawn(config: EvaluateConfig, few: Materials) -> None:
    ratings = few.judge.ratings
    training = ratings.interactions.split == TRAINING
    like = ratings.interactions.like.copy()
    like[training & (ratings.interactions.user_index == few.judge.user_U[0])] = 0
    like[training & (ratings.interactions.user_index == few.judge.user_U[1])] = 1
    changed = replace(ratings, interactions=replace(ratings.interactions, like=like))
    few = replace(few, judge=replace(few.judge, ratings=changed))
    for method in ("lora_per_user", "fabric"):
        assert len(draw_with_own_decoder(method, few, config).encoded) == 9


@pytest.mark.parametrize("guided", [False, True])
def test_reference_attention_is_a_softmax_over_own_and_weighted_tokens(guided: bool) -> None:
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    attn = Attention(query_dim=8, heads=2, dim_head=4).double()
    memory = Memory(liked=torch.zeros(2), disliked=torch.zeros(1), is_guided=guided, weight=0.3)
    memory.states["layer"] = torch.randn(3, 5, 8, dtype=torch.float64)
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    result = ReferenceAttention("layer", memory)(attn, x)
    for row in range(4):
        chosen = memory.states["layer"][2:] if guided and row >= 2 else memory.states["layer"][:2]
        known = torch.cat([x[row], chosen.flatten(0, 1)])
        share = 0.15 if guided and row >= 2 else 0.3  # disliked images have half of the weight
        weight = torch.cat([torch.ones(6), torch.full((len(known) - 6,), share)]).double()
        heads = []
        for head in range(2):
            columns = slice(4 * head, 4 * head + 4)
            query, key, value = (
                layer(part)[:, columns]
                for layer, part in ((attn.to_q, x[row]), (attn.to_k, known), (attn.to_v, known))
            )
            score = (query @ key.T / 2).exp() * weight
            heads.append(score / score.sum(1, keepdim=True) @ value)
        torch.testing.assert_close(result[row], attn.to_out[0](torch.cat(heads, dim=1)))


def test_a_decoder_that_cannot_be_changed_is_refused(config: EvaluateConfig) -> None:
    assert config.decoder is not None
    for change in ({"backend": "triton"}, {"lora": "/other.safetensors"}):
        decoder = config.decoder.model_copy(update=change)
        with pytest.raises(InputError, match="method lora_shared: decoder.backend is"):
            check_trainable("lora_shared", decoder)


def test_sdxl_has_attention_to_references_and_no_lora(tiny_sdxl: DecoderSettings) -> None:
    with pytest.raises(
        InputError, match="method lora_shared: decoder.model .* is an SDXL; expected a Stable"
    ):
        check_trainable("lora_shared", tiny_sdxl)
    fabric, rows = FabricDecoder(tiny_sdxl), rows_for(tiny_sdxl)
    plain = build_decoder(tiny_sdxl).decode(rows)
    fabric.refer_to([picture("red")], [picture("blue")])
    for one, other in zip(plain, fabric.decode(rows), strict=True):
        assert one.image
        assert other.image
        assert one.image != other.image


def test_these_methods_need_images(study: EvaluateConfig, tiny_decoder: DecoderSettings) -> None:
    values = {**study.model_dump(exclude_unset=True), "prior": "a", "clip": "local-dir:b"}
    values["decoder"] = tiny_decoder.model_dump(mode="json")
    with pytest.raises(ValueError, match="the methods fabric, lora_shared need `images`"):
        EvaluateConfig.model_validate({**values, "methods": ["lora_shared", "p1", "fabric"]})
