"""How weights are trained: AdamW and its schedule, averages, adapters."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from unifork.config.base import Fraction01, StrictModel


class OptimizerConfig(StrictModel):
    """AdamW and its schedule."""

    learning_rate: PositiveFloat
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"]
    """Constant, or a cosine to zero at the last step."""
    warmup_steps: NonNegativeInt
    """Steps of linear warm-up from zero."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay."""
    betas: tuple[Fraction01, Fraction01] = (0.9, 0.999)
    """Decay of the first and second moments."""
    clip_norm: PositiveFloat = 1.0
    """Largest norm of the gradient over all trained tensors."""


class Averaging(StrictModel):
    """An exponential moving average of the weights that a stage trains."""

    decay: Annotated[float, Field(gt=0.0, lt=1.0)]
    """At step n of a track, n from 0, averages of what it trains keep min(decay, (1 + n) / (10 + n)) of themselves."""
    export: bool = True
    """Whether the stage's model has the averaged weights instead of the trained ones; a checkpoint has both."""


class Lora(StrictModel):
    """Adapters beside frozen linear maps: `W x + (alpha / rank) B A x`, of which A and B are trained (extra `lora`)."""

    rank: PositiveInt = 8
    """Rows of A and columns of B."""
    alpha: PositiveInt = 16
    """The product is multiplied by alpha / rank."""
    modules: tuple[str, ...]
    """Glob patterns of module names, such as `layers.*.q_proj`; they take the linear maps among what they match."""
