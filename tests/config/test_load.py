"""Configs are strict and frozen, errors suggest the nearest key, and every shipped file is valid."""

import datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

from rebeca_ray.config.evaluation import EvaluateConfig
from rebeca_ray.config.fields import expand
from rebeca_ray.config.jobs import (
    DistillConfig,
    EmbedConfig,
    GenerateConfig,
    NightlyConfig,
    TrainConfig,
    dated,
)
from rebeca_ray.config.load import load_config, parse_config
from rebeca_ray.config.tuning import TuneConfig
from rebeca_ray.errors import InputError

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
MODELS = {
    "embed": EmbedConfig,
    "train": TrainConfig,
    "distill": DistillConfig,
    "generate": GenerateConfig,
    "nightly": NightlyConfig,
    "evaluate": EvaluateConfig,
    "tune": TuneConfig,
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    load_config(MODELS[path.stem.split("_")[0]], path)


def test_unknown_key_suggests_the_nearest_known_one() -> None:
    with pytest.raises(
        InputError, match=r"unknown key 'decoder\.num_inference_step'; did you mean 'num_inference_steps'\?"
    ):
        load_config(GenerateConfig, CONFIGS / "generate_stickers.yaml", ["decoder.num_inference_step=3"])


def test_unknown_top_level_key_suggests_too() -> None:
    with pytest.raises(InputError, match="did you mean 'num_images'"):
        load_config(GenerateConfig, CONFIGS / "generate_stickers.yaml", ["num_image=3"])


def test_a_misspelt_key_is_named_before_the_missing_one(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("interations: {path: i}\nitems: i\nout: o\nstorage: s\n")
    with pytest.raises(InputError, match="unknown key 'interations'; did you mean 'interactions'"):
        load_config(TrainConfig, tmp_path / "train.yaml")


def test_override_reaches_nested_keys_and_keeps_the_rest() -> None:
    config = load_config(
        GenerateConfig, CONFIGS / "generate_stickers.yaml", ["decoder.batch_size=3", "sampler.name=ddpm"]
    )
    assert (config.decoder.batch_size, config.sampler.name, config.num_images) == (3, "ddpm", 4)


def test_config_is_frozen() -> None:
    config = load_config(GenerateConfig, CONFIGS / "generate_stickers.yaml")
    with pytest.raises(ValidationError, match="frozen"):
        config.num_images = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["num_images=zero"], "num_images = 'zero'"),
        (["num_images=0"], "num_images = 0: input should be greater than 0"),
        (["run_date=tomorrow"], "run_date = 'tomorrow'"),
        (["decoder.image_size=63"], "image_size = 63"),
        (["num_images"], "expected key.sub=value"),
        (["prior.sub=1"], "prior is a value, not a section"),
        (["run_date=2026-99-99"], "'run_date=2026-99-99': not valid YAML (month must be in 1..12)"),
        (["num_images=["], "'num_images=[': not valid YAML ("),
        (["num_images=40000"], "num_images = 40000: input should be less than or equal to 32767"),
    ],
)
def test_bad_values_name_the_key_and_the_value(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(GenerateConfig, CONFIGS / "generate_stickers.yaml", overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dates_and_identifiers_need_no_quotes() -> None:
    config = load_config(
        GenerateConfig, CONFIGS / "generate_stickers.yaml", ["run_date=2026-01-05", "run_id=20260105"]
    )
    assert (config.run_date, config.run_id) == (datetime.date(2026, 1, 5), "20260105")


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(InputError, match="width 100 is not divisible by num_heads 8; change one of them"):
        load_config(
            TrainConfig, CONFIGS / "train_stickers.yaml", ["network.width=100", "network.num_heads=8"]
        )


def test_locations_become_absolute_and_hub_ids_stay() -> None:
    config = load_config(
        GenerateConfig, CONFIGS / "generate_stickers.yaml", ["catalog=catalog", "decoder.model=owner/model"]
    )
    assert (config.catalog, config.decoder.model) == (str(Path.cwd() / "catalog"), "owner/model")


def test_missing_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("items: a\nclip: b\n")
    with pytest.raises(InputError, match="key 'out' is missing"):
        load_config(EmbedConfig, tmp_path / "config.yaml")


@pytest.mark.parametrize("text", ["a: [", "- a\n- b\n", "7"])
def test_files_without_a_mapping_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"config\.yaml"):
        load_config(EmbedConfig, tmp_path / "config.yaml")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give an existing YAML file"):
        load_config(EmbedConfig, tmp_path / "nothing.yaml")


def test_locations_expand_home_and_package() -> None:
    assert expand("~/x") == str(Path.home() / "x")
    assert Path(expand("package:stickers/assets/items.parquet")).is_file()
    assert Path(expand("local-dir:package:stickers/assets/clip").removeprefix("local-dir:")).is_dir()
    assert expand("s3://bucket/~x") == "s3://bucket/~x"


def test_a_value_instead_of_a_section_is_refused_with_a_preset_too(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("preset: stickers\ninteractions: {path: a}\nitems: b\nout: c\n")
    with pytest.raises(InputError, match="network is a section, not the value 3; set one of its keys"):
        load_config(TrainConfig, tmp_path / "train.yaml", ["network=3"])


@pytest.mark.parametrize("model", [GenerateConfig, NightlyConfig, TrainConfig])
def test_a_config_with_a_date_is_dated_without_other_changes(
    model: type[GenerateConfig | NightlyConfig | TrainConfig],
) -> None:
    name = {GenerateConfig: "generate", NightlyConfig: "nightly", TrainConfig: "train"}[model]
    overrides = [] if model is TrainConfig else ["run_date=2026-11-23"]
    config = load_config(model, Path("jobs/configs") / f"{name}_stickers.yaml", overrides)
    date = datetime.date(2026, 11, 23)
    assert dated(config, date) == config
    request = {"request": "/requests/{run_date}.parquet"}
    if isinstance(config, GenerateConfig):
        assert dated(config.model_copy(update=request), date).request == "/requests/2026-11-23.parquet"


def test_a_colour_has_one_spelling_and_is_opaque() -> None:
    values = {"items": "a", "clip": "b", "out": "c"}
    for colour in ("white", "#FFF", "#ffffff", "rgb(255, 255, 255)"):
        config = parse_config(EmbedConfig, {**values, "background": colour}, where="file")
        assert config.background == "#ffffff"
    for colour in ("#00000000", "rgba(0, 0, 0, 1)", "rgb(300, 0, 0)", "whitest", "ffffff"):
        with pytest.raises(InputError, match="is no opaque colour; give a name such as white, or '#rrggbb'"):
            parse_config(EmbedConfig, {**values, "background": colour}, where="file")
