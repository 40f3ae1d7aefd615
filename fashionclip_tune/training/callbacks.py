"""What a run tells its caller, and what it asks."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from fashionclip_tune.data.index import BadSample
from fashionclip_tune.training.history import Row

OnEval = Callable[[Row], None]
RoomFor = Callable[[int], AbstractContextManager[None]]
"""Within, a checkpoint of so many bytes may be written; raises StorageError where there is no room for it."""


def any_room(num_bytes: int) -> AbstractContextManager[None]:
    """As much as the disk has."""
    return nullcontext()


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves. ``history`` has a row an evaluation, the untouched weights (step 0) first."""

    out_dir: Path
    checkpoint: Path
    history: tuple[Row, ...]
    bad_samples: tuple[BadSample, ...]
    """Which photos, to train or to evaluate on, could not be read, and why."""

    @property
    def metrics(self) -> Row:
        """Of the last evaluation."""
        return self.history[-1]
