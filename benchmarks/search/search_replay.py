#!/usr/bin/env python
"""Replays whole sweeps, in seconds, on the learning curves that search_record.py has recorded.

    pip install -e '.[benchmarks]'
    python -m benchmarks search_replay benchmarks/search/search_curves_synthetic.csv --plot results/search_synthetic.svg
    python -m benchmarks search_replay benchmarks/search/search_curves_fpi60.csv --plot results/search_fpi60.svg

The searchers and schedulers are the real classes, this project's and Ray Tune's, driven without Ray on a simulated clock:
each of k workers takes a trial's stage for as long as it took when it was recorded. A trial reports a Gaussian process's
curve of its settings plus the noise of an evaluation; both errors are printed first. What counts is what a user would get:
the ended trial whose last (noisy) report is highest, as a sweep chooses its winner, valued by its curve without noise at
the stage where it ended. The rest is the same for all: seeds, rungs, reduction factor, budget.
"""

import argparse
import heapq
import itertools
import tempfile
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.trial import TrialState

from benchmarks.search.search_plot import plot
from benchmarks.search.search_table import Surrogate, cross_validate, read_table
from fashionclip_tune.evaluation.metric import DEFAULT_METRIC
from fashionclip_tune.models.architecture import forward_flops
from fashionclip_tune.tuning.backend.hooks import StudyScheduler
from fashionclip_tune.tuning.backend.stop_signal import StopSignal
from fashionclip_tune.tuning.planning.space import load_space
from fashionclip_tune.tuning.schedulers import stopping_rule
from fashionclip_tune.tuning.study.draws import draw_points
from fashionclip_tune.tuning.study.policy import plan_quota, startup_trials
from fashionclip_tune.tuning.study.study import SweepStudy, settings
from fashionclip_tune.tuning.trial import TrialPlan

REDUCTION_FACTOR = 3
RANDOM_TRIALS = 32  # without early stopping: what the others are measured by
_IN_BUDGETS = (1, 2, 4, 8, 16, 32)


class Search(Protocol):
    """A searcher with its scheduler. ``ask`` gives a key and parameters; ``tell`` says whether the trial goes on."""

    def ask(self) -> tuple[str, dict[str, Any]]: ...

    def tell(self, key: str, stage: int, examples_seen: int, value: float) -> bool: ...


class SharedRungs(SweepStudy):
    """Judges a trial beside those of all architectures, as stock ASHA does."""

    def curves_to(self, examples_seen: int, *, clip_model: str, other_than: int) -> list[dict[int, float]]:
        models = {settings(trial).get("clip_model", clip_model) for trial in self.trials()}
        return [
            curve
            for model in sorted(models)
            for curve in super(SharedRungs, self).curves_to(examples_seen, clip_model=model, other_than=other_than)
        ]


class OurSearch:
    """SweepStudy and StudyScheduler, with their journal in the folder."""

    def __init__(
        self,
        seed: int,
        stages: list[int],
        num_trials: int,
        folder: Path,
        *,
        study: type[SweepStudy] = SweepStudy,
        is_random: bool = False,
        has_quota: bool = True,
        scheduler: str = "asha",
    ) -> None:
        quota = plan_quota(
            None, parameter="clip_model", models=("tiny-clip", "tiny-sig"), num_trials=num_trials, cost=forward_flops
        )
        self._study = study(
            folder / "study.journal",
            seed=seed,
            num_startup_trials=num_trials if is_random else startup_trials(num_trials),
            quota=quota if has_quota and not is_random else None,
        )
        rule = stopping_rule(scheduler, stage_examples=stages[1], budget_examples=stages[-1], reduction_factor=REDUCTION_FACTOR)
        self._scheduler = StudyScheduler(self._study, rule, StopSignal())
        self._budget = stages[-1]

    def ask(self) -> tuple[str, dict[str, Any]]:
        number, drawn = self._study.suggest(load_tiny())
        assert drawn is not None
        return str(number), self._study.trials()[number].params

    def tell(self, key: str, stage: int, examples_seen: int, value: float) -> bool:
        number = int(key)
        plan = TrialPlan(number, "", {"clip_model": self._study.trials()[number].params["clip_model"]})
        result = {"examples_seen": examples_seen, DEFAULT_METRIC.name: value}
        if self._scheduler.on_trial_result(None, SimpleNamespace(config=plan.to_ray()), result) == "STOP":
            return False
        if examples_seen == self._budget:
            self._study.end(number, TrialState.COMPLETE, "budget")
        return examples_seen < self._budget


