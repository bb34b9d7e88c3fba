"""The verifier's section of a config: the model that judges liking, independently of the prior's selector."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rebeca_ray.config.fields import (
    Device,
    Effect,
    Fraction,
    FractionBelow1,
    LearningRate,
    Positive,
    Seed,
    Settings,
    Size,
)


class VerifierSettings(Settings):
    """The verifier and its training (paper, evaluation). Batch, schedules and patience are the authors'.

    A verifier changes no item. Its settings are marked as an item's are, because they name its training.
    """

    kind: Annotated[Literal["bilinear", "ncf"], Effect.ITEM] = "bilinear"
    """Form of the verifier: `bilinear` as in the paper's first version, or `ncf` (neural collaborative
    filtering) as in its second."""
    num_factors: Annotated[int, Field(ge=0, le=65_536), Effect.ITEM] = 80
    """Dimension of a user's taste. At 0, users differ in generosity alone, and not in taste: the authors'
    control of the form `bilinear`."""
    hidden_sizes: Annotated[tuple[Size, Size], Field(strict=False), Effect.ITEM] = (64, 32)
    """Widths of the two hidden layers of the form `ncf`."""
    dropout: Annotated[FractionBelow1, Effect.ITEM] = 0.1
    """Probability that training drops a hidden unit of the form `ncf`."""
    learning_rate: Annotated[LearningRate, Effect.ITEM] = 1e-2
    """Learning rate at the start (Adam)."""
    weight_decay: Annotated[Fraction, Effect.ITEM] = 1e-4
    """L2 regularisation of all weights, those of the users included (Adam)."""
    learning_rate_decay: Annotated[float, Field(gt=0, le=1), Effect.ITEM] = 0.999
    """Factor by which each epoch of the form `bilinear` multiplies the learning rate."""
    plateau_factor: Annotated[float, Field(gt=0, lt=1), Effect.ITEM] = 0.5
    """Factor by which the form `ncf` multiplies the learning rate when validation stalls."""
    plateau_patience: Annotated[Positive, Effect.ITEM] = 5
    """Epochs without a better validation loss that the form `ncf` tolerates before it lowers the learning
    rate."""
    batch_size: Annotated[Positive | None, Effect.ITEM] = None
    """Ratings per optimizer step. By default, each step takes all of them."""
    max_epochs: Annotated[Positive, Effect.ITEM] = 10_000
    """Most epochs of the training."""
    early_stopping_patience: Annotated[Positive, Effect.ITEM] = 30
    """Epochs without a better validation loss after which training ends."""
    early_stopping_tolerance: Annotated[Fraction, Effect.ITEM] = 1e-4
    """Decrease of the validation loss that counts as better."""
    validation_share: Annotated[float, Field(gt=0, lt=1), Effect.ITEM] = 0.1
    """Fraction of the verifier's ratings, drawn at random, that decide when its training ends."""
    seed: Annotated[Seed, Effect.ITEM] = 42
    """Seed of the validation split, the initial weights, the batches and the dropout."""
    device: Annotated[Device, Effect.PLAN] = "cpu"
    """Device that trains the verifier."""

    @model_validator(mode="after")
    def check_factors(self) -> Self:
        if self.kind == "ncf" and not self.num_factors:
            raise ValueError("num_factors is 0, but the form ncf needs factors; give at least 1")
        return self
