"""LPIPS to the images that a user likes later: how far are generated images from them, to the eye?

Shapes: U users, S items of one user, L liked images of one user, Y X pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch

from rebeca_ray.config.evaluation import EvaluateConfig
from rebeca_ray.errors import InputError, describe
from rebeca_ray.studies.measure import Judge
from rebeca_ray.studies.pictures import picture_tensor, read_pictures
from rebeca_ray.studies.sets import ItemSet

LPIPS = "lpips"
SIZE = 64  # pixels per side, as its authors trained it
LIKED_PER_USER = 8  # the latest


class PerceptualJudge:
    """Learned perceptual image patch similarity (LPIPS, Zhang et al. 2018), by torchmetrics.

    Raises InputError if the network's weights cannot be loaded, and for liked items without an image.
    """

    def __init__(self, network: str, judge: Judge, config: EvaluateConfig) -> None:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        assert config.images is not None  # the config requires it
        try:
            metric = LearnedPerceptualImagePatchSimilarity(net_type=network)  # type: ignore[arg-type]
        except OSError as error:
            raise InputError(
                f"lpips {network}: its weights cannot be loaded ({describe(error)}); expected torchvision's "
                "server, or its file in the cache of torch.hub; copy it there, or leave lpips out"
            ) from None
        self.metric, self.device = metric.to(config.device), config.device
        ids = judge.ratings.items.item_id
        self.liked = [
            [str(ids[row]) for row in judge.ratings.likes_of_test(user)[-LIKED_PER_USER:]]
            for user in judge.user_U.tolist()
        ]
        self.pictures = read_pictures(config.images, {item for part in self.liked for item in part})

    @torch.no_grad()
    def distances(self, items: ItemSet) -> np.ndarray:
        """Return the mean LPIPS [U] over all pairs of a user's items and the user's liked test items."""
        return np.array(
            [
                self.mean_distance(
                    [items.encoded[row] for row in items.rows_of(user)],
                    [self.pictures[item] for item in liked],
                )
                for user, liked in enumerate(self.liked)
            ]
        )

    def mean_distance(self, generated: Sequence[bytes], liked: Sequence[bytes]) -> float:
        """Return the mean LPIPS over all pairs of two lists of encoded images."""
        one_SRYX, other_LRYX = (picture_tensor(part, SIZE).to(self.device) for part in (generated, liked))
        self.metric.reset()
        self.metric.update(
            one_SRYX.repeat_interleave(len(liked), dim=0), other_LRYX.repeat(len(generated), 1, 1, 1)
        )
        return float(self.metric.compute())
