"""The sections of the configuration."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from fashionclip_tune.config.choices import (
    BatchNorms,
    CaptionChoice,
    LearningRateSchedule,
    PositivePairs,
    Precision,
    RetrievalProtocol,
)
from fashionclip_tune.config.section import NO_FINGERPRINT, Section

EDITION = 2


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
    """Optimisation, budget and data order of a run."""

    _prefix: ClassVar[str] = "training."

    batch_size: int = 64
    """Effective batch: photos whose embeddings meet in one loss."""
    micro_batch_size: int | None = field(default=None, metadata=NO_FINGERPRINT)
    """Photos encoded at a time; none: the whole batch. Loss and gradients are those of the batch, up to rounding, for one
    more forward pass. A run that runs out of memory halves it by itself; a resumed one goes on with the smaller one."""
    num_workers: int = field(default=2, metadata=NO_FINGERPRINT)
    """Loader processes; 0 loads in the training process. Changes no number."""
    learning_rate: float = 1e-5
    """The highest of the schedule; ``optimizer.*`` has factors on it for parts of the model."""
    weight_decay: float = 0.05
    """AdamW's decoupled decay; never applied to biases, norms, scale and bias of the logits."""
    beta1: float = 0.9
    """AdamW's decay of the mean of the gradients."""
    beta2: float = 0.98
    """AdamW's decay of the mean of their squares."""
    epsilon: float = 1e-6
    """AdamW's addition to the denominator."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this global norm; none: not clipped."""
    checkpoint_interval: int = 500
    """Steps between evaluations (a stage), where ``stage_examples`` is not given."""
    max_steps: int | None = None
    """Overrides ``epochs``."""
    epochs: int = 5
    """Passes over the training photos, in whole batches."""
    budget_examples: int | None = None
    """Overrides ``max_steps`` and ``epochs``; a multiple of the stage. A sweep sets it, equal for all its trials."""
    stage_examples: int | None = None
    """Examples between evaluations; a multiple of the batch size. Overrides ``checkpoint_interval``."""
    checkpoint_minutes: float = field(default=10.0, metadata=NO_FINGERPRINT)
    """A stage writes no checkpoint if the last one is younger; 0: every stage does."""
    shuffle_buffer: int = 20_000
    """Photos are permuted within windows of this many; 0: read in the order of the shards."""
    unique_products: bool = False
    """Never two photos of one product in a batch, where each would be a false negative of the other; it waits instead."""
    max_bad_share: float = field(default=0.01, metadata=NO_FINGERPRINT)
    """The run stops when more than this share of its photos cannot be read."""
    seed: int = 0
    """Of all that is drawn: the order of photos, captions, augmentation, dropout, random weights."""
    edition: int = EDITION
    """Of the arithmetic, where a later version of this package changed bits. 1: captions are computed at their full length, and
    all of the token table is trained. 2: captions are cut to the longest of the batch where nothing behind their end counts,
    only the rows of the token table that occur in training are trained, and attention in OpenCLIP's own towers sums its
    gradients in another order. What began earlier goes on with its own."""

    def _check(self) -> None:
        self._require(1 <= self.edition <= EDITION, "edition", f"from 1 to {EDITION}")
        for name in ("batch_size", "checkpoint_interval", "epochs"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("num_workers", "weight_decay", "checkpoint_minutes", "shuffle_buffer", "seed"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        for name in ("micro_batch_size", "max_steps", "budget_examples", "stage_examples", "max_grad_norm"):
            self._require(getattr(self, name) is None or getattr(self, name) > 0, name, "above 0, or none")
        self._require(0 < self.learning_rate <= 1, "learning_rate", "above 0, at most 1")
        self._require(self.epsilon > 0, "epsilon", "above 0")
        for name in ("beta1", "beta2", "max_bad_share"):
            self._require(0 <= getattr(self, name) < 1, name, "at least 0, below 1")
        if self.stage_examples is not None:
            self._require(
                self.stage_examples % self.batch_size == 0,
                "stage_examples",
                f"a multiple of training.batch_size = {self.batch_size}",
            )
        if self.budget_examples is not None:
            stage_examples = self.stage_examples or self.checkpoint_interval * self.batch_size
            self._require(
                self.budget_examples % stage_examples == 0,
                "budget_examples",
                f"a multiple of the stage of {stage_examples} examples",
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Where the weights come from."""

    _prefix: ClassVar[str] = "model."

    pretrained: str | None = field(default="default", metadata=NO_FINGERPRINT)
    """``default``: the published tag of the model (tiny towers: pretrained here on synthetic garments; ``local-dir:`` and
    ``hf-hub:``: those there); another OpenCLIP tag; a weights file; a folder as OpenCLIP's ``local-dir:`` reads it; none:
    random weights. A resumed run checks the weights' content, wherever they come from."""
    init_logit_bias: float | None = None
    """Bias of the sigmoid loss for a model that was pretrained without one; none: that with which the loss of the first
    batch is least, since -10 (SigLIP, section 3.2) goes with SigLIP's own first scale of 10 and not with CLIP's 100."""
    patch_dropout: float = 0.0
    """Share of the patches that the image tower does not see in training, drawn for each photo (FLIP, Li et al. 2023)."""
    batch_norm: BatchNorms = BatchNorms.FIXED
    """Batch norms in training, where a model has some. ``fixed``: by their pretrained statistics, which stay; their weights are
    trained. ``update``: by those of each batch, which move the stored ones, but for what is frozen; such a step takes the whole
    batch in one pass. ``legacy``: what began before there was this setting goes on so; nothing else should have it."""
    cache_dir: Path | None = field(default=None, metadata=NO_FINGERPRINT)
    """Where downloaded weights are kept; none: ``openclip_cache/`` below ``base_path``."""

    def _check(self) -> None:
        self._require(0 <= self.patch_dropout < 1, "patch_dropout", "at least 0, below 1")
        if self.pretrained is not None and ("/" in self.pretrained or Path(self.pretrained).suffix):  # a path; no tag has these
            object.__setattr__(self, "pretrained", str(Path(self.pretrained).expanduser().absolute()))


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """Learning rate over the run's whole budget."""

    _prefix: ClassVar[str] = "schedule."

    name: LearningRateSchedule = LearningRateSchedule.COSINE
    """What the rate does after the warm-up."""
    warmup_ratio: float = 0.05
    """Share of the steps in which the rate rises linearly."""

    def _check(self) -> None:
        self._require(0 <= self.warmup_ratio < 1, "warmup_ratio", "at least 0, below 1")


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig(Section):
    """What is drawn anew each time that a photo is trained on. Evaluation takes no part in it."""

    _prefix: ClassVar[str] = "augmentation."

    caption: CaptionChoice = CaptionChoice.ORIGINAL
    """Which of a photo's captions is trained on."""
    original_caption_probability: float = 0.5
    """Of the first caption, where ``caption`` is weighted."""
    image_strength: float = 0.0
    """0: none; up to 1: random resized crop, flip and colour jitter of that strength, and what is switched on below."""
    rand_augment: bool = False
    """RandAugment, two operations a photo, in the place of the colour jitter."""
    erasing: bool = False
    """Random erasing: a rectangle of one colour covers a part of every other photo."""

    def _check(self) -> None:
        self._require(0 <= self.image_strength <= 1, "image_strength", "from 0 to 1")
        self._require(0 <= self.original_caption_probability < 1, "original_caption_probability", "at least 0, below 1")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """How recall is measured; docs/evaluation.md explains the protocols."""

    _prefix: ClassVar[str] = "evaluation."

    batch_size: int = 64
    """Photos and captions encoded at a time; fixed, so that the training batch changes no bit of a metric."""
    protocol: RetrievalProtocol = RetrievalProtocol.INSTANCE
    """Of all recalls, one of which a sweep maximises (``--metric``); ``product`` where products have several photos."""

    def _check(self) -> None:
        self._require(self.batch_size >= 1, "batch_size", "at least 1")


@dataclass(frozen=True, kw_only=True)
class ReadingConfig(Section):
    """How shards are reached; changes no number."""

    _prefix: ClassVar[str] = "reading."

    allow_remote: bool = field(default=False, metadata=NO_FINGERPRINT)
    """Shards may be URLs (https, s3, gs) or ``pipe:`` commands, which reach out or run what they name."""
    scratch: Path | None = field(default=None, metadata=NO_FINGERPRINT)
    """A folder on a fast local disk: shards are copied there ahead of use; none: files are read where they are, copies of
    remote shards, and decoded photos to evaluate on, are kept in the cache folder."""
    scratch_gb: float = field(default=20.0, metadata=NO_FINGERPRINT)
    """Copies take at most this many GB (10**9 bytes), decoded photos to evaluate on at most half as many beside them; what was
    used longest ago makes room."""
    stall_s: float = field(default=300.0, metadata=NO_FINGERPRINT)
    """A loader process that makes no headway for this many seconds ends the run; a copy is given up after half of it."""

    def _check(self) -> None:
        self._require(self.scratch_gb > 0, "scratch_gb", "above 0")
        self._require(self.stall_s > 0, "stall_s", "above 0")


@dataclass(frozen=True, kw_only=True)
class HardwareConfig(Section):
    """What the device is asked for."""

    _prefix: ClassVar[str] = "hardware."

    precision: Precision = Precision.AUTO
    """Of the towers, by autocast; the loss and the optimizer are in fp32."""
    threads: int | None = None
    """Threads of CPU operations; sums depend on it, so a bit-exact resume needs it set; none: torch's default."""
    gradient_checkpointing: bool = field(default=False, metadata=NO_FINGERPRINT)
    """Blocks are computed again in the backward pass instead of being kept: less memory, a third more time, the same
    gradients."""
    compile: bool = False
    """Both towers go through ``torch.compile`` in training; evaluation does not. Needs a C++ compiler, on a GPU Triton too. The
    first step takes minutes, and so may two more, with captions of another length and of full length: 173, 54 and 52 s for
    ``tiny-clip`` on a busy CPU core, where a step then took 0.97 of its time."""
    deterministic: bool = field(default=True, metadata=NO_FINGERPRINT)
    """On a GPU, where the same run gives the same bits only with kernels that may be slower; a run warns of operations that
    have none. On a CPU the same threads do."""
    device_share: float = field(default=1.0, metadata=NO_FINGERPRINT)
    """The run's share of its device: a second of its work counts as so many seconds of the device (``device_s``)."""

    def _check(self) -> None:
        self._require(0 < self.device_share <= 1, "device_share", "above 0, at most 1")
        self._require(self.threads is None or self.threads >= 1, "threads", "at least 1, or none")


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """Which loss is ``loss_function``; what counts as a positive in it is here."""

    _prefix: ClassVar[str] = "loss."

    positives: PositivePairs = PositivePairs.PAIR
    """What photos of one product and equal captions are to each other.
    Changes nothing in a batch without two photos of one product and two equal captions (``training.unique_products``)."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """Rates of parts of the model, all below the schedule, and the average of the weights."""

    _prefix: ClassVar[str] = "optimizer."

    image_rate: float = 1.0
    """Factor on ``training.learning_rate`` for the image tower."""
    text_rate: float = 1.0
    """Likewise for the text tower."""
    layer_decay: float = 1.0
    """Each layer of both towers below the last has its rate multiplied by this once more: decay ** (L + 1 - depth), with
    depth 0 for the embeddings, 1 to L for the blocks (Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT). In an image tower of
    timm's that is no plain transformer, timm's grouping says what is a block: its stem is at 0, what it leaves out at L + 1."""
    logit_learning_rate: float | None = None
    """Of scale and bias of the logits; none: ``training.learning_rate``."""
    ema_decay: float | None = None
    """An exponential moving average of the weights is what is evaluated and exported: average = decay * average +
    (1 - decay) * weights after each step, from the first weights on; statistics of batch norms that move are averaged too;
    none: the weights themselves."""

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
    """All of the image tower, the statistics of its batch norms included."""
    text_tower: bool = False
    """All of the text tower; never both."""
    token_embedding: bool = False
    """The text tower's table of token embeddings, of which the rows are trained that occur in the captions."""
    image_blocks: int = 0
    """The patch embedding and the first so many blocks of the image tower. In one of timm's that is no plain transformer: the
    stem and the first so many groups of timm's finest grouping (``group_matcher``), most often a residual block each."""
    text_blocks: int = 0
    """The token and position embeddings and the first so many blocks of the text tower."""

    def _check(self) -> None:
        for name in ("image_blocks", "text_blocks"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        both = self.image_tower and self.text_tower
        self._require(not both, "text_tower", "false where freeze.image_tower is set: nothing would be trained")
