"""How long a sweep is expected to take, and how much it trains, in closed form: trials' qualities are taken as random."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.models.architecture import forward_flops
from fashionclip_tune.tuning.planning.allocation import Allotment
from fashionclip_tune.tuning.schedulers import FREEZE_THAW, StoppingRule, WaitingRule, stopping_rule
from fashionclip_tune.tuning.study.freeze_thaw import SearchTerms, batch_key
from fashionclip_tune.tuning.study.policy import ModelQuota

# Seconds, as measured on two cores without other work: see results/README.md, "The plan against what came".
SWEEP_S = 4.7  # the start and the end of Ray, the export of the winner
PROCESS_S = 5.4  # a process starts and imports torch; those of all slots do at the same time
TRIAL_S = 0.5  # between two trials of a process
# By how much the hours may be off, as a share: with rates that were measured, and with estimated ones.
_MEASURED_ERROR, _ESTIMATE_ERROR = 0.25, 0.5


@dataclass(frozen=True)
class ModelPace:
    """How fast trials of one configuration are, where as many run side by side as fit."""

    samples_per_second: float
    start_s: float
    """Until the zero-shot weights are evaluated."""
    evaluation_s: float
    """Of a stage, with its checkpoint."""
    source: str
    is_estimate: bool = False

    def trial_s(self, examples: float, stage: int) -> float:
        return self.start_s + examples / self.samples_per_second + examples / stage * self.evaluation_s


@dataclass(frozen=True)
class Course:
    """All that decides how a sweep goes, but its budget."""

    num_trials: int
    allotment: Allotment
    configs: Sequence[ProjectConfig]
    """Draws of the space, its own points first: how often each model comes, and each of its shares."""
    paces: Sequence[ModelPace] | None
    """Of each of ``configs``; None where that of a model is not known."""
    reduction_factor: int
    scheduler: str
    num_points: int = 0
    """Of the space: they are the first trials."""
    quota: ModelQuota | None = None
    older: tuple[str, ...] = ()
    """Models of the trials that the sweep starts with: rungs and minimum know them."""
    decoding_s: float = 0.0
    """Of the photos to evaluate on, once."""

    @cached_property
    def counts(self) -> list[float]:
        """Expected trials of each of ``configs``: the points, each model's minimum, then all draws alike."""
        names = [config.model_name for config in self.configs]
        free = list(range(self.num_points, len(names))) or list(range(len(names)))
        points = range(0 if self.older else self.num_points)[: self.num_trials]  # a warm start brings them along
        counts = [float(number in points) for number in range(len(names))]
        start_of = self.quota.start_of if self.quota is not None else {}
        choice_of = {start: choice for choice, start in start_of.items()}
        begun = (*self.older, *(names[number] for number in points))
        started = Counter(choice_of.get(start, start) for start in begun)
        for _ in range(self.num_trials - len(points)):
            bound = self.quota.next_fixed(started) if self.quota is not None else {}
            alike = free
            for choice in bound.values():
                started[choice] += 1
                start = start_of.get(choice, choice)
                alike = [number for number in free if names[number] == start] or [names.index(start)]
            for number in alike:
                counts[number] += 1 / len(alike)
        return counts

    def paces_of_models(self) -> dict[str, list[ModelPace]]:
        found: dict[str, list[ModelPace]] = {}
        for config, pace in zip(self.configs, self.paces or (), strict=False):
            found.setdefault(config.model_name, []).append(pace)
        return found

    def seconds_of(self, model: str, examples: int, stage: int) -> float | None:
        """From a trial's start to so many examples, with the model's slowest configuration; None: not known."""
        return max((pace.trial_s(examples, stage) for pace in self.paces_of_models().get(model, ())), default=None)

    def counts_of_models(self) -> dict[str, float]:
        counts: dict[str, float] = {}
        for config, count in zip(self.configs, self.counts, strict=True):
            counts[config.model_name] = counts.get(config.model_name, 0.0) + count
        return counts

    def cost_of_models(self, budget: int, stage: int) -> dict[str, float]:
        """Of a whole trial: seconds of the sweep, as many running side by side as fit; where no rate is known, operations."""
        return self._costs(budget, stage, lambda config: config.model_name)

    def cost_of_batches(self, budget: int, stage: int) -> dict[str, float]:
        """The same by model and batch size; empty where all have one size."""
        if len({config.training.batch_size for config in self.configs}) < 2:
            return {}
        return self._costs(budget, stage, lambda config: batch_key(config.model_name, config.training.batch_size))

    def _costs(self, budget: int, stage: int, key: Callable[[ProjectConfig], str]) -> dict[str, float]:
        costs: dict[str, list[float]] = {}
        for number, config in enumerate(self.configs):
            pace = None if self.paces is None else self.paces[number].trial_s(budget, stage)
            cost = forward_flops(config.model_name) * budget if pace is None else pace / self.allotment.at_a_time(config)
            costs.setdefault(key(config), []).append(float(cost))
        return {each: median(found) for each, found in costs.items()}


@dataclass(frozen=True)
class Forecast:
    """Expected values of a whole sweep."""

    examples: float
    """Trained by all trials together."""
    trials_to_budget: float
    samples_per_second: Mapping[str, float]
    """By model; where its configurations differ, the median of the draws."""
    hours: float | None = None
    """None: of one model no rate is known."""
    error: float = 0.0
    """By how much they may be off, as a share."""


