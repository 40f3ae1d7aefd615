"""TensorBoard's HParams tab: a column for every setting of the space in every trial, "none" where it does not apply.

TensorBoard takes the columns from the first trial that it finds, and leaves out what another one has besides. So each trial's
file declares all of them. Settings that are no numbers, or that not every trial has, are declared as words.
"""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.plugins.hparams import summary_v2
from tensorboard.plugins.hparams.summary_v2 import Discrete, HParam, hparams_config_pb, hparams_pb
from torch.utils.tensorboard import FileWriter

from fashionclip_tune.evaluation.metric import Metric
from fashionclip_tune.reporting.sweep_files import TrialRow, is_open, loss_label, start_of
from fashionclip_tune.training.history import scalar_tag
from fashionclip_tune.tuning.trial import dir_of

_SUFFIX = ".hparams"
NOT_APPLICABLE = "none"


class HParamsTab:
    """Adds the trials of a sweep that have ended; ``drawn`` are settings as its space makes them."""

    def __init__(self, sweep_dir: Path, drawn: Iterable[Mapping[str, Any]], metric: Metric) -> None:
        self._sweep_dir = sweep_dir
        self._metric = metric
        self._is_number = columns(drawn)
        self._added: set[str] = set()

    def add(self, rows: Iterable[TrialRow]) -> None:
        for row in rows:
            if is_open(row) or not row["config"] or row["trial_id"] in self._added:
                continue
            folder = dir_of(self._sweep_dir, row)
            if folder.is_dir():
                write_hparams(folder, row, self._is_number, self._metric)
            self._added.add(row["trial_id"])


def columns(drawn: Iterable[Mapping[str, Any]]) -> dict[str, bool]:
    """The settings that draws of a space had, and whether each is a number in all of them."""
    drawn = list(drawn)
    names = dict.fromkeys(name for settings in drawn for name in settings)
    return {name: all(_is_number(settings.get(name)) for settings in drawn) for name in names}


def write_hparams(trial_dir: Path, row: TrialRow, is_number: Mapping[str, bool], metric: Metric) -> None:
    """Adds an ended trial to the tab, once; ``is_number`` has the columns.

    In a file of its own: what the run wrote, and what a resumed run purges of it, stays as it is.
    """
    if any(trial_dir.glob(f"*{_SUFFIX}")):
        return
    labels = {"clip_model": start_of(row), "loss_function": loss_label(row["config"].get("loss_function"))}
    settings = {name: labels.get(name, value) for name, value in row["config"].items()}
    # What --set fixed, or a later draw brought, is shown too where the first draws did not have it.
    is_number = {**is_number, **{name: False for name in settings if name not in is_number}}
    hparams = [HParam(name, Discrete([], dtype=float if numeric else str)) for name, numeric in is_number.items()]
    values = {
        name: settings[name] if numeric and name in settings else _word(settings.get(name))
        for name, numeric in is_number.items()
    }
    writer = FileWriter(str(trial_dir), filename_suffix=_SUFFIX)
    writer.add_summary(hparams_config_pb(hparams, [summary_v2.Metric(scalar_tag(metric.name))]))
    writer.add_summary(hparams_pb(values, row["trial_id"], time.time() - row["duration_s"]))
    writer.close()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _word(value: Any) -> str:
    if value is None:
        return NOT_APPLICABLE
    return f"{value:.6g}" if isinstance(value, float) else str(value)
