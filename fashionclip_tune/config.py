"""The one object that says everything about a run: frozen, validated, addressed by dotted paths.

``ProjectConfig().with_overrides({"training.learning_rate": 3e-5})`` is how a trial, the command line and a notebook
change it; a wrong name or value is a ``UserError`` that names the path and what is allowed.
"""

import hashlib
import json
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from fashionclip_tune.errors import UserError
from fashionclip_tune.recipe import FreezeConfig, LossConfig, OptimizerConfig
from fashionclip_tune.sections import NO_FINGERPRINT, Section, dotted_paths, plain, value_at

# How OpenCLIP's names of models that it does not list begin: a folder's, and those of a place on the hub.
LOCAL_PREFIX, HUB_PREFIX = "local-dir:", "hf-hub:"

COLAB_BASE_PATH = Path("/content/drive/MyDrive/fashionclip_tune")


class ClipModelOptions(str, Enum):
    """The three published models, by their OpenCLIP architecture names."""

    ViT_B_32 = "ViT-B-32"
    ViT_B_16 = "ViT-B-16"
    ViT_SigLIP_2_16 = "ViT-B-16-SigLIP2-256"


class LossFunctionOptions(str, Enum):
    CONTRASTIVE = "contrastive"  # InfoNCE
    SIGLIP = "siglip"  # sigmoid BCE


class CaptionChoice(str, Enum):
    ORIGINAL = "original"  # the first caption, always
    UNIFORM = "uniform"  # any of the sample's captions, drawn anew each time
    WEIGHTED = "weighted"  # the first with a set probability, else any of the others


class Precision(str, Enum):
    AUTO = "auto"  # on a GPU bf16 where it has hardware for it, else fp16; on a CPU fp32
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class LearningRateSchedule(str, Enum):
    COSINE = "cosine"
    CONSTANT = "constant"


class Protocol(str, Enum):
    """What counts as right in an evaluation, and among what: see ``protocols`` and docs/evaluation.md."""

    INSTANCE = "instance"  # photo i's first caption, for photo i only
    PRODUCT = "product"  # one text a product, any photo of the product
    CANDIDATES_101 = "candidates_101"  # against 100 others of the same category
    ALL_CAPTIONS = "all_captions"  # every caption of a photo is a query


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
    weight_decay: float = 0.05
    """AdamW's decoupled decay; never applied to biases, norms, scale and bias of the logits."""
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-6
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this global norm; None: not clipped."""
    checkpoint_interval: int = 500
    """Steps between evaluations (a stage), where ``stage_examples`` is not given."""
    max_steps: int | None = None
    """Overrides ``epochs``."""
    epochs: int = 5
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

    def _check(self) -> None:
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
    """Bias of the sigmoid loss for a model that was pretrained without one. None: that with which the loss of the first
    batch is least, since -10 (SigLIP, section 3.2) goes with SigLIP's own first scale of 10 and not with CLIP's 100."""
    patch_dropout: float = 0.0
    """Share of the patches that the image tower does not see in training, drawn for each photo (FLIP, Li et al. 2023)."""
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
    warmup_ratio: float = 0.05
    """Share of the steps in which the rate rises linearly."""

    def _check(self) -> None:
        self._require(0 <= self.warmup_ratio < 1, "warmup_ratio", "at least 0, below 1")


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig(Section):
    _prefix: ClassVar[str] = "augmentation."

    caption: CaptionChoice = CaptionChoice.ORIGINAL
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
    _prefix: ClassVar[str] = "evaluation."

    batch_size: int = 64
    """Photos and captions encoded at a time; fixed, so that the training batch changes no bit of a metric."""
    protocol: Protocol = Protocol.INSTANCE
    """Of ``recall_at_10``, the objective of a sweep; ``product`` where products have several photos."""

    def _check(self) -> None:
        self._require(self.batch_size >= 1, "batch_size", "at least 1")


@dataclass(frozen=True, kw_only=True)
class ReadingConfig(Section):
    """How shards are reached; changes no number."""

    _prefix: ClassVar[str] = "reading."

    allow_remote: bool = field(default=False, metadata=NO_FINGERPRINT)
    """Shards may be URLs (https, s3, gs) or ``pipe:`` commands, which reach out or run what they name."""
    scratch: Path | None = field(default=None, metadata=NO_FINGERPRINT)
    """A folder on a fast local disk: shards are copied there ahead of use. None: files are read where they are, copies of
    remote shards are kept in the cache folder."""
    scratch_gb: float = field(default=20.0, metadata=NO_FINGERPRINT)
    """Copies take at most this many GB (10**9 bytes); those used longest ago make room."""
    stall_s: float = field(default=300.0, metadata=NO_FINGERPRINT)
    """A loader process that makes no headway for this many seconds ends the run; a copy is given up after half of it."""

    def _check(self) -> None:
        self._require(self.scratch_gb > 0, "scratch_gb", "above 0")
        self._require(self.stall_s > 0, "stall_s", "above 0")


@dataclass(frozen=True, kw_only=True)
class HardwareConfig(Section):
    _prefix: ClassVar[str] = "hardware."

    precision: Precision = Precision.AUTO
    threads: int | None = None
    """Threads of CPU operations; sums depend on it, so a bit-exact resume needs it set. None: torch's default."""
    gradient_checkpointing: bool = field(default=False, metadata=NO_FINGERPRINT)
    """Blocks are computed again in the backward pass instead of being kept: less memory, a third more time, the same
    gradients."""
    compile: bool = False
    """Both towers go through ``torch.compile`` in training; evaluation does not. Needs a C++ compiler, on a GPU Triton too;
    the first step takes a minute or more."""

    deterministic: bool = field(default=True, metadata=NO_FINGERPRINT)
    """On a GPU, where the same run gives the same bits only with kernels that may be slower; a run warns of operations that
    have none. On a CPU the same threads do."""

    device_share: float = field(default=1.0, metadata=NO_FINGERPRINT)
    """The run's share of its device: a second of its work counts as so many seconds of the device (``device_s``)."""

    def _check(self) -> None:
        self._require(0 < self.device_share <= 1, "device_share", "above 0, at most 1")
        self._require(self.threads is None or self.threads >= 1, "threads", "at least 1, or none")


