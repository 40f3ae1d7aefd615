"""What a free slot does next: begin a new trial, or go on with one that waits.

The score of a candidate is the expected improvement of its end over the best end that is expected of any trial (Jones,
Schonlau and Welch 1998, equation 15), over the square root of what it still costs. Trials that run count as having ended where
they are predicted to, so that two slots do not try the same. What trials are worth at their end comes from ``curve_model``.

Until a trial has ended, only the space's points go on, whatever is expected of others: they are good defaults, and before one
has ended, the model cannot know how stages and ends hang together. From a start that is really pretrained they hardly do:
rates that are best in the end are behind at the first rung (results/README.md).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from optuna.distributions import BaseDistribution

from fashionclip_tune.tuning.study.curve_model import CurveModel, Rows, one_thread
from fashionclip_tune.tuning.study.points import Encoding, varied

MOST_ROWS = 300
_BEST_KEPT = 50  # ended trials whose rows enter before those of newer ones
_DRAWN, _VARIED, _VARIATIONS = 240, 3, 6
_TRIES = 6  # at a draw: a space may raise now and then
_TOO_NEAR = 0.02  # in the unit cube
_FLOOR = 1.5
_SMALLEST_SPREAD = 0.05  # of the level: one value, or several that are alike
OWN = ""


@dataclass(frozen=True)
class KnownTrial:
    """What the search knows of a trial."""

    number: int
    start: str
    """What it starts from."""
    params: Mapping[str, Any]
    """As the sampler drew them."""
    distributions: Mapping[str, BaseDistribution]
    curve: Mapping[float, float]
    """Value by share of the budget (0 < share <= 1), at rungs and at its last stage; may be empty or hold NaN."""
    variances: Mapping[float, float]
    """Of the evaluation by share of the budget, where known."""
    state: Literal["running", "waiting", "ended"]
    """Waiting: paused, or the reporter at its rung."""
    cost: float | None = None
    """Seconds to the end of its budget, for one that may be chosen now; None: it may not."""
    data: str = OWN
    """Which data set: each has a level of its own. "" is this sweep's; trials of others are known, and never chosen."""
    is_failure: bool = False
    """It diverged or ran out of memory: it counts as worthless, whatever it had reached."""


@dataclass(frozen=True)
class FreshPoint:
    """Settings that no trial has had."""

    params: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]
    start: str
    batch_size: int | None = None
    """Where the space draws it."""
    cost: float | None = None
    """Of a whole trial; None: that of its start."""


Fresh = Callable[[int, Sequence[Mapping[str, Any]], int], Sequence[FreshPoint]]
"""(seed, given, count): the given settings completed by the space (what it no longer draws is dropped, what is missing is
drawn), then ``count`` random ones."""


@dataclass(frozen=True)
class Judged:
    """A candidate and what is expected of it, in the metric's own units; NaN where no trial has a value yet."""

    trial: int | None
    """None: a new one."""
    params: Mapping[str, Any]
    predicted: float
    """At the end of its budget."""
    deviation: float
    score: float


@dataclass(frozen=True)
class Choice:
    chosen: Judged
    runner_up: Judged | None
    predicted: Mapping[int, float]
    """Of every waiting trial: the value expected at the end of its budget."""


def choose(
    known: Sequence[KnownTrial],
    *,
    fresh: Fresh | None,
    cost_of_start: Mapping[str, float],
    seed: int,
    thaw_cost: float = 0.02,
    num_random: int = 6,
    num_points: int = 1,
) -> Choice | None:
    """What a free slot does next; None: nothing may. A function of its arguments only.

    At most 300 values enter the model: every trial's latest one before any earlier one, and of these first this sweep's
    trials that are not over, then its 50 best, then its newest, then those of other data sets, newest first.

    Args:
        fresh: draws new settings; None: no new trial may be started.
        cost_of_start: seconds of a whole trial.
        seed: of the candidates.
        thaw_cost: what going on with a trial costs beside its own seconds, in whole trials.
        num_random: trials that are known, points among them, before the model decides, while new ones may be begun: sooner it
            tries little but what is like the first ones.
        num_points: of the first so many trials the best goes on, until a trial is known that ended; 0: there is no such rule.
    """
    with one_thread():
        known = sorted(known, key=lambda trial: (trial.data, trial.number))
        if all(_last_share(trial) is None for trial in known):
            points = [] if fresh is None else fresh(seed, [], _TRIES)
            return Choice(Judged(None, points[0].params, math.nan, math.nan, math.nan), None, {}) if points else None
        ends = _Ends(known)
        waiting = [trial for trial in known if trial.state == "waiting" and trial.data == OWN]
        predicted = dict(zip([trial.number for trial in waiting], ends.of(waiting)[0].tolist(), strict=True))
        open_ = [trial for trial in waiting if trial.cost is not None and not _has_failed(trial)]
        due = _points_to_end(known, open_, num_points)
        new = list(fresh(seed, [], _TRIES))[:1] if fresh is not None and len(known) < num_random and not due else []
        if due:
            open_ = due
        elif new:
            open_ = []
        elif fresh is not None:
            new = _new_points(known, ends, fresh, seed)
        if not open_ and not new:
            return None
        costs = [(trial.cost or 0.0) + thaw_cost * cost_of_start.get(trial.start, 0.0) for trial in open_]
        usual = sum(cost_of_start.values()) / len(cost_of_start)
        # A start that is rarely drawn may not be known.
        costs += [cost_of_start.get(point.start, usual) if point.cost is None else point.cost for point in new]
        mean_C, deviation_C = (np.concatenate(pair) for pair in zip(ends.of(open_), ends.of_new(new), strict=True))
        score_C = expected_improvement(mean_C, deviation_C, ends.best) / np.sqrt(np.maximum(costs, 1e-9))
        names: list[tuple[int | None, Mapping[str, Any]]] = [(trial.number, trial.params) for trial in open_]
        names += [(None, point.params) for point in new]
        order = np.argsort(-score_C, kind="stable")[:2]
        of = zip(mean_C.tolist(), deviation_C.tolist(), score_C.tolist(), strict=True)
        every = [Judged(number, params, *figures) for (number, params), figures in zip(names, of, strict=True)]
        judged = [every[c] for c in order]
        return Choice(judged[0], judged[1] if len(judged) > 1 else None, predicted)


