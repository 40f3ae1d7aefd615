"""Sweeps on a simulated clock: k slots, each busy with a trial's stage for as long as the stage takes in its world.

What counts is what a user would get at any time: of all trials so far, ended, paused or running, the one whose last (noisy)
report is highest, valued by its curve without an evaluation's noise at the stage where it is. Time is device seconds, in
whole trials' worth: the mean over random settings. All arms share seeds, rungs, reduction factor and budget; noise is drawn by
a trial's number, so that the first trials of all arms have the same luck.
"""

import heapq
import itertools
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from benchmarks.search.worlds import SHARES, STAGES, Drawn, World
from fashionclip_tune.tuning.study.choice import Choice, FreshPoint, KnownTrial, choose

RUNGS = (0, 2)  # stages, of nine, after which a trial is judged: a ninth and a third of the budget
REDUCTION_FACTOR = 3
THAW_COST = 0.02
KEPT_PAUSED = 3
METRIC = "recall_at_10"
_POOL = 3000


class Search(Protocol):
    """A searcher with its scheduler."""

    def ask(self) -> tuple[int, Mapping[str, Any]] | None:
        """The trial that a free slot goes on with, a new one or one that it has paused, and its params; None: there is none."""

    def tell(self, number: int, stage: int, value: float) -> bool:
        """Whether a running trial, whose stage is over, goes on at once."""


class PausingSearch:
    """This project's: ``choose`` with what a sweep's journal and engine do around it, in memory.

    The engine's own classes can take its place: anything that asks and tells.
    """

    def __init__(self, world: World, seed: int, points: Sequence[Mapping[str, Any]] = (), *, only_points: bool = False) -> None:
        self._world, self._seed, self._only_points = world, seed, only_points
        self._points = list(points)
        self._num_points = max(1, len(self._points))
        generator = np.random.default_rng([seed, 3])
        # Random settings are taken from these: drawing them anew for each decision would take most of a replay's time.
        self._pool = [] if only_points else [self._fresh_point(generator, {}) for _ in range(_POOL)]
        self._known: dict[int, KnownTrial] = {}
        self._next: Choice | None = None
        self._num_decisions = 0
        self.seconds: list[float] = []
        """Of the processor, of each suggestion."""

    def ask(self) -> tuple[int, Mapping[str, Any]] | None:
        choice, self._next = self._next, None
        if choice is None and self._points:
            return self._start(self._points.pop(0))
        choice = choice or self._decide()
        if choice is None:
            return None
        number = choice.chosen.trial
        if number is None:
            return self._start(choice.chosen.params)
        self._known[number] = replace(self._known[number], state="running", cost=None)
        return number, self._known[number].params

    def tell(self, number: int, stage: int, value: float) -> bool:
        trial = self._known[number]
        rungs = {SHARES[rung] for rung in RUNGS}
        # Values at rungs, and the latest one.
        curve = {share: seen for share, seen in trial.curve.items() if share in rungs} | {SHARES[stage]: value}
        variances = {SHARES[stage]: self._world.noise_S[stage] ** 2 for stage in range(STAGES)}
        trial = replace(trial, curve=curve, variances=variances)
        self._known[number] = trial
        if stage == STAGES - 1:
            self._known[number] = replace(trial, state="ended")
            return False
        if stage not in RUNGS:
            return True
        left = self._world.cost_of_start[trial.start] * (1 - SHARES[stage])
        self._known[number] = replace(trial, state="waiting", cost=left)
        if self._points:
            return False
        self._next = self._decide()
        if self._next is not None and self._next.chosen.trial == number:
            self._known[number], self._next = trial, None
            return True
        return False

    def _start(self, params: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]]:
        number = len(self._known)
        drawn = self._world.draw(np.random.default_rng([self._seed, 2, number]), params)
        start = self._world.start(drawn.params)
        self._known[number] = KnownTrial(number, start, drawn.params, drawn.distributions, {}, {}, "running")
        return number, drawn.params

    def _decide(self) -> Choice | None:
        started = time.process_time()
        known, seed = list(self._known.values()), self._seed * 1_000_003 + self._num_decisions
        fresh = None if self._only_points else self._fresh
        terms = {"cost_of_start": self._world.cost_of_start, "thaw_cost": THAW_COST, "num_points": self._num_points}
        choice = choose(known, fresh=fresh, seed=seed, **terms)
        self._num_decisions += 1
        self.seconds.append(time.process_time() - started)
        if choice is not None:
            self._end_all_but_the_best(choice)
        return choice

    def _fresh(self, seed: int, given: Sequence[Mapping[str, Any]], count: int) -> list[FreshPoint]:
        generator = np.random.default_rng([seed, 1])
        completed = [self._fresh_point(generator, each) for each in given]
        return completed + [self._pool[place] for place in generator.choice(_POOL, count, replace=False)]

    def _fresh_point(self, generator: np.random.Generator, given: Mapping[str, Any]) -> FreshPoint:
        drawn = self._world.draw(generator, given)
        return FreshPoint(drawn.params, drawn.distributions, self._world.start(drawn.params))

    def _end_all_but_the_best(self, choice: Choice) -> None:
        """Of the paused the best predicted of each start stay."""
        for start in self._world.cost_of_start:
            paused = [number for number in choice.predicted if self._known[number].start == start]
            paused = [number for number in paused if number != choice.chosen.trial]
            for number in sorted(paused, key=lambda number: -choice.predicted[number])[KEPT_PAUSED:]:
                self._known[number] = replace(self._known[number], state="ended", cost=None)


