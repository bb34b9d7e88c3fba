"""Every figure of a study by one name, for bounds and for trackers: `catalog/clip/like_probability/mean`."""

from collections.abc import Iterable, Iterator, Mapping

from rebeca_ray.errors import InputError, QualityGateError, did_you_mean
from rebeca_ray.studies.metrics import Metrics


def named_figures(metrics: Metrics) -> dict[str, float]:
    """Return all figures that were computed, by their path.

    A path begins with `verifier`, `guidance`, the name of a set, or two names of sets: `catalog-p1`. Counts
    and plots of calibration are no figures.
    """
    parts: dict[str, object] = {"verifier": metrics.verifier.model_dump()}
    parts |= {f"verifier/{space}": part.model_dump() for space, part in metrics.verifiers.items()}
    for part in metrics.sets:
        record = part.model_dump()
        for space, figures in record.pop("spaces").items():
            tests = figures.pop("permutation")
            figures["permutation"] = {f"{test['method']}, {test['statistic']}": test for test in tests}
            parts[f"{part.name}/{space}"] = figures
        parts[part.name] = record
    for cell in metrics.guidance:
        name = f"guidance/prior {cell.prior_guidance_scale:g}, decoder {cell.decoder_guidance_scale:g}"
        parts[name] = cell.model_dump(exclude={"prior_guidance_scale", "decoder_guidance_scale"})
    for row in metrics.comparisons:
        parts[f"{row.left}-{row.right}/{row.figure}"] = row.model_dump()
    return dict(leaves(parts, ""))


def leaves(value: object, path: str) -> Iterator[tuple[str, float]]:
    """Yield the floats below a value with their paths."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from leaves(part, f"{path}/{name}" if path else str(name))
    elif isinstance(value, float):
        yield path, value


def check_bounds(figures: dict[str, float], bounds: Iterable[str]) -> None:
    """Raise QualityGateError for figures outside their bounds, such as `catalog/clip/vendi/mean >= 3`.

    Raises InputError for an unknown figure, and for a bound that is no number.
    """
    reasons = []
    for text in bounds:
        name, sign, bound = parse_bound(text)
        if name not in figures:
            raise InputError(
                f"bounds: {name!r} is no figure of this evaluation; {did_you_mean(name, figures)}"
            )
        value = figures[name]
        if not (value >= bound if sign == ">=" else value <= bound):  # NaN passes no bound
            reasons.append(f"{name} is {value:g}, expected {sign} {bound:g}")
    if reasons:
        raise QualityGateError(
            f"evaluation: {'; '.join(reasons)}; keep the catalog before it, or change bounds"
        )


def parse_bound(text: str) -> tuple[str, str, float]:
    """Return the name of a figure, the sign and the bound."""
    name, sign, number = text.rsplit(" ", 2)
    try:
        return name.strip(), sign, float(number)
    except ValueError:
        raise InputError(
            f"bounds: {number!r} of {name!r} is no number; write, say, `{name} {sign} 0.3`"
        ) from None
