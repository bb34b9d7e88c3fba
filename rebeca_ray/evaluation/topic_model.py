"""Topic models of captions: the probability of each topic, given a caption, for topic precision.

captions -> passages -> embeddings -> principal components -> a Gaussian mixture -> mean per caption

A topic is a component of the mixture. Its probability is the posterior, so it depends on the caption and
the fitted model alone. Long captions have several topics, one or more per sentence. Embeddings are word
counts (latent semantic analysis) by default, or those of a sentence model. BERTopic is the alternative that
is nearest to the paper: UMAP and HDBSCAN find the topics and their number.

Shapes: N captions, P passages of all captions, D embed dim, T topics.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rebeca_ray.errors import InputError

Embed = Callable[[Sequence[str]], np.ndarray]  # texts to embeddings; a text without a known word has zeros

NUM_DIMS = 16  # a mixture of more dimensions gives nearly every caption one topic alone
WORD_DIMS = 100
STARTS = 3
MAX_ITERATIONS = 200
PASSAGE_END = re.compile(r"(?<=[.;!?])\s+")


@dataclass(frozen=True, kw_only=True)
class MixtureTopics:
    """A fitted topic model: the embeddings, scikit-learn's principal components, and its Gaussian mixture."""

    embed: Embed
    components: Any
    mixture: Any

    def probability(self, captions: Sequence[str]) -> np.ndarray:
        """Return the probability [N, T] of each topic: the mean over the passages of a caption.

        A passage without a known word does not count. A caption of such passages has all topics alike.
        """
        passages, row_P = split_passages(captions)
        total_NT = np.zeros((len(captions), self.mixture.n_components))
        if passages:
            x_PD = self.embed(passages)
            known_P = np.linalg.norm(x_PD, axis=1) > 0
            if known_P.any():
                probability_PT = self.mixture.predict_proba(self.components.transform(x_PD[known_P]))
                np.add.at(total_NT, row_P[known_P], probability_PT)
        return rows_of_one(total_NT)


@dataclass(frozen=True, kw_only=True)
class BerTopics:
    """A fitted BERTopic model."""

    model: Any

    def probability(self, captions: Sequence[str]) -> np.ndarray:
        """Return BERTopic's approximate distribution [N, T]; all topics alike for a caption near none.

        It compares windows of four words with the words of each topic.
        """
        probability_NT, _ = self.model.approximate_distribution(list(captions))
        return rows_of_one(np.asarray(probability_NT, np.float64))


def fit_topics(
    captions: Sequence[str],
    num_topics: int,
    *,
    embed: Embed | None = None,
    num_dims: int = NUM_DIMS,
    seed: int = 0,
) -> MixtureTopics:
    """Return a mixture of `num_topics` topics, fitted to the captions of the liked training pictures.

    Without `embed`, word counts are embedded. Equal captions and seeds give an equal model. Raises InputError
    for fewer distinct captions than topics, and where scikit-learn is not installed.
    """
    with_scikit_learn()
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    passages, _ = split_passages(captions)
    if not 1 <= num_topics <= len(set(passages)):
        raise InputError(
            f"num_topics: {num_topics} for captions of {len(set(passages))} distinct sentences; "
            "expected at least 1, and at most one per sentence; give more captions or fewer topics"
        )
    embed = embed or word_embedder(passages, seed)
    x_PD = embed(passages)
    x_PD = x_PD[np.linalg.norm(x_PD, axis=1) > 0]
    components = PCA(min(num_dims, *x_PD.shape), random_state=seed).fit(x_PD)
    mixture = GaussianMixture(
        num_topics, covariance_type="spherical", n_init=STARTS, max_iter=MAX_ITERATIONS, random_state=seed
    )
    return MixtureTopics(embed=embed, components=components, mixture=mixture.fit(components.transform(x_PD)))


def fit_bertopic(captions: Sequence[str], embed: Embed, seed: int = 0) -> BerTopics:
    """Return BERTopic with UMAP and HDBSCAN on the embeddings of the captions (Grootendorst 2022).

    UMAP has a fixed seed, so equal captions give an equal model. Raises InputError where BERTopic is not
    installed, and if it finds no topic.
    """
    try:
        from bertopic import BERTopic
        from hdbscan import HDBSCAN
        from umap import UMAP
    except ImportError as error:
        raise InputError(
            f"topics: {error.name} is not installed; expected for BERTopic; pip install bertopic"
        ) from None
    # BERTopic's defaults, but for the seed.
    reducer = UMAP(n_neighbors=15, n_components=5, min_dist=0.0, metric="cosine", random_state=seed)
    clusters = HDBSCAN(min_cluster_size=10, prediction_data=True)
    model = BERTopic(umap_model=reducer, hdbscan_model=clusters)
    labels, _ = model.fit_transform(list(captions), embeddings=embed(captions))
    if max(labels) < 0:
        raise InputError(
            f"topics: BERTopic finds none in {len(captions)} captions; expected at least one; "
            "give more captions, or fit a mixture"
        )
    return BerTopics(model=model)


def word_embedder(texts: Sequence[str], seed: int = 0) -> Embed:
    """Return a function that embeds texts by their words: latent semantic analysis, fitted to `texts`.

    Counts are weighted by TF-IDF; English function words do not count. Raises InputError if no other word
    remains, and where scikit-learn is not installed.
    """
    with_scikit_learn()
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(stop_words="english", sublinear_tf=True)
    try:
        counts = words.fit_transform(texts)
    except ValueError:
        raise InputError(
            f"captions: no word remains in {len(texts)} sentences; expected words of at least two letters, "
            "other than function words; give other captions"
        ) from None
    num_dims = min(WORD_DIMS, *counts.shape)
    projection = TruncatedSVD(num_dims, random_state=seed).fit(counts)

    def embed(texts: Sequence[str]) -> np.ndarray:
        return projection.transform(words.transform(texts))

    return embed


def split_passages(captions: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return the sentences of all captions, and the row [P] of each sentence's caption."""
    parts = [
        (part, row)
        for row, caption in enumerate(captions)
        for part in PASSAGE_END.split(caption.strip())
        if part
    ]
    return [part for part, _ in parts], np.array([row for _, row in parts], int)


def rows_of_one(weight_NT: np.ndarray) -> np.ndarray:
    """Return rows with a sum of one. A row of zeros becomes uniform."""
    total_N1 = weight_NT.sum(axis=1, keepdims=True)
    uniform_NT = np.full(weight_NT.shape, 1 / weight_NT.shape[1])
    return np.divide(weight_NT, total_N1, out=uniform_NT, where=total_N1 > 0)


def with_scikit_learn() -> None:
    """Raise InputError where scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise InputError(
            "topics: scikit-learn is not installed; expected for topic models; "
            "pip install 'rebeca-ray[topics]'"
        ) from None
