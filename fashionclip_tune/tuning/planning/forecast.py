"""How long a sweep is expected to take, and how much it trains, in closed form: trials' qualities are taken as random."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.tuning.planning.allocation import Allotment
from fashionclip_tune.tuning.schedulers import StoppingRule, stopping_rule
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

    def first_stage_s(self, model: str, stage: int) -> float | None:
        """From a trial's start to the end of its first stage, with the model's slowest configuration; None: not known."""
        return max((pace.trial_s(stage, stage) for pace in self.paces_of_models().get(model, ())), default=None)


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
    counts: dict[str, float] = {}
    for config, count in zip(course.configs, course.counts, strict=True):
        counts[config.model_name] = counts.get(config.model_name, 0.0) + count
    ended = {model: _ended(rule, count, course.older.count(model)) for model, count in counts.items()}
    examples = {model: float(each @ [*rule.rungs, budget]) for model, each in ended.items()}
    expected = Forecast(
        examples=sum(examples.values()),
        trials_to_budget=float(sum(each[-1] for each in ended.values())),
        samples_per_second={
            model: median(pace.samples_per_second for pace in paces) for model, paces in course.paces_of_models().items()
        },
    )
    if course.paces is None:
        return expected
    means = {model: examples[model] / count for model, count in counts.items() if count}
    error = _ESTIMATE_ERROR if any(pace.is_estimate for pace in course.paces) else _MEASURED_ERROR
    return replace(expected, hours=_hours(course, course.paces, means, budget, stage), error=error)


def _ended(rule: StoppingRule, count: float, older: int) -> np.ndarray[Any, Any]:
    """Trials of one model that are expected to end at each rung, and at the budget."""
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
