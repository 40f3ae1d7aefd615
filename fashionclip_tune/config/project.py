"""The one object that says everything about a run: frozen, validated, addressed by dotted paths.

``ProjectConfig().with_overrides({"training.learning_rate": 3e-5})`` is how a trial, the command line and a notebook
change it; a wrong name or value is a ``UserError`` that names the path and what is allowed.
"""

import hashlib
import json
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from fashionclip_tune.config.choices import ClipModelOptions, LossFunctionOptions
from fashionclip_tune.config.options import (
    AugmentationConfig,
    EvaluationConfig,
    FreezeConfig,
    HardwareConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ReadingConfig,
    ScheduleConfig,
    TrainingConfig,
)
from fashionclip_tune.config.section import NO_FINGERPRINT, Section, dotted_paths, plain, value_at
from fashionclip_tune.config.start_names import HUB_PREFIX, LOCAL_PREFIX, absolute
from fashionclip_tune.errors import UserError

COLAB_BASE_PATH = Path("/content/drive/MyDrive/fashionclip_tune")


@dataclass(frozen=True, kw_only=True)
class ProjectConfig(Section):
    """A whole run: what is trained, on what data, on what device."""

    # The first block of fields is the published interface; the sections below it are ours.

    clip_model: ClipModelOptions | str = ClipModelOptions.ViT_B_32
    """What the run starts from, architecture and weights: one of OpenCLIP's names with its published weights, another of its
    tags (``ARCHITECTURE/TAG``), a weights file (``ARCHITECTURE=FILE``), a model on the hub (``hf-hub:OWNER/NAME``, kept in the
    hub's own cache), or a folder (``local-dir:FOLDER``, or its path): of OpenCLIP, of a run, a checkpoint or a sweep."""
    loss_function: LossFunctionOptions = LossFunctionOptions.CONTRASTIVE
    """The contrastive loss between the photos and captions of a batch."""
    on_colab: bool = field(default=False, metadata=NO_FINGERPRINT)
    """``base_path`` is ``/content/drive/MyDrive/fashionclip_tune`` instead of the working directory."""
    device: str = field(default="auto", metadata=NO_FINGERPRINT)
    """``auto``: a GPU where there is one; else ``cpu``, ``cuda`` or ``cuda:N``."""
    dataset_root: Path | str | None = field(default=None, metadata=NO_FINGERPRINT)
    """Folder of shards, or its URL (see ``reading.allow_remote``); none: ``dataset/`` below ``base_path``."""
    train_shards_pattern: str | None = field(default=None, metadata=NO_FINGERPRINT)
    """Brace notation below ``dataset_root``, or URLs; none: what the folder's dataset.json or its file names say."""
    valid_shards_pattern: str | None = field(default=None, metadata=NO_FINGERPRINT)
    """Likewise, of the validation shards."""
    train_eval_shards_pattern: str | None = field(default=None, metadata=NO_FINGERPRINT)
    """Shards of the training set to be evaluated too, to see overfitting; none: not evaluated."""
    valid_eval_shards_pattern: str | None = field(default=None, metadata=NO_FINGERPRINT)
    """Shards that the metrics come from; none: those of ``valid_shards_pattern``."""
    shardshuffle: bool = True
    """Shards are read in a random order, another one in each epoch."""
    should_load_checkpoint: bool = field(default=False, metadata=NO_FINGERPRINT)
    """Starts from the weights at ``checkpoint_path``, at step 0."""
    checkpoint_path: Path | None = field(default=None, metadata=NO_FINGERPRINT)
    """A checkpoint of this project, a weights file or an OpenCLIP folder; needed by ``should_load_checkpoint``."""

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
        try:
            name = absolute(self.model_name)
        except ValueError as error:
            raise UserError(f"clip_model = {self.model_name!r} is not allowed: {error}") from error
        self._require(name not in ("", LOCAL_PREFIX, HUB_PREFIX), "clip_model", "an OpenCLIP architecture name")
        if name != self.model_name:
            object.__setattr__(self, "clip_model", name)
        known = re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", self.device) is not None
        self._require(known, "device", "auto, cpu, cuda or cuda:N")
        needs_path = self.should_load_checkpoint and self.checkpoint_path is None
        self._require(not needs_path, "checkpoint_path", "a checkpoint, since should_load_checkpoint is set")

    @property
    def model_name(self) -> str:
        """``clip_model`` as text."""
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