class StockSearch:
    """Ray Tune's OptunaSearch and ASHAScheduler as they come, but for the rungs."""

    def __init__(self, seed: int, stages: list[int], num_trials: int, folder: Path) -> None:
        from ray.tune.schedulers import ASHAScheduler
        from ray.tune.search.optuna import OptunaSearch

        space = load_tiny()

        def draw(trial: optuna.Trial) -> None:
            space(trial)

        self._searcher = OptunaSearch(draw, metric=DEFAULT_METRIC.name, mode="max", seed=seed)
        self._scheduler = ASHAScheduler(
            "examples_seen",
            metric=DEFAULT_METRIC.name,
            mode="max",
            max_t=stages[-1],
            grace_period=stages[1],
            reduction_factor=REDUCTION_FACTOR,
        )
        self._numbers = itertools.count()

    def ask(self) -> tuple[str, dict[str, Any]]:
        key = str(next(self._numbers))
        parameters = self._searcher.suggest(key)
        self._scheduler.on_trial_add(None, SimpleNamespace(trial_id=key))
        return key, parameters

    def tell(self, key: str, stage: int, examples_seen: int, value: float) -> bool:
        trial = SimpleNamespace(trial_id=key)
        result = {"examples_seen": examples_seen, DEFAULT_METRIC.name: value, "training_iteration": stage + 1}
        goes_on: bool = self._scheduler.on_trial_result(None, trial, result) == "CONTINUE"
        self._searcher.on_trial_result(key, result)
        if not goes_on:
            self._scheduler.on_trial_complete(None, trial, result)
            self._searcher.on_trial_complete(key, result)
        return goes_on


@cache
def load_tiny() -> Callable[[optuna.Trial], dict[str, Any]]:
    return load_space("tiny").draw


ARMS: dict[str, tuple[Callable[..., Search], int]] = {
    "random, no stopping": (partial(OurSearch, is_random=True, scheduler="none"), RANDOM_TRIALS),
    "random + our ASHA": (partial(OurSearch, is_random=True), 64),
    "stock OptunaSearch + ASHA": (StockSearch, 64),
    "this searcher + ASHA": (OurSearch, 64),
    # What of it makes the difference.
    "no minimum per architecture": (partial(OurSearch, has_quota=False), 64),
    "and shared rungs": (partial(OurSearch, has_quota=False, study=SharedRungs), 64),
}


@dataclass(frozen=True)
class Replay:
    """What was in hand whenever a trial ended: [E] each."""

    examples: np.ndarray
    device_s: np.ndarray
    recall: np.ndarray


def replay(surrogate: Surrogate, search: Search, num_trials: int, num_workers: int, seed: int) -> Replay:
    """One sweep on the simulated clock."""
    noise = np.random.default_rng([seed, 1])
    stages = surrogate.table.examples_seen_S
    clock: list[tuple[float, int, str]] = []  # when a worker reports: time, order of starting it, trial
    order = itertools.count()
    trials: dict[str, dict[str, Any]] = {}
    examples, device_s, best_seen, best_true = 0, 0.0, -1.0, 0.0
    events: list[tuple[float, float, float]] = []

    def start(now: float) -> None:
        key, parameters = search.ask()
        true_S = surrogate.curves([parameters])[0]
        # Drawn for the trial's number: the first trials of all arms have the same luck.
        seen_S = true_S + noise.normal(size=len(stages)) * surrogate.noise_S
        trials[key] = {"stage": 0, "true": true_S, "seen": seen_S, "seconds": surrogate.stage_seconds(parameters)}
        heapq.heappush(clock, (now + trials[key]["seconds"][0], next(order), key))

    for _ in range(min(num_workers, num_trials)):
        start(0.0)
    while clock:
        now, _, key = heapq.heappop(clock)
        trial = trials[key]
        stage = trial["stage"]
        examples += stages[stage] - (stages[stage - 1] if stage else 0)
        device_s += trial["seconds"][stage]
        if search.tell(key, stage, stages[stage], float(trial["seen"][stage])):
            trial["stage"] += 1
            heapq.heappush(clock, (now + trial["seconds"][stage + 1], next(order), key))
            continue
        if trial["seen"][stage] > best_seen:
            best_seen, best_true = trial["seen"][stage], trial["true"][stage]
        events.append((examples, device_s, best_true))
        if len(trials) < num_trials:
            start(now)
    return Replay(*np.array(events).T)


def _replay_seed(surrogate: Surrogate, num_workers: int, job: tuple[str, int]) -> Replay:
    arm, seed = job
    make, num_trials = ARMS[arm]
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # nothing is to outlive this
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=memory) as folder:
        warnings.simplefilter("ignore")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        search = make(seed, surrogate.table.examples_seen_S, num_trials, Path(folder))
        return replay(surrogate, search, num_trials, num_workers, seed)


