"""What a sweep keeps of the trials that have ended: weights of the best of each architecture, of the others their figures.

A trial that can still run keeps its whole state. A full state is 1.8 GB for ViT-B-32: thirty of them fill a disk.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.evaluation.metric import Metric
from fashionclip_tune.reporting.sweep_files import PAUSED, TrialRow, is_open, ranked, start_of
from fashionclip_tune.storage.checkpoint import keep_newest, remove_checkpoints, strip_training_state
from fashionclip_tune.training.remote_state import RemoteState
from fashionclip_tune.tuning.persistence.mirror import SweepMirror
from fashionclip_tune.tuning.planning.disk import KEPT_PER_MODEL
from fashionclip_tune.tuning.trial import dir_of


def keepers(rows: Sequence[TrialRow], metric: Metric) -> set[str]:
    """Trials whose weights are kept: the best three of each architecture among the ended ones."""
    kept: dict[str, list[str]] = {}
    for row in ranked(rows, metric):
        if not is_open(row):
            kept.setdefault(start_of(row), []).append(row["trial_id"])
    return {trial_id for trials in kept.values() for trial_id in trials[:KEPT_PER_MODEL]}


class Retention:
    """Removes what is not needed any more, once the worker has let go of a trial's folder; both on disk and durable."""

    def __init__(
        self,
        sweep_dir: Path,
        build: Callable[[dict[str, Any]], ProjectConfig],
        mirror: SweepMirror | None,
        metric: Metric,
        *,
        keeps_paused_states: bool = True,
    ) -> None:
        """``keeps_paused_states``: on the durable side, of trials that wait."""
        self.freed_bytes = 0
        """Where the sweep runs; and, beside that, on its durable side."""
        self.freed_durable_bytes = 0
        self._sweep_dir = sweep_dir
        self._build = build
        self._mirror = mirror
        self._metric = metric
        self._keeps_paused_states = keeps_paused_states
        self._stripped: set[str] = set()
        self._emptied: set[str] = set()
        self._paused: set[tuple[str, int]] = set()

    def apply(self, rows: Sequence[TrialRow]) -> None:
        kept = keepers(rows, self._metric)
        for row in rows:
            if row["state"] == PAUSED:
                self._keep_one_state(row)
            if is_open(row) or not row["config"] or row["trial_id"] in self._emptied:
                continue
            trial_id, keeps_weights = row["trial_id"], row["trial_id"] in kept
            if keeps_weights and trial_id in self._stripped:
                continue
            folder = dir_of(self._sweep_dir, row)
            if folder.is_dir() and not self._free(folder, keeps_weights):
                continue  # its worker is still there
            (self._stripped if keeps_weights else self._emptied).add(trial_id)
            if self._mirror is not None:
                run = durable_run(self._mirror, folder, self._build(row["config"]))
                self.freed_durable_bytes += run.forget_state()
                if not keeps_weights:
                    self.freed_durable_bytes += run.forget_weights()
                self._mirror.publish_run(folder)

    def _keep_one_state(self, row: TrialRow) -> None:
        """One that waits needs the last checkpoint only."""
        folder, stands = dir_of(self._sweep_dir, row), (row["trial_id"], row["examples_seen"])
        if stands in self._paused or not folder.is_dir():
            return
        before = _num_bytes(folder)
        with suppress(Timeout), FileLock(folder / ".lock", timeout=0):  # else its worker is still there
            keep_newest(folder)
            if self._mirror is not None and not self._keeps_paused_states:
                self.freed_durable_bytes += durable_run(self._mirror, folder, self._build(row["config"])).forget_state()
            self._paused.add(stands)
        self.freed_bytes += before - _num_bytes(folder)

    def _free(self, folder: Path, keeps_weights: bool) -> bool:
        before = _num_bytes(folder)
        try:
            with FileLock(folder / ".lock", timeout=0):
                (strip_training_state if keeps_weights else remove_checkpoints)(folder)
        except Timeout:
            return False
        (folder / ".lock").unlink(missing_ok=True)
        self.freed_bytes += before - _num_bytes(folder)
        return True


def durable_run(mirror: SweepMirror, folder: Path, config: ProjectConfig) -> RemoteState:
    """The durable side of a trial, for the driver."""
    return RemoteState(mirror.folder, f"trials/{folder.name}", config)


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
