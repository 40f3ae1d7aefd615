"""Writes sweep.json and trials.csv: the header, which never changes, and a row for each trial."""

import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from optuna.trial import FrozenTrial, TrialState

from fashionclip_tune.evaluation.evaluate import relative_gain
from fashionclip_tune.evaluation.metric import DEFAULT_METRIC, Metric, metric_of
from fashionclip_tune.evaluation.protocols import COVERAGE
from fashionclip_tune.files import write_json
from fashionclip_tune.reporting.sweep_files import FREED, PAUSED, TrialRow, best_row, last_queries, read_sweep, write_trials_csv
from fashionclip_tune.training.history import Row, read_history
from fashionclip_tune.tuning.persistence.location import SweepLocation
from fashionclip_tune.tuning.planning.plan import SweepPlan
from fashionclip_tune.tuning.schedulers import WaitingRule
from fashionclip_tune.tuning.study.study import SweepStudy, message, scores_nothing, settings, stop_reason
from fashionclip_tune.tuning.trial import trial_dir


def sweep_header(plan: SweepPlan, location: SweepLocation) -> dict[str, Any]:
    """Of a sweep that goes on, as it was at its first start, but for the number of its trials."""
    if (location.run_dir / "sweep.json").is_file():
        changing, begun = ("state", "best", "zero_shot", "decisions", "trials"), read_sweep(location.run_dir)
        kept = {name: value for name, value in begun.items() if name not in changing}
        return {**kept, "settings": {**kept["settings"], "num_trials": plan.num_trials}}
    packages = ("torch", "open_clip_torch", "ray", "optuna")
    return {
        "name": location.shown.rpartition("/")[2],
        "created": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        "metric": plan.settings.maximised.name,
        "mode": "max",
        "seed": plan.settings.seed,
        "space": plan.space.name,
        "space_hash": plan.space.content_hash,
        "space_text": plan.space.text,
        "data_fingerprint": plan.data_fingerprint,
        "data": plan.data,
        "settings": asdict(plan.settings),
        "base_config": plan.base.to_dict(),
        "starts": {name: asdict(facts) for name, facts in plan.starts.items()},
        "plan": asdict(plan.forecast),
        "search": plan.search_terms.to_record() if isinstance(plan.rule, WaitingRule) else None,
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


_ABOUT_RECALL = ("protocol", "num_pairs", "num_products", "num_gallery_images", "num_gallery_texts", *COVERAGE)


def start_labels_of(header: Mapping[str, Any]) -> dict[str, str]:
    """Short names of a sweep's starts; none of one that an older version began, whose folders have the long ones."""
    return {name: str(start["label"]) for name, start in header.get("starts", {}).items()}


class SweepRecord:
    """Writes what a sweep has found so far. ``header`` is what does not change: name, settings, versions."""

    def __init__(self, sweep_dir: Path, study: SweepStudy, header: dict[str, Any]) -> None:
        self._sweep_dir = sweep_dir
        self._study = study
        self._header = header
        self._metric = metric_of(header)
        self._labels = start_labels_of(header)
        self._earlier_s = float(header.get("elapsed_s", 0.0))
        self._earlier_freed = [int(header.get(name, 0)) for name in FREED]
        self._started = time.monotonic()
        self._ended_rows: dict[int, TrialRow] = {}  # these change no more: a long sweep does not read them again
        self._intervals: dict[tuple[str, int], dict[str, float]] = {}
        self._zero_shot: dict[str, dict[str, Any]] = {}

    def write(self, state: str, freed: tuple[int, int] = (0, 0)) -> dict[str, Any]:
        """Writes both files and returns the content of sweep.json.

        ``freed``: bytes of ended trials that were removed since this object was made, here and on the durable side.
        """
        rows = self.rows()
        best = best_row(rows, self._metric)
        sweep = {
            **self._header,
            "elapsed_s": self._earlier_s + time.monotonic() - self._started,
            **{name: before + now for name, before, now in zip(FREED, self._earlier_freed, freed, strict=True)},
            "state": state,
            "best": best and {name: best[name] for name in ("trial_id", "config", "start", "metrics")},
            "zero_shot": self._zero_shot,
            "decisions": [decision.to_record() for decision in self._study.decisions],
            "trials": [{name: value for name, value in row.items() if name != "metrics"} for row in rows],
        }
        write_json(self._sweep_dir / "sweep.json", sweep)
        write_trials_csv(rows, self._sweep_dir / "trials.csv")
        return sweep

    def rows(self) -> list[TrialRow]:
        """One row a trial, by number."""
        return [self._row(trial) for trial in self._study.trials()]

    def _row(self, trial: FrozenTrial) -> TrialRow:
        if trial.number in self._ended_rows:
            return self._ended_rows[trial.number]
        config = settings(trial)
        # A stage counts once it is in the journal; a file that is ahead of it belongs to a report under way.
        recorded = trial.intermediate_values
        start = self._labels.get(config.get("clip_model", ""), config.get("clip_model", ""))
        folder = trial_dir(self._sweep_dir, trial.number, start, config["loss_function"]) if config else None
        history = [row for row in read_history(folder) if row["examples_seen"] in recorded] if folder else []
        last: dict[str, Any] = history[-1] if history else {}
        if history and history[0]["step"] == 0:
            self._zero_shot.setdefault(config["clip_model"], recalls(history[0]))
        worthless = scores_nothing(trial)
        row: dict[str, Any] = {
            "trial_id": f"{trial.number:04d}",
            "state": PAUSED if trial.number in self._study.waiting else trial.state.name,
            "stop_reason": stop_reason(trial),
            "message": message(trial),
            "config": config,
            "start": start,
            "step": last.get("step", 0),
            "examples_seen": last.get("examples_seen", 0),
            **_figures(DEFAULT_METRIC, history, worthless),
            "recall_at_5": 0.0 if worthless else last.get("recall_at_5"),
            **_figures(self._metric, history, worthless),
            **_gains(self._metric, history, worthless),
            "samples_per_second": last.get("samples_per_second"),
            "images_encoded_per_second": last.get("images_encoded_per_second"),
            "texts_encoded_per_second": last.get("texts_encoded_per_second"),
            "duration_s": last.get("duration_s", 0.0),
            "device_s": last.get("device_s", 0.0),
            "protocol": last.get("protocol"),
            "num_gallery_images": last.get("num_gallery_images"),
            "num_gallery_texts": last.get("num_gallery_texts"),
            "metrics": recalls(last),
        }
        if row["state"] != "RUNNING" and not worthless and history and self._metric.interval(row) is None:
            row |= self._interval(cast(TrialRow, row))
        if trial.state != TrialState.RUNNING:
            self._ended_rows[trial.number] = cast(TrialRow, row)
        return cast(TrialRow, row)

    def _interval(self, row: TrialRow) -> dict[str, float]:
        """From the queries, where they are here: of a metric of which evaluations have none."""
        place = (row["trial_id"], row["step"])
        if place not in self._intervals:
            found = last_queries(self._sweep_dir, row)
            self._intervals[place] = self._metric.computed_interval(found[0]) if found is not None else {}
        return self._intervals[place]


def _figures(metric: Metric, history: Sequence[Row], worthless: bool) -> dict[str, float | None]:
    """Of one recall of a trial: that of its last evaluation with its interval, its zero-shot weights', its highest."""
    last, name = history[-1] if history else {}, metric.name
    return {
        name: 0.0 if worthless else last.get(name),
        **{f"{name}_{end}": None if worthless else last.get(f"{name}_{end}") for end in ("low", "high")},
        f"untouched_{name}": _zero_shot(metric, history),
        f"max_{name}": max((row[name] for row in history), default=None),
    }


def _gains(metric: Metric, history: Sequence[Row], worthless: bool) -> dict[str, float | None]:
    """Of the recall that the sweep maximises: over the zero-shot weights, and since the evaluation before."""
    zero_shot, values = _zero_shot(metric, history), [row[metric.name] for row in history]
    return {
        "gain": None if worthless or zero_shot is None else values[-1] - zero_shot,
        "relative_gain": None if worthless or zero_shot is None else relative_gain(values[-1], zero_shot),
        "recall_change": None if worthless or len(values) < 2 else values[-1] - values[-2],
    }


def _zero_shot(metric: Metric, history: Sequence[Row]) -> float | None:
    return metric.of(history[0]) if history and history[0]["step"] == 0 else None


def recalls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of an evaluation's row: its recalls, and what they were counted among."""
    return {name: value for name, value in row.items() if name.startswith("recall_at_") or name in _ABOUT_RECALL}