@dataclass(frozen=True, kw_only=True)
class ProjectConfig(Section):
    """A whole run. The first block of fields is the published interface; the sections below it are ours."""

    clip_model: ClipModelOptions | str = ClipModelOptions.ViT_B_32
    """An architecture of OpenCLIP's list, or, with weights and tokenizer, an OpenCLIP folder (``local-dir:FOLDER``) or one on
    the hub (``hf-hub:OWNER/NAME``, kept in the hub's own cache)."""
    loss_function: LossFunctionOptions = LossFunctionOptions.CONTRASTIVE
    on_colab: bool = field(default=False, metadata=NO_FINGERPRINT)
    device: str = field(default="auto", metadata=NO_FINGERPRINT)
    """``auto``: a GPU where there is one; else ``cpu``, ``cuda`` or ``cuda:N``."""
    dataset_root: Path | str | None = field(default=None, metadata=NO_FINGERPRINT)
    """Folder of shards, or its URL (see ``reading.allow_remote``); none: ``dataset/`` below ``base_path``."""
    train_shards_pattern: str | None = field(default=None, metadata=NO_FINGERPRINT)
    """Brace notation below ``dataset_root``, or URLs; none: what the folder's dataset.json or its file names say."""
    valid_shards_pattern: str | None = field(default=None, metadata=NO_FINGERPRINT)
    train_eval_shards_pattern: str | None = field(default=None, metadata=NO_FINGERPRINT)
    """Shards of the training set to be evaluated too, to see overfitting; none: not evaluated."""
    valid_eval_shards_pattern: str | None = field(default=None, metadata=NO_FINGERPRINT)
    """Shards that the metrics come from; none: those of ``valid_shards_pattern``."""
    shardshuffle: bool = True
    should_load_checkpoint: bool = field(default=False, metadata=NO_FINGERPRINT)
    checkpoint_path: Path | None = field(default=None, metadata=NO_FINGERPRINT)

    training: TrainingConfig = field(default_factory=TrainingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    reading: ReadingConfig = field(default_factory=ReadingConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def _check(self) -> None:
        name = self.model_name
        self._require(name not in ("", LOCAL_PREFIX, HUB_PREFIX), "clip_model", "an OpenCLIP architecture name")
        if name.startswith(LOCAL_PREFIX):  # what is recorded means the same elsewhere: trials change their folder
            folder = Path(name.removeprefix(LOCAL_PREFIX)).expanduser().resolve()
            object.__setattr__(self, "clip_model", f"{LOCAL_PREFIX}{folder}")
        known = re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", self.device) is not None
        self._require(known, "device", "auto, cpu, cuda or cuda:N")
        needs_path = self.should_load_checkpoint and self.checkpoint_path is None
        self._require(not needs_path, "checkpoint_path", "a checkpoint, since should_load_checkpoint is set")

    @property
    def model_name(self) -> str:
        """The OpenCLIP architecture name."""
        return self.clip_model.value if isinstance(self.clip_model, ClipModelOptions) else self.clip_model

    @property
    def base_path(self) -> Path:
        return COLAB_BASE_PATH if self.on_colab else Path.cwd()

    @property
    def dataset_dir(self) -> Path | str:
        return self.dataset_root if self.dataset_root is not None else self.base_path / "dataset"

    @property
    def checkpoint_dir(self) -> Path:
        return self.base_path / "checkpoints"

    @property
    def evaluation_dir(self) -> Path:
        return self.base_path / "evaluations"

    @property
    def model_cache_dir(self) -> Path:
        return self.model.cache_dir or self.base_path / "openclip_cache"

    def with_overrides(self, overrides: Mapping[str, Any]) -> "ProjectConfig":
        """A new config with values set by dotted path; values may be text, as a command line gives them.

        Raises:
            UserError: names the path, and the allowed paths or values.
        """
        top: dict[str, Any] = {}
        nested: dict[str, dict[str, Any]] = {}
        for path, value in overrides.items():
            if path not in override_paths():
                raise UserError(f"{path!r} is no setting: allowed are {', '.join(override_paths())}")
            section, _, name = path.rpartition(".")
            if section:
                nested.setdefault(section, {})[name] = value
            else:
                top[path] = value
        sections = {section: replace(getattr(self, section), **values) for section, values in nested.items()}
        return replace(self, **top, **sections)

    def to_dict(self) -> dict[str, Any]:
        """All settings, flat by dotted path, as JSON types: what ``with_overrides`` takes."""
        return {path: plain(value_at(self, path)) for path in override_paths()}

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any]) -> "ProjectConfig":
        return cls().with_overrides(flat)

    def fingerprint(self, *, data: str, weights: str, known: Container[str] | None = None) -> str:
        """A hash of whatever changes the run's numbers, given the content hashes of its data and its first weights.

        ``known``: of these settings only, as a version that had no others made it.
        """
        paths = override_paths(only_fingerprinted=True)
        settings = {path: plain(value_at(self, path)) for path in paths if known is None or path in known}
        text = json.dumps({**settings, "data": data, "weights": weights}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def override_paths(*, only_fingerprinted: bool = False) -> tuple[str, ...]:
    """Every dotted path that ``ProjectConfig.with_overrides`` accepts."""
    return tuple(dotted_paths(ProjectConfig, only_fingerprinted=only_fingerprinted))