def forecast(course: Course, budget: int, stage: int) -> Forecast:
    """For trials that get ``budget`` examples at most and are evaluated every ``stage``."""
    rule = stopping_rule(
        course.scheduler, stage_examples=stage, budget_examples=budget, reduction_factor=course.reduction_factor
    )
    counts = course.counts_of_models()
    if isinstance(rule, WaitingRule):
        part, first = _part_of_budget(course, rule, budget, stage), min(rule.rungs, default=budget) / budget
        examples = {model: part * budget * count for model, count in counts.items()}
        to_budget = course.num_trials * ((part - first) / (1 - first) if first < 1 else 1.0)
    else:
        ended = _ended_of_models(course, rule, counts)
        examples = {model: float(each @ [*rule.rungs, budget]) for model, each in ended.items()}
        to_budget = float(sum(each[-1] for each in ended.values()))
    expected = Forecast(
        examples=sum(examples.values()),
        trials_to_budget=to_budget,
        samples_per_second={
            model: median(pace.samples_per_second for pace in paces) for model, paces in course.paces_of_models().items()
        },
    )
    if course.paces is None:
        return expected
    means = {model: examples[model] / count for model, count in counts.items() if count}
    error = _ESTIMATE_ERROR if any(pace.is_estimate for pace in course.paces) else _MEASURED_ERROR
    return replace(expected, hours=_hours(course, course.paces, means, budget, stage), error=error)


def search_terms(course: Course, budget: int, stage: int, keep_paused: int) -> SearchTerms:
    """Of the search that lets trials wait: what all trials together may cost is what the forecast says."""
    rule = stopping_rule(FREEZE_THAW, stage_examples=stage, budget_examples=budget, reduction_factor=course.reduction_factor)
    costs = course.cost_of_models(budget, stage)
    total = _part_of_budget(course, rule, budget, stage) * course.num_trials * _mean_cost(course, costs)
    num_points, of_batches = max(1, course.num_points), course.cost_of_batches(budget, stage)
    return SearchTerms(course.num_trials, rule.rungs, budget, costs, total, keep_paused, num_points, of_batches)


def _mean_cost(course: Course, costs: Mapping[str, float]) -> float:
    return sum(count * costs[model] for model, count in course.counts_of_models().items()) / course.num_trials


def _part_of_budget(course: Course, rule: StoppingRule, budget: int, stage: int) -> float:
    """Of the mean trial where trials wait at rungs: what ASHA would train; but a first rung of each, and one whole trial.

    One that costs most, that is: it may be the best.
    """
    num, costs = course.num_trials, course.cost_of_models(budget, stage)
    of_asha = float(_ended(rule, num, 0) @ [*rule.rungs, budget]) / budget
    whole = max(costs.values()) / _mean_cost(course, costs)
    return max(of_asha, whole + (num - 1) * min(rule.rungs, default=budget) / budget) / num


def _ended_of_models(course: Course, rule: StoppingRule, counts: Mapping[str, float]) -> dict[str, np.ndarray[Any, Any]]:
    """Trials of each model that are expected to end at each rung, and at the budget."""
    if rule.within_models:
        return {model: _ended(rule, count, course.older.count(model)) for model, count in counts.items()}
    of_all = _ended(rule, course.num_trials, len(course.older)) / course.num_trials
    return {model: count * of_all for model, count in counts.items()}


def _ended(rule: StoppingRule, count: float, older: int) -> np.ndarray[Any, Any]:
    """Trials that are held against each other and are expected to end at each rung, and at the budget."""
    reached = _reaching(rule, older + count) - _reaching(rule, older)
    ended: np.ndarray[Any, Any] = reached - np.append(reached[1:], 0)
    return ended


def _reaching(rule: StoppingRule, count: float) -> np.ndarray[Any, Any]:
    """Of the first ``count`` trials of a model, those that are expected at each rung, and at the budget."""
    reaching = [count]
    for rung in range(len(rule.rungs)):
        whole = int(reaching[-1])
        chances = [rule.chance(earlier, rung) for earlier in range(whole + 1)]
        reaching.append(sum(chances[:whole]) + (reaching[-1] - whole) * chances[whole])
    return np.array(reaching)


def _hours(course: Course, paces: Sequence[ModelPace], mean_examples: Mapping[str, float], budget: int, stage: int) -> float:
    """The work divided by the trials at a time, and what is idle while the last round, or the longest trial, ends."""
    work_s, shared_s, each_s, longest_s = 0.0, 0.0, 0.0, 0.0
    for config, count, pace in zip(course.configs, course.counts, paces, strict=True):
        if count:
            trial_s, at_a_time = pace.trial_s(mean_examples[config.model_name], stage), course.allotment.at_a_time(config)
            part_s = count * (TRIAL_S + trial_s) / at_a_time
            work_s += part_s
            shared_s += part_s if at_a_time > 1 else 0
            each_s += count * trial_s / course.num_trials
            longest_s = max(longest_s, (1 - 1 / at_a_time) * pace.trial_s(budget, stage))
    slots = course.allotment.slots.count
    rounds = course.num_trials / slots
    idle_s = max((math.ceil(rounds) / rounds - 1) * shared_s, longest_s - (1 - 1 / slots) * each_s)
    return (SWEEP_S + PROCESS_S + course.decoding_s + work_s + idle_s) / 3600