class StockSearch:
    """Ray Tune's OptunaSearch and ASHAScheduler as they come, but for the rungs; the sampler is Optuna's TPE or random."""

    def __init__(
        self,
        world: World,
        seed: int,
        points: Sequence[Mapping[str, Any]] = (),
        *,
        is_random: bool = False,
        is_stopping: bool = True,
    ) -> None:
        import optuna
        from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
        from ray.tune.search.optuna import OptunaSearch

        def draw(trial: optuna.Trial) -> None:
            world.space(trial)

        sampler = optuna.samplers.RandomSampler(seed) if is_random else None
        given = [dict(point) for point in points] or None
        flags = {"metric": METRIC, "mode": "max"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            self._searcher = OptunaSearch(
                draw, points_to_evaluate=given, sampler=sampler, seed=None if sampler else seed, **flags
            )
        rungs = {"max_t": STAGES, "grace_period": 1, "reduction_factor": REDUCTION_FACTOR}
        self._scheduler = ASHAScheduler("stage", **flags, **rungs) if is_stopping else FIFOScheduler()
        self._numbers = itertools.count()

    def ask(self) -> tuple[int, Mapping[str, Any]]:
        number = next(self._numbers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            params = self._searcher.suggest(str(number))
        self._scheduler.on_trial_add(None, SimpleNamespace(trial_id=str(number)))
        return number, params

    def tell(self, number: int, stage: int, value: float) -> bool:
        trial = SimpleNamespace(trial_id=str(number))
        result = {"stage": stage + 1, METRIC: value, "training_iteration": stage + 1}
        goes_on = self._scheduler.on_trial_result(None, trial, result) == "CONTINUE" and stage < STAGES - 1
        self._searcher.on_trial_result(str(number), result)
        if not goes_on:
            self._scheduler.on_trial_complete(None, trial, result)
            self._searcher.on_trial_complete(str(number), result)
        return goes_on


@dataclass
class _Trial:
    true_S: np.ndarray
    seen_S: np.ndarray
    seconds_S: np.ndarray
    stage: int = -1
    """The last one that is over."""


@dataclass(frozen=True)
class Replay:
    """Whenever a stage was over: [E] each."""

    spent: np.ndarray
    """Device seconds in whole trials' worth."""
    true: np.ndarray
    """What the trial is worth that is ahead by its last report."""
    winner: np.ndarray
    """Its number."""
    params: list[Mapping[str, Any]]
    """By number."""
    ended: dict[int, float]
    """What was spent when a trial came to the end of its budget, by number."""


def replay(world: World, search: Search, seed: int, *, horizon: float, num_slots: int = 2) -> Replay:
    """One sweep, until ``horizon`` whole trials' device seconds are spent or nothing is left to do."""
    unit = trial_seconds(world)
    clock: list[tuple[float, int, int]] = []  # when a slot's stage is over: time, order of starting it, trial
    order = itertools.count()
    trials: dict[int, _Trial] = {}
    params_of = list[Mapping[str, Any]]()
    events, ended = [], dict[int, float]()

    def fill(now: float) -> None:
        if (asked := search.ask()) is None:
            return
        number, params = asked
        if number in trials:
            now += THAW_COST * trials[number].seconds_S.sum()
        else:
            noise = np.random.default_rng([seed, 1, number])
            true_S = world.curves([params])[0] + noise.normal() * world.spread_S
            trials[number] = _Trial(true_S, true_S + noise.normal(size=STAGES) * world.noise_S, world.stage_seconds(params))
            params_of.append(params)
        heapq.heappush(clock, (now + trials[number].seconds_S[trials[number].stage + 1], next(order), number))

    for _ in range(num_slots):
        fill(0.0)
    while clock and clock[0][0] * num_slots <= horizon * unit:
        now, _, number = heapq.heappop(clock)
        trial = trials[number]
        trial.stage += 1
        if trial.stage == STAGES - 1:
            ended[number] = now * num_slots / unit
        begun = {each: other for each, other in trials.items() if other.stage >= 0}
        winner = max(begun, key=lambda each: begun[each].seen_S[begun[each].stage])
        events.append((now * num_slots / unit, trials[winner].true_S[trials[winner].stage], winner))
        if search.tell(number, trial.stage, float(trial.seen_S[trial.stage])):
            heapq.heappush(clock, (now + trial.seconds_S[trial.stage + 1], next(order), number))
        else:
            fill(now)
    spent, true, winners = np.array(events).T
    return Replay(spent, true, winners.astype(int), params_of, ended)


def trial_seconds(world: World) -> float:
    """The mean over random settings."""
    generator = np.random.default_rng(0)
    return float(np.mean([world.stage_seconds(world.draw(generator).params).sum() for _ in range(256)]))


def random_level(world: World, num_trials: int, repeats: int = 41) -> float:
    """What as many random trials without stopping end at: the median over repeats of the winner's true value."""
    generator = np.random.default_rng(1)
    drawn: list[Drawn] = [world.draw(generator) for _ in range(num_trials * repeats)]
    end_N = world.curves([each.params for each in drawn])[:, -1] + generator.normal(size=len(drawn)) * world.spread_S[-1]
    seen_RT = (end_N + generator.normal(size=len(drawn)) * world.noise_S[-1]).reshape(repeats, num_trials)
    best = np.take_along_axis(end_N.reshape(repeats, num_trials), seen_RT.argmax(axis=1, keepdims=True), axis=1)
    return float(np.median(best))
