"""Keywords of a user: the words that captions of liked items have more often than those of disliked ones.

Smoothed log-odds, as REBECA's authors write persona prompts: ALPHA is added to the count of every word
(Monroe, Colaresi & Quinn 2008, "Fightin' Words", section 3.3).

Shapes: W words of the vocabulary.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

ALPHA = 1.0
WORD = re.compile(r"[^\W\d_]{2,}")
FUNCTION_WORDS = frozenset(
    ["a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with"]
)


def words_of(caption: str) -> list[str]:
    """Return the words of a caption in lower case, without function words."""
    return [word for word in WORD.findall(caption.lower()) if word not in FUNCTION_WORDS]


def count_words(captions: Iterable[str]) -> Counter[str]:
    """Return how often each word occurs."""
    return Counter(word for caption in captions for word in words_of(caption))


def log_odds(liked_W: np.ndarray, disliked_W: np.ndarray) -> np.ndarray:
    """Return the log-odds ratio [W] of each word between liked and disliked captions, from its counts."""
    left_W, right_W = liked_W + ALPHA, disliked_W + ALPHA
    return np.log(left_W / (left_W.sum() - left_W)) - np.log(right_W / (right_W.sum() - right_W))


def keywords(
    liked: Sequence[str], disliked: Sequence[str], vocabulary: Sequence[str], most: int
) -> tuple[list[str], list[str]]:
    """Return at most `most` words that a user likes, and as many that the user dislikes, strongest first.

    Words of equal strength have the order of `vocabulary`. A user without ratings has no keywords.
    """
    if len(vocabulary) < 2:
        return [], []
    liked_count, disliked_count = count_words(liked), count_words(disliked)
    ratio_W = log_odds(
        np.array([liked_count[word] for word in vocabulary], float),
        np.array([disliked_count[word] for word in vocabulary], float),
    )
    order = np.argsort(-ratio_W, kind="stable")
    return (
        [vocabulary[row] for row in order[:most] if ratio_W[row] > 0 and liked_count[vocabulary[row]]],
        [
            vocabulary[row]
            for row in np.argsort(ratio_W, kind="stable")[:most]
            if ratio_W[row] < 0 and disliked_count[vocabulary[row]]
        ],
    )
