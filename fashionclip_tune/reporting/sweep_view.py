"""What the pages about a sweep are made of: its rows, its curves, its study. Reads files; a running sweep is left alone."""

import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from fashionclip_tune.errors import rung_of
from fashionclip_tune.evaluation.metric import Metric, metric_of
from fashionclip_tune.evaluation.statistics import PairedTest
from fashionclip_tune.reporting.sweep_files import (
    TrialRow,
    best_row,
    has_failed,
    ranked,
    read_sweep,
    start_of,
    tests_of_best,
    waiting_rungs,
)
from fashionclip_tune.storage.folder import RemoteFolder, read_journal
from fashionclip_tune.training.history import Row, read_whole_rows

_MIN_TRIALS_TO_EXPLAIN = 4

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Importance:
    """How much each drawn parameter explains, in shares of 1, and of what: the metric at ``examples_seen``."""

    shares: dict[str, float]
    examples_seen: int
    num_trials: int


@dataclass(frozen=True)
class SweepView:
    """A sweep as its files stood when they were read.

    ``curves`` has the evaluations of each trial by its id; ``tests`` what the best trial is better by than each other one,
    None where they were not evaluated on the same queries; ``trials`` are empty where the journal cannot be read; ``torn`` are
    evaluations that cannot be read, and are left out.
    """

    folder: Path
    name: str
    content: Mapping[str, Any]
    curves: Mapping[str, Sequence[Row]]
    tests: Mapping[str, PairedTest | None]
    trials: Sequence[FrozenTrial]
    torn: Sequence[Path]

    @cached_property
    def metric(self) -> Metric:
        """What the sweep maximises."""
        return metric_of(self.content)

    @cached_property
    def rows(self) -> list[TrialRow]:
        """Trials with a score, best first."""
        return ranked(self.content["trials"], self.metric)

    @cached_property
    def best(self) -> TrialRow | None:
        return best_row(self.content["trials"], self.metric)

    @cached_property
    def ties(self) -> set[str]:
        return {trial_id for trial_id, test in self.tests.items() if test is not None and test.is_tie}

    @property
    def failures(self) -> list[TrialRow]:
        return [row for row in self.content["trials"] if has_failed(row)]

    @property
    def budget_examples(self) -> int:
        """What a trial may train on; the most that any has seen where the settings do not say."""
        known = self.content.get("settings", {}).get("budget_examples")
        return int(known or max((row["examples_seen"] for row in self.content["trials"]), default=0))

    @cached_property
    def rungs(self) -> list[int]:
        """Where trials were judged, in examples: as the search has them, else what was passed and where someone was stopped."""
        if waiting := waiting_rungs(self.content):
            return waiting
        passed = {rung for trial in self.trials for rung in trial.user_attrs.get("passed_rungs", [])}
        stopped = {row["examples_seen"] for row in self.content["trials"] if rung_of(row["stop_reason"]) is not None}
        return sorted(passed | stopped)

    def encoding_speed(self, start: str, what: str) -> float | None:
        """Photos or texts (``what``, a field of ``EncodingSpeed``) a second: the median of the evaluations of all its trials.

        The settings of a trial do not change what its towers cost. None where none was evaluated.
        """
        own = [row["trial_id"] for row in self.content["trials"] if start_of(row) == start]
        speeds = [stage[what] for trial_id in own for stage in self.curves[trial_id] if stage.get(what)]
        return median(speeds) if speeds else None

    @cached_property
    def importance(self) -> Importance | None:
        """Optuna's importances (PED-ANOVA: Watanabe et al. 2023); None of fewer than four trials.

        Of the first evaluation that most trials have: there they are compared after the same number of photos, while the
        last values of those that were stopped early and of those that were not differ by their length too.
        """
        stages = Counter(seen for trial in self.trials for seen in trial.intermediate_values if seen > 0)
        if not stages:
            return None
        stage = min(stages, key=lambda seen: (-stages[seen], seen))
        study = optuna.create_study(direction="maximize")
        for trial in self.trials:
            if trial.params and stage in trial.intermediate_values:
                value = trial.intermediate_values[stage]
                study.add_trial(optuna.create_trial(params=trial.params, distributions=trial.distributions, value=value))
        num_trials = len(study.get_trials(deepcopy=False))
        if num_trials < _MIN_TRIALS_TO_EXPLAIN:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # parameters of few trials, or that never varied: they get a share of 0
            shares = optuna.importance.get_param_importances(study)
        return Importance(dict(shares), stage, num_trials)


def view_sweep(folder: Path, name: str | None = None) -> SweepView:
    """Reads a sweep, running, half finished or finished.

    Args:
        name: what it is to be called, where its own name does not tell it apart.

    Raises:
        UserError: the folder is no sweep.
    """
    content = read_sweep(folder)
    curves: dict[str, Sequence[Row]] = {}
    torn: list[Path] = []
    for row in content["trials"]:
        curves[row["trial_id"]] = []
        for path in folder.glob(f"trials/{row['trial_id']}-*"):
            rows, unreadable = read_whole_rows(path)
            curves[row["trial_id"]] = [each for each in rows if each["examples_seen"] <= row["examples_seen"]]
            torn += unreadable
    tests = tests_of_best(folder, content["trials"], metric_of(content))
    return SweepView(folder, name or str(content["name"]), content, curves, tests, read_trials(folder / "study.journal"), torn)


def read_trials(journal: Path) -> list[FrozenTrial]:
    """The started trials of a study; none where there is no journal, or none that Optuna can read.

    On the durable side of a sweep, such as a drive, it lies in pieces beside where it would be. A copy is opened: Optuna's own
    backend opens a journal for writing, and half a last line may be under way.
    """
    with tempfile.TemporaryDirectory(prefix="fashionclip-tune-") as folder:
        copy = Path(folder) / "study.journal"
        try:
            content = journal.read_bytes() if journal.is_file() else read_journal(RemoteFolder(journal.parent))
            copy.write_bytes(content[: content.rfind(b"\n") + 1])
            storage = JournalStorage(JournalFileBackend(str(copy)))
            (summary,) = optuna.get_all_study_summaries(storage)
            trials = optuna.load_study(study_name=summary.study_name, storage=storage).get_trials()
        except (OSError, ValueError, KeyError):
            return []
    # Those of an older sweep, which a warm start put in front, are not of this one.
    return [trial for trial in trials if trial.state != TrialState.WAITING and "origin" not in trial.user_attrs]
