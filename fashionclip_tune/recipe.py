"""The sections of the configuration that say how weights move: which pairs attract, which rates, what stands still."""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from fashionclip_tune.sections import Section


class PositivePairs(str, Enum):
    """Which pairs of a batch belong together: photos of one product, and captions of the same words, do."""

    PAIR = "pair"  # a photo and its own caption only; all else is a negative, as OpenCLIP's losses have it
    ALL = "all"  # every photo and caption that belong together attract each other
    MASK = "mask"  # those that belong together but are not a pair neither attract nor repel each other


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    _prefix: ClassVar[str] = "loss."

    positives: PositivePairs = PositivePairs.PAIR
    """Changes nothing in a batch without two photos of one product and two equal captions (``training.unique_products``)."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """Rates of parts of the model, all below the schedule, and the average of the weights."""

    _prefix: ClassVar[str] = "optimizer."

    image_rate: float = 1.0
    """Factor on ``training.learning_rate`` for the image tower."""
    text_rate: float = 1.0
    layer_decay: float = 1.0
    """Each layer of both towers below the last has its rate multiplied by this once more: decay ** (L + 1 - depth), with
    depth 0 for the embeddings, 1 to L for the blocks (Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT)."""
    logit_learning_rate: float | None = None
    """Of scale and bias of the logits; none: ``training.learning_rate``."""
    ema_decay: float | None = None
    """An exponential moving average of the weights is what is evaluated and exported: average = decay * average +
    (1 - decay) * weights after each step, from the first weights on. None: the weights themselves."""

    def _check(self) -> None:
        for name in ("image_rate", "text_rate"):
            self._require(getattr(self, name) > 0, name, "above 0 (freeze.image_tower and freeze.text_tower stop a tower)")
        self._require(0 < self.layer_decay <= 1, "layer_decay", "above 0, at most 1")
        rate = self.logit_learning_rate
        self._require(rate is None or 0 <= rate <= 1, "logit_learning_rate", "from 0 to 1, or none")
        self._require(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", "above 0, below 1, or none")


@dataclass(frozen=True, kw_only=True)
class FreezeConfig(Section):
    """What keeps its first weights: it has no gradient and no optimizer state, so it costs less memory and time."""

    _prefix: ClassVar[str] = "freeze."

    image_tower: bool = False
    text_tower: bool = False
    token_embedding: bool = False
    """Half of SigLIP2's parameters."""
    image_blocks: int = 0
    """The patch embedding and the first so many blocks of the image tower."""
    text_blocks: int = 0
    """The token and position embeddings and the first so many blocks of the text tower."""

    def _check(self) -> None:
        for name in ("image_blocks", "text_blocks"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        both = self.image_tower and self.text_tower
        self._require(not both, "text_tower", "false where freeze.image_tower is set: nothing would be trained")
