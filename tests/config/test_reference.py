"""The configuration page: it equals the generated one, and it names every setting."""

from pathlib import Path

from rebeca_ray.config.jobs import GenerateConfig, NightlyConfig
from rebeca_ray.config.reference import JOBS, find_sections, page, plain, words
from rebeca_ray.config.sections import GateSettings, SamplerSettings

PAGE = Path(__file__).parents[2] / "infra" / "docs" / "configuration.md"


def test_the_committed_page_equals_the_generated_one() -> None:
    assert PAGE.read_text() == "\n".join(page()) + "\n", "the page is outdated; run `make docs`"


def test_every_setting_has_a_row_of_five_cells() -> None:
    lines = list(page())
    for model in (*JOBS, *find_sections()):
        rows = lines[lines.index(f"### {model.__name__}") :]
        for name in model.model_fields:
            row = next(line for line in rows if line.startswith(f"| `{name}` |"))
            assert row.count(" | ") == 4, row


def test_types_and_bounds_are_in_words() -> None:
    fields = {**GateSettings.model_fields, **GenerateConfig.model_fields, **NightlyConfig.model_fields}
    assert words(fields["max_p_value"]) == "null, or number above 0 and at most 1"
    assert words(fields["min_users"]) == "null, or whole number from 0 to 1,000,000,000"
    assert words(fields["num_images"]) == "whole number from 1 to 32,767"
    assert words(fields["error_budget"]) == "number of at least 0 and below 1"
    assert words(fields["run_id"]) == "null, or identifier of at most 100 characters"
    assert words(fields["run_date"]) == "null, or date"
    assert words(fields["catalog"]) == "location"
    assert words(SamplerSettings.model_fields["batch_size"]) == "whole number from 16 to 65,536"
    assert words(SamplerSettings.model_fields["device"]) == "`cpu` or `cuda`"


def test_values_are_as_yaml_has_them() -> None:
    values = [None, True, "cpu", 20_000, 1e-5, 0.999, (1.0, 5.0)]
    assert list(map(plain, values)) == ["null", "true", "`cpu`", "20000", "1e-05", "0.999", "[1, 5]"]
