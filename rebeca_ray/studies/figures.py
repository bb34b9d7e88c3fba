"""Every figure of a study by one name, for bounds and for trackers: `catalog/clip/like_probability/mean`."""

from collections.abc import Iterator, Mapping
from typing import Any

from rebeca_ray.config.evaluation import Bounds
from rebeca_ray.errors import InputError, QualityGateError, did_you_mean
from rebeca_ray.studies.metrics import Metrics


def named_figures(metrics: Metrics) -> dict[str, float]:
    """Return all figures that were computed, by their path.

    A path begins with `verifier`, with the name of a set, or with two names of sets: `catalog-p1`. Counts and
    plots of calibration are no figures.
    """
    parts: dict[str, Any] = {"verifier": metrics.verifier.model_dump()}
    parts |= {f"verifier/{space}": part.model_dump() for space, part in metrics.verifiers.items()}
    for part in metrics.sets:
        record = part.model_dump()
        for space, figures in record.pop("spaces").items():
            tests = figures.pop("permutation")
            figures["permutation"] = {f"{test['method']}, {test['statistic']}": test for test in tests}
            parts[f"{part.name}/{space}"] = figures
        parts[part.name] = record
    for row in metrics.comparisons:
        parts[f"{row.left}-{row.right}/{row.figure}"] = row.model_dump()
    return dict(leaves(parts, ""))


def leaves(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """Yield the floats below a value with their paths."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from leaves(part, f"{path}/{name}" if path else str(name))
    elif isinstance(value, float):
        yield path, value


def check_bounds(figures: dict[str, float], bounds: Mapping[str, Bounds]) -> None:
    """Raise QualityGateError for figures outside their bounds.

    Raises InputError for a figure without a value.
    """
    reasons = []
    for name, bound in bounds.items():
        if name not in figures:
            raise InputError(
                f"bounds: {name!r} is no figure of this evaluation; {did_you_mean(name, figures)}"
            )
        value = figures[name]
        if bound.min is not None and not value >= bound.min:
            reasons.append(f"{name} is {value:g}, below its bound of {bound.min:g}")
        if bound.max is not None and not value <= bound.max:
            reasons.append(f"{name} is {value:g}, above its bound of {bound.max:g}")
    if reasons:
        raise QualityGateError(
            f"evaluation: {'; '.join(reasons)}; keep the catalog before it, or change bounds"
        )