def expected_improvement(mean_C: np.ndarray, deviation_C: np.ndarray, best: float) -> np.ndarray:
    """E max(0, value - best) of normal values."""
    z_C = (mean_C - best) / deviation_C
    density_C = np.exp(-(z_C**2) / 2) / math.sqrt(2 * math.pi)
    below_C = np.array([math.erfc(-z / math.sqrt(2)) / 2 for z in z_C])
    return np.asarray(np.maximum(deviation_C * (z_C * below_C + density_C), 0.0))


def _points_to_end(known: Sequence[KnownTrial], open_: Sequence[KnownTrial], num_points: int) -> list[KnownTrial]:
    """Points that may go on, one at a time; none once a trial has had its whole budget, in this sweep or an older one."""
    if any(_last_share(trial) == 1 for trial in known):
        return []
    if any(trial.state == "running" and trial.number < num_points and not _has_failed(trial) for trial in known):
        return []
    return [trial for trial in open_ if trial.number < num_points]


def _new_points(known: Sequence[KnownTrial], ends: "_Ends", fresh: Fresh, seed: int) -> list[FreshPoint]:
    """Variations of the best and random ones, without those that are too near to what was tried."""
    generator = np.random.default_rng(seed)
    working = [trial for trial in known if not _has_failed(trial)]
    order = np.argsort(-ends.of(working)[0], kind="stable")[:_VARIED]
    given: list[Mapping[str, Any]] = [working[place].params for place in order if working[place].data != OWN]
    for place in order:
        trial = working[place]
        given += [varied(trial.params, trial.distributions, generator) for _ in range(_VARIATIONS)]
    points = fresh(seed, given, _DRAWN)
    apart = [point for point, distance in zip(points, ends.distance(points), strict=True) if distance > _TOO_NEAR]
    return apart or list(points)  # of a space of few choices all may have been tried


def _last_share(trial: KnownTrial) -> float | None:
    """Of its last value; None: it has none, or has failed."""
    return (
        max((share for share, value in trial.curve.items() if not math.isnan(value)), default=None)
        if not _has_failed(trial)
        else None
    )


def _has_failed(trial: KnownTrial) -> bool:
    """One whose last value is NaN has, too."""
    return trial.is_failure or (bool(trial.curve) and not math.isfinite(trial.curve[max(trial.curve)]))


@dataclass(frozen=True)
class _Value:
    """Of a trial's stage, in units of its data set."""

    trial: KnownTrial
    share: float
    value: float
    variance: float


class _Level:
    """Where the values of a data set lie and how far apart, and what is too low to be told from a failure."""

    def __init__(self, trials: Sequence[KnownTrial]) -> None:
        """``trials``: of the data set, one of them with a value at least."""
        stages: dict[float, list[float]] = {}
        for trial in trials:
            for share, value in trial.curve.items():
                if not _has_failed(trial) and math.isfinite(value):
                    stages.setdefault(share, []).append(value)
        middle = {share: float(np.median(values)) for share, values in stages.items()}
        self._floors = {share: middle[share] - _FLOOR * (max(values) - middle[share]) for share, values in stages.items()}
        latest = [(trial, each) for trial in trials if (each := _last_share(trial)) is not None]
        self.centre = float(np.median([max(trial.curve[each], self._floors[each]) for trial, each in latest]))
        raised = [max(value, self._floors[share]) for share, values in stages.items() for value in values]
        self.spread = max(float(np.std(raised)), _SMALLEST_SPREAD * abs(self.centre), 1e-9)
        self._worthless = {share: min(floor, middle[share] - self.spread) for share, floor in self._floors.items()}

    def values(self, trial: KnownTrial) -> Iterator[_Value]:
        """Of its stages, the last one first; a failure's are worthless at every stage that any trial has reached."""
        if _has_failed(trial):
            curve = dict(self._worthless)
        else:
            finite = ((share, value) for share, value in trial.curve.items() if math.isfinite(value))
            curve = {share: max(value, self._floors[share]) for share, value in finite}
        for share in sorted(curve, reverse=True):
            variance = trial.variances.get(share, 0.0)
            known = variance / self.spread**2 if math.isfinite(variance) else 0.0
            yield _Value(trial, share, (curve[share] - self.centre) / self.spread, known)


