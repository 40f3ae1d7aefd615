"""What a run tells its caller, what it asks, and what it returns."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from fashionclip_tune.data.index import BadSample
from fashionclip_tune.progress import OnPhase, no_phases
from fashionclip_tune.training.history import Row

OnEval = Callable[[Row], None]
RoomFor = Callable[[int], AbstractContextManager[None]]
"""Within, a checkpoint of so many bytes may be written; raises StorageError where there is no room for it."""


def any_room(num_bytes: int) -> AbstractContextManager[None]:
    """As much as the disk has."""
    return nullcontext()


@dataclass(frozen=True)
class RunCallbacks:
    """A run calls these from the thread that trains; each by default does nothing."""

    on_evaluation: OnEval = lambda row: None
    """``on_eval`` of ``train``."""
    on_progress: OnPhase = no_phases
    """Called before each step, after each block of an evaluation, and while shards are indexed or copied."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked before each step: True ends the run as SIGTERM does."""
    reserve_space: RoomFor = any_room
    """Entered with the number of bytes before a checkpoint is written; what it raises ends the run."""
    wants_checkpoint: Callable[[], bool] = lambda: False
    """Asked before each step and after each stage: True saves a checkpoint for ``on_checkpoint``."""
    on_checkpoint: Callable[[Path], None] = lambda folder: None
    """Called with the folder of a checkpoint that ``wants_checkpoint`` asked for, and of the last one of a stopped run."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves. ``history`` has a row an evaluation, the zero-shot weights (step 0) first."""

    out_dir: Path
    checkpoint: Path
    history: tuple[Row, ...]
    bad_samples: tuple[BadSample, ...]
    """Which photos, to train or to evaluate on, could not be read, and why."""

    @property
    def metrics(self) -> Row:
        """Of the last evaluation."""
        return self.history[-1]
