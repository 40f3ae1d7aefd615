"""sweep.json and trials.csv: rebuilt after every event from the journal and the trials' own folders."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from fashionclip_tune.device_time import known_device_s
from fashionclip_tune.encoding import EncodingSpeed
from fashionclip_tune.evaluate import relative_gain
from fashionclip_tune.files import write_json
from fashionclip_tune.history import read_history
from fashionclip_tune.report import FREED, best_row, write_trials_csv
from fashionclip_tune.tuning.engine import trial_dir
from fashionclip_tune.tuning.study import METRIC, SweepStudy, message, scores_nothing, settings, stop_reason

_ABOUT_RECALL = ("protocol", "num_pairs", "num_products", "num_gallery_images", "num_gallery_texts")


class SweepRecord:
    """Writes what a sweep has found so far. ``header`` is what does not change: name, settings, versions."""

    def __init__(self, sweep_dir: Path, study: SweepStudy, header: dict[str, Any]) -> None:
        self._sweep_dir = sweep_dir
        self._study = study
        self._header = header
        self._earlier_s = float(header.get("elapsed_s", 0.0))
        self._earlier_freed = [int(header.get(name, 0)) for name in FREED]
        self._started = time.monotonic()
        self._ended_rows: dict[int, dict[str, Any]] = {}  # these change no more: a long sweep does not read them again
        self._zero_shot: dict[str, dict[str, Any]] = {}

    def write(self, state: str, freed: tuple[int, int] = (0, 0)) -> dict[str, Any]:
        """Writes both files and returns the content of sweep.json.

        ``freed``: bytes of ended trials that were removed since this object was made, here and on the durable side.
        """
        rows = self.rows()
        best = best_row(rows)
        sweep = {
            **self._header,
            "elapsed_s": self._earlier_s + time.monotonic() - self._started,
            **{name: before + now for name, before, now in zip(FREED, self._earlier_freed, freed, strict=True)},
            "state": state,
            "best": best and {name: best[name] for name in ("trial_id", "config", "metrics")},
            "zero_shot": self._zero_shot,
            "trials": [{name: value for name, value in row.items() if name != "metrics"} for row in rows],
        }
        write_json(self._sweep_dir / "sweep.json", sweep)
        write_trials_csv(rows, self._sweep_dir / "trials.csv")
        return sweep

    def rows(self) -> list[dict[str, Any]]:
        """One row a trial, by number."""
        return [self._row(trial) for trial in self._study.trials()]

    def _row(self, trial: FrozenTrial) -> dict[str, Any]:
        if trial.number in self._ended_rows:
            return self._ended_rows[trial.number]
        config = settings(trial)
        # A stage counts once it is in the journal; a file that is ahead of it belongs to a report under way.
        recorded = trial.intermediate_values
        folder = trial_dir(self._sweep_dir, trial.number, config) if config else None
        history = [row for row in read_history(folder) if row["examples_seen"] in recorded] if folder else []
        last: dict[str, Any] = history[-1] if history else {}
        if history and history[0]["step"] == 0:
            self._zero_shot.setdefault(config["clip_model"], recalls(history[0]))
        untouched = history[0][METRIC] if history and history[0]["step"] == 0 else None
        worthless = scores_nothing(trial)
        row = {
            "trial_id": f"{trial.number:04d}",
            "state": trial.state.name,
            "stop_reason": stop_reason(trial),
            "message": message(trial),
            "config": config,
            "step": last.get("step", 0),
            "examples_seen": last.get("examples_seen", 0),
            "recall_at_10": 0.0 if worthless else last.get(METRIC),
            "recall_at_5": 0.0 if worthless else last.get("recall_at_5"),
            "recall_at_10_low": None if worthless else last.get("recall_at_10_low"),
            "recall_at_10_high": None if worthless else last.get("recall_at_10_high"),
            "untouched_recall_at_10": untouched,
            "gain": None if worthless or untouched is None else last[METRIC] - untouched,
            "relative_gain": None if worthless or untouched is None else relative_gain(last[METRIC], untouched),
            "max_recall_at_10": max((row[METRIC] for row in history), default=None),
            "recall_change": None if worthless or len(history) < 2 else last[METRIC] - history[-2][METRIC],
            "samples_per_second": last.get("samples_per_second"),
            **{name: last.get(name) for name in EncodingSpeed._fields},
            "duration_s": last.get("duration_s", 0.0),
            "device_s": max(last.get("device_s", 0.0), known_device_s(folder) if folder else 0.0),
            **{name: last.get(name) for name in ("protocol", "num_gallery_images", "num_gallery_texts")},
            "metrics": recalls(last),
        }
        if trial.state != TrialState.RUNNING:
            self._ended_rows[trial.number] = row
        return row


def recalls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of an evaluation's row: its recalls, and what they were counted among."""
    return {name: value for name, value in row.items() if name.startswith("recall_at_") or name in _ABOUT_RECALL}
