"""The figures of a study as models: the content of `metrics.json`, and its published schema.

Keys only grow: gates and dashboards read them. A figure that was not computed is null, never zero.
"""

import json
import sys

from pydantic import BaseModel, ConfigDict

METRICS_VERSION = 1


class Record(BaseModel):
    """Base of all figures."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", from_attributes=True, use_attribute_docstrings=True
    )


class Mean(Record):
    """A mean over users with its 95% bootstrap interval over users."""

    mean: float
    """Mean over users."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    worst_decile: float
    """Mean over the worst tenth of users."""


class Share(Record):
    """A figure of a verifier with its 95% bootstrap interval over users."""

    value: float
    """Figure over all ratings."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    num_users: int
    """Users with test ratings."""


class ReliabilityBin(Record):
    """The test ratings within a range of predictions."""

    mean_probability: float
    """Mean predicted like probability."""
    like_share: float
    """Share of likes."""
    num_ratings: int
    """Number of ratings."""


class VerifierAccuracy(Record):
    """A verifier on test ratings that it was not fitted to."""

    auc: Share
    """Area under the ROC curve, over all ratings together."""
    accuracy: Share
    """Share of ratings predicted right."""
    pairwise_accuracy: Share
    """Share of pairs of a like and a dislike of the same user that are ranked right."""
    calibration_error: Share
    """Expected calibration error over ten bins."""
    reliability: tuple[ReliabilityBin, ...]
    """Predictions beside likes, for a calibration plot."""


class VerifierFigures(Record):
    """The verifier: its settings as chosen by validation, and its accuracy."""

    kind: str
    """Form of the verifier."""
    num_factors: int
    """Dimension of a taste."""
    weight_decay: float
    """Regularisation."""
    ratings: int
    """Ratings that it was fitted to, none of which the selector saw."""
    seen: VerifierAccuracy
    """Accuracy for users of the fit."""
    unseen: VerifierAccuracy | None = None
    """Accuracy for users who were fitted to the frozen verifier later."""


class Permutation(Record):
    """A permutation test: do users like their items more than those of other users?"""

    method: str
    """`by user` deals whole sets of items to users. `by image` is the authors' variant."""
    statistic: str
    """`mean` or `median` over the items of a user. The statistic is its mean over users."""
    matched: float
    """Statistic for the users' items."""
    shuffled: float
    """Mean of the statistic over the permutations."""
    deviation: float
    """Standard deviation of the statistic over the permutations."""
    z: float
    """Difference of the two in deviations."""
    z_at_94_users: float | None = None
    """z scaled to the 94 users of the paper's code."""
    z_at_210_users: float | None = None
    """z scaled to the 210 users of the paper."""
    detectable_effect: float | None = None
    """Difference that this test finds with a power of 80% at a level of 5%."""
    p_value: float
    """Probability of a statistic at least as high among permutations."""
    users: int
    """Users of the test."""
    images_per_user: float
    """Mean number of images per user."""


class Distances(Record):
    """Distances between generated items and liked test items, at equal counts, in one feature space."""

    count: int
    """Items on each side."""
    mmd: float
    """Squared maximum mean discrepancy times 1000: Gaussian kernel of sigma 0.5 on unit vectors, unbiased."""
    frechet: float
    """Fréchet distance of unit vectors. It is not FID, which is defined on Inception features."""
    kid: float
    """Kernel distance with KID's cubic kernel, on these features."""
    precision: float
    """Share of generated items within the manifold of liked items."""
    recall: float
    """Share of liked items within the manifold of generated items."""
    density: float
    """Mean number of neighbourhoods of liked items around a generated item, over the expected one."""
    coverage: float
    """Share of liked items with a generated item in their neighbourhood."""
    fid: float | None = None
    """FID, in the space `inception` alone."""
    cmmd: float | None = None
    """CMMD as published, in the space `ViT-L-14-336/openai` alone."""


class SpaceFigures(Record):
    """All figures of one set of items in one feature space."""

    like_probability: Mean
    """Like probability that the verifier predicts, for the items' users."""
    permutation: list[Permutation]
    """Permutation tests by the verifier."""
    distances: Distances
    """Distances to the liked test items."""
    vendi: Mean
    """Effective number of different items of a user."""
    vendi_pooled: float
    """Effective number of different items of all users together."""
    cosine_within: Mean
    """Mean cosine between the items of a user."""
    cosine_across: Mean
    """Mean cosine between a user's items and those of other users."""
    novelty: Mean
    """Distance to the nearest real item: 1 - cosine."""
    copy_share: float
    """Share of near-copies of real items."""
    likeness: Mean | None = None
    """Mean cosine between a user's items and those that the user likes in the test split."""
    neighbour_precision: Mean
    """Share of likes among the user's test ratings nearest to the items."""
    neighbour_recall: Mean
    """Share of the user's liked test ratings that are nearest to an item."""


class SetFigures(Record):
    """All figures of one set of items."""

    name: str
    """Name of the set in tables and plots."""
    description: str
    """Origin of the set."""
    users: int
    """Users of the set."""
    items: int
    """Items of the set."""
    spaces: dict[str, SpaceFigures]
    """Figures by feature space: `planned` embeddings, `clip` for embedded images, and image encoders."""
    topic_precision: dict[str, Mean] = {}
    """Share of a user's images whose topics the user likes, by kind of caption."""
    lpips: Mean | None = None
    """LPIPS between a user's images and those that the user likes in the test split. Less is nearer."""
    true_like_probability: Mean | None = None
    """True like probability, known for simulated users alone."""


class GuidanceCell(Record):
    """The figures of plain samples at one prior guidance scale and one decoder guidance scale."""

    prior_guidance_scale: float
    """Classifier-free guidance scale of the prior."""
    decoder_guidance_scale: float
    """Classifier-free guidance scale of the decoder."""
    users: int
    """Users of the cell."""
    items: int
    """Items of the cell."""
    like_probability: Mean
    """Like probability that the verifier predicts for the embedded images."""
    mmd: float
    """MMD to the liked test items, as in `distances`."""
    vendi: Mean
    """Effective number of different items of a user."""
    true_like_probability: Mean | None = None
    """True like probability, known for simulated users alone."""


class Comparison(Record):
    """One figure of two sets for the same users, paired by user. A difference is left minus right."""

    figure: str
    """Name of the figure."""
    left: str
    """Name of the first set."""
    right: str
    """Name of the second set."""
    users: int
    """Users of the comparison."""
    difference: float
    """Mean difference."""
    low: float
    """Lower end of the 95% bootstrap interval of the difference."""
    high: float
    """Upper end of the interval."""
    win_share: float
    """Share of users with the better figure on the left."""
    tie_share: float
    """Share of users with equal figures."""
    wilcoxon_p: float
    """Two-sided p-value of the signed-rank test."""


class Metrics(Record):
    """The content of `metrics.json`."""

    version: int = METRICS_VERSION
    """Version of the format."""
    verifier: VerifierFigures
    """Verifier of the like probabilities of `planned` and `clip`."""
    verifiers: dict[str, VerifierFigures] = {}
    """Verifier of each image encoder, which the like probabilities of its space come from."""
    sets: list[SetFigures]
    """Figures of each set."""
    guidance: list[GuidanceCell] = []
    """Figures by guidance of prior and decoder."""
    comparisons: list[Comparison]
    """Comparisons of the sets."""


def schema() -> str:
    """Return the JSON schema of `metrics.json`, for `make docs`."""
    return json.dumps(Metrics.model_json_schema(), indent=2)


if __name__ == "__main__":
    sys.stdout.write(schema() + "\n")