def at(replays: list[Replay], spent: str, points: np.ndarray) -> np.ndarray:
    """[R, P] the recall in hand once so much was spent; 0 before the first trial ended, the last one after the sweep."""
    rows = []
    for one in replays:
        index = np.searchsorted(getattr(one, spent), points, side="right") - 1
        rows.append(np.where(index >= 0, one.recall[index], 0.0))
    return np.array(rows)


def quartiles(values: np.ndarray) -> str:
    low, middle, high = np.percentile(values, (25, 50, 75))
    return f"{middle:.4f} ({low:.4f} to {high:.4f})"


def report(surrogate: Surrogate, distributions: Mapping[str, Any], replays: dict[str, list[Replay]]) -> None:
    table = surrogate.table
    budget, trial_s = table.examples_seen_S[-1], float(table.device_s_NS[:, -1].mean())
    predicted = cross_validate(table, distributions)
    print(f"{len(table.parameters)} curves; at the last stage, settings left out in ten folds:")
    for name, values in predicted.items():
        error = values[:, -1] - table.recall_NS[:, -1]
        figures = f"mean error {np.abs(error).mean():.4f}, root mean square {np.sqrt((error**2).mean()):.4f}"
        print(f"  {name}: {figures}, r {np.corrcoef(values[:, -1], table.recall_NS[:, -1])[0, 1]:.3f}")
    noise = ", ".join(f"{value:.4f}" for value in surrogate.noise_S[1:])
    print(f"  spread of the settings {table.recall_NS[:, -1].std():.4f}; noise of an evaluation by stage {noise}")
    draws = [point.params for point in draw_points(load_tiny(), 5000, 1)]
    print(f"  best of 5,000 random settings by the surrogate: {surrogate.curves(draws)[:, -1].max():.4f}")
    for spent, unit in (("examples", budget), ("device_s", trial_s)):
        print(f"\n| after so many whole trials' {spent} | " + " | ".join(map(str, _IN_BUDGETS)) + " |")
        print("|---" * (len(_IN_BUDGETS) + 1) + "|")
        for arm, runs in replays.items():
            values = at(runs, spent, np.array(_IN_BUDGETS) * unit)
            print(f"| {arm} | " + " | ".join(quartiles(column) for column in values.T) + " |")
    goal = np.median([one.recall[-1] for one in replays["random, no stopping"]])
    grid = np.linspace(0, RANDOM_TRIALS, 641)
    print(f"\n{RANDOM_TRIALS} random trials without stopping end at {goal:.4f} (median); the median is there after")
    for arm, runs in replays.items():
        there = np.flatnonzero(np.median(at(runs, "examples", grid * budget), axis=0) >= goal)
        print(f"  {arm}: {grid[there[0]]:.1f} whole trials' examples" if len(there) else f"  {arm}: not reached")
    ours = replays["this searcher + ASHA"]
    for arm, runs in replays.items():
        if runs is ours:
            continue
        ends = min(np.median([one.device_s[-1] for one in runs]), np.median([one.device_s[-1] for one in ours]))
        points = np.array([4 * trial_s, 8 * trial_s, ends])
        better = (at(ours, "device_s", points) > at(runs, "device_s", points)).mean(axis=0)
        print(
            f"  seeds in which ours is ahead of '{arm}' after 4, 8 and {ends / trial_s:.0f} trials' seconds: {better.round(2)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, metavar="CSV")
    parser.add_argument("--seeds", type=int, default=30, help="sweeps of each kind (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=2, help="trials side by side on the simulated clock (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=1, help="replays side by side on this machine (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="SVG")
    arguments = parser.parse_args()
    distributions: dict[str, Any] = {}
    for point in draw_points(load_tiny(), 100, 0):
        distributions.update(point.distributions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a parameter without influence: its length scale ends at its bound
        surrogate = Surrogate(read_table(arguments.table), distributions)
        jobs = [(arm, seed) for arm in ARMS for seed in range(arguments.seeds)]
        with ProcessPoolExecutor(arguments.processes) as pool:
            runs = list(pool.map(partial(_replay_seed, surrogate, arguments.workers), jobs))
        replays = {arm: [run for (name, _), run in zip(jobs, runs, strict=True) if name == arm] for arm in ARMS}
        report(surrogate, distributions, replays)
    if arguments.plot:
        budget, trial_s = surrogate.table.examples_seen_S[-1], float(surrogate.table.device_s_NS[:, -1].mean())
        grid = np.linspace(0.25, RANDOM_TRIALS, 128)
        panels = {
            label: {arm: np.percentile(at(some, spent, grid * unit), (25, 50, 75), axis=0) for arm, some in replays.items()}
            for label, spent, unit in (("examples", "examples", budget), ("device seconds", "device_s", trial_s))
        }
        plot(arguments.plot, grid, panels, title=arguments.table.stem)


if __name__ == "__main__":
    main()
