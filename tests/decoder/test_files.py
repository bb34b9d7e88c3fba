"""A decoder's files: missing files and pickles are refused; the fingerprint follows the images."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.files import find_decoder, identify_decoder
from rebeca_ray.decoder.single_file.pickles import convert_pickle
from rebeca_ray.errors import UserError
from tests.conftest import D


def change(settings: DecoderSettings, **values: object) -> DecoderSettings:
    return settings.model_copy(update=values)


def test_embed_dim_and_hashes_are_read_without_loading(tiny_decoder: DecoderSettings) -> None:
    identity = identify_decoder(tiny_decoder)
    assert identity.embed_dim == D
    assert {
        "ip_adapter/ip-adapter.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
    } < set(identity.weights)
    assert all(len(sha256) == 64 for sha256 in identity.weights.values())


def test_adapters_for_other_embeddings_are_refused(tiny_decoder: DecoderSettings, tmp_path: Path) -> None:
    save_file({"image_proj.latents": torch.zeros(1, 16, 768)}, tmp_path / "ip-adapter-plus_sd15.safetensors")
    plus = change(tiny_decoder, ip_adapter_repo=str(tmp_path), ip_adapter="ip-adapter-plus_sd15.safetensors")
    with pytest.raises(
        UserError, match=r"no image_proj.proj.weight to read .*; give a plain adapter such as ip-adapter_sd15"
    ):
        identify_decoder(plus)
    (tmp_path / "ip-adapter-plus_sd15.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"no image_proj.proj.weight to read"):
        identify_decoder(plus)


@pytest.mark.parametrize(
    ("values", "download"),
    [
        (
            {"model": "stable-diffusion-v1-5/stable-diffusion-v1-5"},
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ),
        (
            {"ip_adapter_repo": "h94/IP-Adapter", "ip_adapter": "models/a.safetensors"},
            "h94/IP-Adapter models/a.safetensors",
        ),
        ({"vae": "madebyollin/taesd"}, "madebyollin/taesd"),
        (
            {"lora": "ByteDance/Hyper-SD/Hyper-SD15-8steps-CFG-lora.safetensors"},
            "ByteDance/Hyper-SD Hyper-SD15-8steps-CFG-lora",
        ),
    ],
)
def test_an_unreachable_hub_gives_one_line_with_the_download_command(
    tiny_decoder: DecoderSettings, monkeypatch: pytest.MonkeyPatch, values: dict[str, str], download: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=f"cannot be fetched .*run `hf download {download}.*on a machine with a network"
    ) as caught:
        find_decoder(change(tiny_decoder, **{"ip_adapter_repo": tiny_decoder.model, **values}))
    assert "\n" not in str(caught.value)
    assert "package:stickers/assets/decoder" in str(caught.value)


def test_a_model_in_the_cache_is_loaded_by_its_id_and_revision(
    tiny_decoder: DecoderSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--tiny--decoder" / "snapshots" / revision
    shutil.copytree(tiny_decoder.model, snapshot)
    hub = change(tiny_decoder, model="tiny/decoder", revision=revision, ip_adapter_revision=revision)
    files = find_decoder(hub)
    assert files.ip_adapter == snapshot / "ip_adapter" / "ip-adapter.safetensors"
    local, cached = identify_decoder(tiny_decoder), identify_decoder(hub)
    assert local.weights == cached.weights
    assert local.fingerprint(tiny_decoder) == cached.fingerprint(hub)


def test_the_fingerprint_changes_with_the_images_only(tiny_decoder: DecoderSettings, tmp_path: Path) -> None:
    identity = identify_decoder(tiny_decoder)
    same = identity.fingerprint(tiny_decoder)
    for unseen in (
        {"batch_size": 9, "num_actors": 3},
        {"backend": "triton"},
        {"device": "cuda"},
        {"thumbnail_size": 64},
        {"engine": "onnx"},
    ):
        assert identity.fingerprint(change(tiny_decoder, **unseen)) == same
    for seen in (
        {"num_inference_steps": 4},
        {"scheduler": "unipc"},
        {"dtype": "float16"},
        {"image_quality": 5},
    ):
        assert identity.fingerprint(change(tiny_decoder, **seen)) != same
    shutil.copytree(tiny_decoder.model, tmp_path / "copy")
    moved = change(tiny_decoder, model=str(tmp_path / "copy"))
    assert identify_decoder(moved).fingerprint(moved) == same
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "copy/ip_adapter/ip-adapter.safetensors", tmp_path / "elsewhere")
    apart = change(
        tiny_decoder, ip_adapter_repo=str(tmp_path / "elsewhere"), ip_adapter="ip-adapter.safetensors"
    )
    assert identify_decoder(apart).fingerprint(apart) == same
    weights = load_file(tmp_path / "copy/ip_adapter/ip-adapter.safetensors")
    weights["image_proj.proj.bias"][0] += 1
    save_file(weights, tmp_path / "copy/ip_adapter/ip-adapter.safetensors")
    assert identify_decoder(moved).fingerprint(moved) != same


def test_missing_files_and_pickles_are_refused(tiny_decoder: DecoderSettings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model_index.json there; give a diffusers directory"):
        find_decoder(change(tiny_decoder, model=str(tmp_path), ip_adapter_repo=tiny_decoder.model))
    with pytest.raises(UserError, match="no such file"):
        find_decoder(change(tiny_decoder, ip_adapter="other/ip-adapter.safetensors"))
    with pytest.raises(
        UserError,
        match=r"a pickle can run code .* rebeca convert ip_adapter/ip-adapter.bin ip_adapter/ip-adapter.safe",
    ):
        find_decoder(change(tiny_decoder, ip_adapter="ip_adapter/ip-adapter.bin"))
    with pytest.raises(UserError, match="no such .safetensors file; give a path, or owner/name"):
        find_decoder(change(tiny_decoder, lora="/nowhere/fast.safetensors"))
    (tmp_path / "fast.weights").write_bytes(b"pickled")
    with pytest.raises(
        UserError, match="no such .safetensors file; give a path, or owner/name/file.safetensors"
    ):
        find_decoder(change(tiny_decoder, lora=str(tmp_path / "fast.weights")))


def test_a_pickle_of_tensors_becomes_safetensors(tmp_path: Path) -> None:
    weights = {
        "image_proj": {"proj.weight": torch.randn(8, 4)},
        "ip_adapter": {"1.to_k_ip.weight": torch.randn(2, 3).T},
    }
    torch.save(weights, tmp_path / "ip-adapter.bin")
    assert convert_pickle(tmp_path / "ip-adapter.bin", tmp_path / "ip-adapter.safetensors") == 2
    converted = load_file(tmp_path / "ip-adapter.safetensors")
    assert torch.equal(converted["image_proj.proj.weight"], weights["image_proj"]["proj.weight"])
    assert torch.equal(converted["ip_adapter.1.to_k_ip.weight"], weights["ip_adapter"]["1.to_k_ip.weight"])


def test_the_weights_of_a_trainings_checkpoint_become_safetensors(tmp_path: Path) -> None:
    weight = torch.randn(2, 3)
    torch.save({"state_dict": {"model.weight": weight}, "global_step": 840000}, tmp_path / "sd.ckpt")
    assert convert_pickle(tmp_path / "sd.ckpt", tmp_path / "sd.safetensors") == 1
    assert torch.equal(load_file(tmp_path / "sd.safetensors")["model.weight"], weight)


class Explosive:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("/tmp/rebeca-exploded"),)  # type: ignore[return-value]


def test_a_pickle_of_other_objects_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save(Explosive(), tmp_path / "code.bin")
    torch.save({"a": "text"}, tmp_path / "words.bin")
    (tmp_path / "junk.bin").write_bytes(b"\x80junk")
    for name, message in (
        ("code", "holds objects other than tensors, which may be code; nothing was run or written$"),
        ("words", "a is a str, expected tensors; nothing is written"),
        ("junk", "is not a file that torch saved|holds objects other than tensors"),
        ("absent", "cannot be read .*; nothing is written"),
    ):
        with pytest.raises(UserError, match=message):
            convert_pickle(tmp_path / f"{name}.bin", tmp_path / "out.safetensors")
    with pytest.raises(UserError, match=r"the output is a safetensors file; name it out.safetensors"):
        convert_pickle(tmp_path / "words.bin", tmp_path / "out.bin")
    with pytest.raises(UserError, match=r"the folder .*nowhere does not exist; make it first"):
        convert_pickle(tmp_path / "words.bin", tmp_path / "nowhere" / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    assert not Path("/tmp/rebeca-exploded").exists()
