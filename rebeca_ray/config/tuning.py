"""The config of `rebeca tune`: a training, and the settings to choose from."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from rebeca_ray.config.fields import Effect, LearningRate, Location, Positive, Size
from rebeca_ray.config.jobs import JobConfig, TrainConfig

Point = Mapping[str, float]  # a value per list of the grid

GRID = {  # of this config -> of the training
    "num_layers": ("network", "num_layers"),
    "num_heads": ("network", "num_heads"),
    "width": ("network", "width"),
    "num_tokens": ("network", "num_tokens"),
    "num_user_tokens": ("network", "num_user_tokens"),
    "learning_rate": ("optimization", "learning_rate"),
    "samples_per_user": ("optimization", "samples_per_user"),
}


class TuneConfig(JobConfig):
    """`rebeca tune`: trainings on a grid -> their validation losses, and the settings of the best."""

    train: TrainConfig
    """Training that every trial starts from. Its `out` receives no prior."""
    num_layers: Annotated[tuple[Size, ...], Field(strict=False), Effect.ITEM] = ()
    """Values of `network.num_layers`. By default, that of `train`, as for the lists below."""
    num_heads: Annotated[tuple[Size, ...], Field(strict=False), Effect.ITEM] = ()
    """Values of `network.num_heads`."""
    width: Annotated[tuple[Size, ...], Field(strict=False), Effect.ITEM] = ()
    """Values of `network.width`."""
    num_tokens: Annotated[tuple[Size, ...], Field(strict=False), Effect.ITEM] = ()
    """Values of `network.num_tokens`."""
    num_user_tokens: Annotated[tuple[Size, ...], Field(strict=False), Effect.ITEM] = ()
    """Values of `network.num_user_tokens`."""
    learning_rate: Annotated[tuple[LearningRate, ...], Field(strict=False), Effect.ITEM] = ()
    """Values of `optimization.learning_rate`."""
    samples_per_user: Annotated[tuple[Positive, ...], Field(strict=False), Effect.ITEM] = ()
    """Values of `optimization.samples_per_user`."""
    grace_epochs: Annotated[Positive, Effect.ITEM] = 10
    """Epochs that every trial gets before the worse ones are stopped (ASHA)."""
    reduction: Annotated[int, Field(ge=2, le=100), Effect.ITEM] = 3
    """At each halving, one of this many trials goes on."""
    max_concurrent: Annotated[Positive, Effect.SPEED] = 1
    """Trials at a time. Each has the workers of `train`."""
    out: Annotated[Location, Effect.NOTHING]
    """Folder that receives `trials.parquet`, `trials.png` and the trials' checkpoints."""

    def points(self) -> dict[str, tuple[float, ...]]:
        """Return the lists of the grid that have values."""
        return {name: values for name in GRID if (values := getattr(self, name))}

    def at(self, point: Point) -> TrainConfig:
        """Return the training of one point of the grid. Raises ValidationError for one that cannot be."""
        values = self.train.model_dump()
        for name, value in point.items():
            section, field = GRID[name]
            values[section][field] = value
        return TrainConfig.model_validate({**values, "preset": None})
