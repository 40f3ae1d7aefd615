"""The one object that says everything about a run: frozen, validated, addressed by dotted paths.

``ProjectConfig().with_overrides({"training.learning_rate": 3e-5})`` is how a trial, the command line and a notebook
change it; a wrong name or value is a ``UserError`` that names the path and what is allowed.
"""

import hashlib
import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Union

from fashionclip_tune.errors import UserError


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


# Of a field that changes no number of a run: paths, the device, logging, how data is fetched.
_NO_FINGERPRINT = {"fingerprint": False}


class _Section:
    """Converts and checks each field by its annotation, then calls ``_check`` for what a type cannot say."""

    _prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        section: Any = type(self)
        for name, annotation in _annotations(section).items():
            value = _converted(getattr(self, name), annotation, self._prefix + name)
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        pass

    def _require(self, condition: bool, name: str, allowed: str) -> None:
        if not condition:
            raise UserError(f"{self._prefix}{name} = {getattr(self, name)!r} is not allowed: {allowed}")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(_Section):
    """Optimisation, budget and data order of a run."""

    _prefix: ClassVar[str] = "training."

    batch_size: int = 64
    """Effective batch: photos whose embeddings meet in one loss."""
    num_workers: int = field(default=2, metadata=_NO_FINGERPRINT)
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
    checkpoint_minutes: float = field(default=10.0, metadata=_NO_FINGERPRINT)
    """A stage writes no checkpoint if the last one is younger; 0: every stage does."""
    shuffle_buffer: int = 20_000
    """Photos are permuted within windows of this many; 0: read in the order of the shards."""
    unique_products: bool = False
    """Never two photos of one product in a batch, where each would be a false negative of the other; it waits instead."""
    max_bad_share: float = field(default=0.01, metadata=_NO_FINGERPRINT)
    """The run stops when more than this share of its photos cannot be read."""
    seed: int = 0

    def _check(self) -> None:
        for name in ("batch_size", "checkpoint_interval", "epochs"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("num_workers", "weight_decay", "checkpoint_minutes", "shuffle_buffer", "seed"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        for name in ("max_steps", "budget_examples", "stage_examples", "max_grad_norm"):
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
class ModelConfig(_Section):
    """Where the weights come from."""

    _prefix: ClassVar[str] = "model."

    pretrained: str | None = field(default="default", metadata=_NO_FINGERPRINT)
    """``default``: the published tag of the model (tiny towers: pretrained here on synthetic garments); another OpenCLIP
    tag; a weights file; a folder as OpenCLIP's ``local-dir:`` reads it; none: random weights. A resumed run checks the
    weights' content, wherever they come from."""
    init_logit_bias: float = -10.0
    """Bias of the sigmoid loss for a model that was pretrained without one (SigLIP, section 3.2)."""
    cache_dir: Path | None = field(default=None, metadata=_NO_FINGERPRINT)
    """Where downloaded weights are kept; none: ``openclip_cache/`` below ``base_path``."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(_Section):
    """Learning rate over the run's whole budget."""

    _prefix: ClassVar[str] = "schedule."

    name: LearningRateSchedule = LearningRateSchedule.COSINE
    warmup_ratio: float = 0.05
    """Share of the steps in which the rate rises linearly."""

    def _check(self) -> None:
        self._require(0 <= self.warmup_ratio < 1, "warmup_ratio", "at least 0, below 1")


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig(_Section):
    _prefix: ClassVar[str] = "augmentation."

    caption: CaptionChoice = CaptionChoice.ORIGINAL
    original_caption_probability: float = 0.5
    """Of the first caption, where ``caption`` is weighted."""
    image_strength: float = 0.0
    """0: none; up to 1: random resized crop, flip and colour jitter of that strength."""

    def _check(self) -> None:
        self._require(0 <= self.image_strength <= 1, "image_strength", "from 0 to 1")
        self._require(0 <= self.original_caption_probability < 1, "original_caption_probability", "at least 0, below 1")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(_Section):
    _prefix: ClassVar[str] = "evaluation."

    batch_size: int = 64
    """Photos and captions encoded at a time; fixed, so that the training batch changes no bit of a metric."""

    def _check(self) -> None:
        self._require(self.batch_size >= 1, "batch_size", "at least 1")


@dataclass(frozen=True, kw_only=True)
class HardwareConfig(_Section):
    _prefix: ClassVar[str] = "hardware."

    precision: Precision = Precision.AUTO
    threads: int | None = None
    """Threads of CPU operations; sums depend on it, so a bit-exact resume needs it set. None: torch's default."""

    def _check(self) -> None:
        self._require(self.threads is None or self.threads >= 1, "threads", "at least 1, or none")


@dataclass(frozen=True, kw_only=True)
class ProjectConfig(_Section):
    """A whole run. The first block of fields is the published interface; the sections below it are ours."""

    clip_model: ClipModelOptions | str = ClipModelOptions.ViT_B_32
    loss_function: LossFunctionOptions = LossFunctionOptions.CONTRASTIVE
    on_colab: bool = field(default=False, metadata=_NO_FINGERPRINT)
    device: str = field(default="auto", metadata=_NO_FINGERPRINT)
    """``auto``: a GPU where there is one; else ``cpu``, ``cuda`` or ``cuda:N``."""
    dataset_root: Path | None = field(default=None, metadata=_NO_FINGERPRINT)
    train_shards_pattern: str | None = field(default=None, metadata=_NO_FINGERPRINT)
    """Brace notation below ``dataset_root``; none: what the folder's dataset.json or its file names say."""
    valid_shards_pattern: str | None = field(default=None, metadata=_NO_FINGERPRINT)
    train_eval_shards_pattern: str | None = field(default=None, metadata=_NO_FINGERPRINT)
    """Shards of the training set to be evaluated too, to see overfitting; none: not evaluated."""
    valid_eval_shards_pattern: str | None = field(default=None, metadata=_NO_FINGERPRINT)
    """Shards that the metrics come from; none: those of ``valid_shards_pattern``."""
    shardshuffle: bool = True
    should_load_checkpoint: bool = field(default=False, metadata=_NO_FINGERPRINT)
    checkpoint_path: Path | None = field(default=None, metadata=_NO_FINGERPRINT)

    training: TrainingConfig = field(default_factory=TrainingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def _check(self) -> None:
        self._require(bool(self.clip_model), "clip_model", "an OpenCLIP architecture name")
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
        return Path("/content/drive/MyDrive/fashionclip_tune") if self.on_colab else Path.cwd()

    @property
    def dataset_dir(self) -> Path:
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
        return {path: _plain(_at(self, path)) for path in override_paths()}

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any]) -> "ProjectConfig":
        return cls().with_overrides(flat)

    def fingerprint(self, *, data: str, weights: str) -> str:
        """A hash of whatever changes the run's numbers, given the content hashes of its data and its first weights."""
        settings = {path: _plain(_at(self, path)) for path in override_paths(only_fingerprinted=True)}
        text = json.dumps({**settings, "data": data, "weights": weights}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def override_paths(*, only_fingerprinted: bool = False) -> tuple[str, ...]:
    """Every dotted path that ``ProjectConfig.with_overrides`` accepts."""

    def walk(section: type, prefix: str) -> list[str]:
        paths = []
        for name, annotation in _annotations(section).items():
            counts = section.__dataclass_fields__[name].metadata.get("fingerprint", True)  # type: ignore[attr-defined]
            if is_dataclass(annotation):
                paths += walk(typing.cast(type, annotation), f"{name}.")
            elif counts or not only_fingerprinted:
                paths.append(prefix + name)
        return paths

    return tuple(walk(ProjectConfig, ""))


@cache
def _annotations(section: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(section)
    return {f.name: hints[f.name] for f in fields(section)}


def _at(config: ProjectConfig, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _converted(value: Any, annotation: Any, path: str) -> Any:
    """``value`` as the annotated type, text included; raises UserError where that is not possible."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        options = typing.get_args(annotation)
        if type(None) in options and (value is None or value == "none"):
            return None
        for option in options:
            try:
                if option is not type(None):
                    return _converted(value, option, path)
            except UserError:
                if option is options[-1] or options[-1] is type(None):
                    raise
        raise AssertionError(annotation)
    if annotation is Path and isinstance(value, str | Path):
        return Path(value).expanduser()
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        for member in annotation:
            if value is member or value in (member.value, member.name):
                return member
        raise UserError(f"{path} = {value!r} is not allowed: one of {', '.join(m.value for m in annotation)}")
    if is_dataclass(annotation) or annotation is str:
        if isinstance(value, typing.cast(type, annotation)):
            return value
    elif annotation is bool:
        if isinstance(value, bool) or value in ("true", "false"):
            return value in (True, "true")
    elif annotation in (int, float) and not isinstance(value, bool):
        try:
            if annotation is int and isinstance(value, int | str) and _WHOLE_NUMBER.fullmatch(str(value)):
                return int(value)  # exact beyond 2**53, where a float is not
            number = float(value)
            if annotation is int and number == int(number):
                return int(number)
            if annotation is float and number == number and abs(number) != float("inf"):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
    raise UserError(f"{path} = {value!r} is not allowed: {_TYPE_WORDS.get(annotation, annotation)} expected")


_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+")
_TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
