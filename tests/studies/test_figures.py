"""The figures of a study by name, and their bounds."""

import pytest

from rebeca_ray.config.evaluation import EvaluateConfig
from rebeca_ray.errors import InputError, QualityGateError
from rebeca_ray.studies.figures import check_bounds, named_figures
from rebeca_ray.studies.metrics import (
    Comparison,
    Distances,
    GuidanceCell,
    Mean,
    Metrics,
    Permutation,
    SetFigures,
    Share,
    SpaceFigures,
    VerifierAccuracy,
    VerifierFigures,
)

SHARE = Share(value=0.7, low=0.6, high=0.8, num_users=5)
MEAN = Mean(mean=0.3, low=0.2, high=0.4, worst_decile=0.1)
ACCURACY = VerifierAccuracy(
    auc=SHARE, accuracy=SHARE, pairwise_accuracy=SHARE, calibration_error=SHARE, reliability=()
)
VERIFIER = VerifierFigures(kind="history", num_factors=8, weight_decay=0.1, ratings=9, seen=ACCURACY)
TEST = Permutation(
    method="by user", statistic="mean", matched=0.3, shuffled=0.1, deviation=0.02, z=10.0, p_value=0.001,
    users=5, images_per_user=2.0,
)  # fmt: skip
SPACE = SpaceFigures(
    like_probability=MEAN,
    permutation=[TEST],
    distances=Distances(
        count=9, mmd=1.0, frechet=0.5, kid=0.1, precision=0.5, recall=0.5, density=1.0, coverage=0.5
    ),
    vendi=MEAN,
    vendi_pooled=4.0,
    cosine_within=MEAN,
    cosine_across=MEAN,
    novelty=MEAN,
    copy_share=0.0,
    neighbour_precision=MEAN,
    neighbour_recall=MEAN,
)
CATALOG = SetFigures(
    name="catalog", description="", users=5, items=10, spaces={"clip": SPACE}, topic_precision={"style": MEAN}
)
CELL = GuidanceCell(
    prior_guidance_scale=3.0, decoder_guidance_scale=5.0, users=5, items=10, like_probability=MEAN, mmd=2.0,
    vendi=MEAN,
)  # fmt: skip
COMPARISON = Comparison(
    figure="clip/vendi", left="catalog", right="p1", users=5, difference=-0.25, low=-0.5, high=0.0,
    win_share=0.2, tie_share=0.0, wilcoxon_p=0.04,
)  # fmt: skip
METRICS = Metrics(
    verifier=VERIFIER,
    verifiers={"timm:a": VERIFIER},
    sets=[CATALOG],
    guidance=[CELL],
    comparisons=[COMPARISON],
)


def test_every_computed_figure_has_a_name() -> None:
    figures = named_figures(METRICS)
    assert figures["verifier/seen/auc/value"] == 0.7
    assert figures["verifier/timm:a/seen/auc/low"] == 0.6
    assert figures["catalog/clip/like_probability/worst_decile"] == 0.1
    assert figures["catalog/clip/permutation/by user, mean/z"] == 10
    assert figures["catalog/clip/distances/mmd"] == 1
    assert figures["catalog/topic_precision/style/mean"] == 0.3
    assert figures["catalog-p1/clip/vendi/difference"] == -0.25
    assert figures["guidance/prior 3, decoder 5/mmd"] == 2
    assert figures["guidance/prior 3, decoder 5/vendi/mean"] == 0.3
    assert not [name for name in figures if "guidance_scale" in name]
    measured = CATALOG.model_copy(update={"lpips": MEAN, "true_like_probability": MEAN})
    more = named_figures(METRICS.model_copy(update={"sets": [measured]}))
    assert more["catalog/lpips/mean"] == more["catalog/true_like_probability/mean"] == 0.3
    missing = ("true_like", "fid", "unseen", "num_users", "items")
    assert not [name for name in figures if name.rpartition("/")[2].startswith(missing)]


def test_all_figures_outside_their_bounds_are_named_together() -> None:
    figures = named_figures(METRICS)
    inside = ["catalog/clip/like_probability/mean >= 0.3", "catalog/clip/like_probability/mean <= 3e-1"]
    check_bounds(figures, inside)
    outside = ["catalog/clip/vendi/mean >= 0.4", "catalog/clip/permutation/by user, mean/z <= 5"]
    with pytest.raises(QualityGateError) as caught:
        check_bounds(figures, inside + outside)
    assert "catalog/clip/vendi/mean is 0.3, expected >= 0.4" in str(caught.value)
    assert "catalog/clip/permutation/by user, mean/z is 10, expected <= 5" in str(caught.value)
    assert "like_probability" not in str(caught.value)
    with pytest.raises(QualityGateError):
        check_bounds({"a": float("nan")}, ["a >= 0"])


def test_an_unknown_figure_and_a_bound_that_is_no_number_are_named() -> None:
    with pytest.raises(InputError, match=r"did you mean 'catalog/clip/vendi/mean'"):
        check_bounds(named_figures(METRICS), ["catalog/clip/vendi/mea >= 0"])
    with pytest.raises(InputError, match=r"bounds: '1\.2\.3' of 'a' is no number"):
        check_bounds({"a": 1.0}, ["a >= 1.2.3"])


@pytest.mark.parametrize("text", ["", "a", "a > 3", "a >= b", ">= 3", "a>=3"])
def test_a_config_takes_bounds_in_one_form_alone(study: EvaluateConfig, text: str) -> None:
    with pytest.raises(ValueError, match="bounds"):
        EvaluateConfig.model_validate({**study.model_dump(), "bounds": [text]})