class _Ends:
    """What trials are worth at their end, in the metric's own units."""

    def __init__(self, known: Sequence[KnownTrial]) -> None:
        """``known``: sorted, one of them with a value at least."""
        self._encoding = Encoding(trial.distributions for trial in known)
        self._x_TF = self._encoding([trial.params for trial in known])
        self._place = {(trial.data, trial.number): place for place, trial in enumerate(known)}
        self._data = {data: number for number, data in enumerate(dict.fromkeys([OWN, *(trial.data for trial in known)]))}
        values, levels = list[list[_Value]](), dict[str, _Level]()
        for data in self._data:
            trials = [trial for trial in known if trial.data == data]
            if any(_last_share(trial) is not None for trial in trials):
                levels[data] = _Level(trials)
                values += [list(levels[data].values(trial)) for trial in trials]
        # Before this sweep's first value another data set's level is the best guess.
        self._level = levels.get(OWN) or next(iter(levels.values()))
        entering = _entering(values)
        rows = self._rows([each.trial for each in entering], [each.share for each in entering])
        value_N, variance_N = torch.tensor([[each.value, each.variance] for each in entering], dtype=torch.float64).T
        self._model = CurveModel(replace(rows, value_N=value_N, variance_N=variance_N))
        own = [trial for trial in known if trial.data == OWN and not _has_failed(trial)]
        running = [trial for trial in own if trial.state == "running"]
        if running:
            ends = self._rows(running, [1.0] * len(running))
            self._model = self._model.with_rows(replace(ends, value_N=self._model.predict(ends)[0]))
        over = [trial for trial in own if trial.state == "ended" and trial.curve]
        going_on = [trial for trial in own if trial.state != "ended"]
        reached = [*(_last_share(trial) or 1.0 for trial in over), *(1.0 for _ in going_on)]
        self.best = max(self._predicted(self._rows([*over, *going_on], reached))[0], default=self._level.centre)
        self._tried_TF = self._x_TF[[trial.data == OWN for trial in known]]

    def of(self, trials: Sequence[KnownTrial]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation [N] of the ends of known trials; of one on other data, of its settings on this sweep's."""
        return self._predicted(self._rows(trials, [1.0] * len(trials), on_own_data=True))

    def of_new(self, points: Sequence[FreshPoint]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation [N] of what settings are worth that no trial has had."""
        x_NF, count = self._encoding([point.params for point in points]), len(points)
        return self._predicted(self._at(x_NF, [1.0] * count, [-1] * count, [0] * count))

    def distance(self, points: Sequence[FreshPoint]) -> np.ndarray:
        """[N] to the nearest trial of this sweep."""
        x_NF = self._encoding([point.params for point in points])
        apart_NT = torch.cdist(torch.from_numpy(x_NF), torch.from_numpy(self._tried_TF))
        return np.asarray(apart_NT.numpy().min(axis=1, initial=np.inf))

    def _predicted(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        mean_N, variance_N = self._model.predict(rows)
        return (self._level.centre + self._level.spread * mean_N).numpy(), (self._level.spread * variance_N.sqrt()).numpy()

    def _rows(self, trials: Sequence[KnownTrial], shares: Sequence[float], on_own_data: bool = False) -> Rows:
        places = [self._place[trial.data, trial.number] for trial in trials]
        numbers = [-1 if on_own_data and trial.data != OWN else place for trial, place in zip(trials, places, strict=True)]
        data = [0 if on_own_data else self._data[trial.data] for trial in trials]
        return self._at(self._x_TF[np.array(places, dtype=int)], shares, numbers, data)

    def _at(self, x_NF: np.ndarray, shares: Sequence[float], trials: Sequence[int], data: Sequence[int]) -> Rows:
        u_N = 1 + torch.tensor(shares, dtype=torch.float64).log() / math.log(9)
        zero_N = torch.zeros_like(u_N)
        return Rows(torch.from_numpy(x_NF), u_N, torch.tensor(trials, dtype=torch.long), torch.tensor(data), zero_N, zero_N)


def _entering(values_of_trials: Sequence[Sequence[_Value]]) -> list[_Value]:
    """The values that enter the model, those that its parameters are fitted to first (see ``choose``)."""
    own = [values for values in values_of_trials if values and values[0].trial.data == OWN]
    over = [values for values in own if values[0].trial.state == "ended"]
    best = sorted(over, key=lambda values: -values[0].value)[:_BEST_KEPT]
    order = [*(values for values in own if values[0].trial.state != "ended"), *best]
    rest = [values for values in values_of_trials if values and not any(values is each for each in order)]
    order += sorted(rest, key=lambda values: (values[0].trial.data != OWN, -values[0].trial.number))
    return [*(values[0] for values in order), *(value for values in order for value in values[1:])][:MOST_ROWS]
