"""How long a sweep will take and how much it will train: its course played through many times with trials of chance worth.

What is not known beforehand is how good each trial turns out. Where trials are of chance worth, the stopping rule decides
on ranks alone; what a searcher learns makes later trials better, so that a few more of them go on than here.
"""

import heapq
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.tuning.planning.allocation import Allotment
from fashionclip_tune.tuning.planning.overhead import NO_OVERHEAD, Overhead
from fashionclip_tune.tuning.schedulers import StoppingRule, stopping_rule
from fashionclip_tune.tuning.study.policy import ModelQuota

_PLAYED = 100


@dataclass(frozen=True)
class ModelPace:
    """How long a trial of one configuration takes, where as many run side by side as fit."""

    samples_per_second: float
    low: float
    high: float
    """The rate's range, by which ``low`` and ``high`` of a forecast come about."""
    start_s: float
    """Until the untouched weights are evaluated."""
    evaluation_s: float
    """Of a stage, with its checkpoint."""
    source: str


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
    overhead: Overhead = NO_OVERHEAD


@dataclass(frozen=True)
class Forecast:
    """Half of the sweeps of this kind take less than ``hours``; low and high include the rate's range. None: not known."""

    hours: float | None
    hours_low: float | None
    hours_high: float | None
    examples: float
    """Trained by all trials together."""
    trials_to_budget: float
    samples_per_second: dict[str, float]
    """By model; where its configurations differ, the median of the draws."""
    sources: dict[str, str]
    overhead: Overhead
    first_stage_s: dict[str, float]
    """From a trial's start to the end of its first stage, by model; the slowest configuration's."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def forecast(course: Course, budget: int, stage: int) -> Forecast:
    """Plays the sweep with every rate in the middle, then with all at the low and at the high end."""
    middle = _play(course, budget, stage, "samples_per_second")
    examples = float(np.mean([played.examples for played in middle]))
    to_budget = float(np.mean([played.to_budget for played in middle]))
    if course.paces is None:
        return Forecast(None, None, None, examples, to_budget, {}, {}, course.overhead, {})
    slow = [played.hours for played in _play(course, budget, stage, "low")]
    fast = [played.hours for played in _play(course, budget, stage, "high")]
    by_model: dict[str, list[ModelPace]] = {}
    for config, pace in zip(course.configs, course.paces, strict=True):
        by_model.setdefault(config.model_name, []).append(pace)
    return Forecast(
        hours=float(np.median([played.hours for played in middle])),
        hours_low=float(np.percentile(fast, 10)),
        hours_high=float(np.percentile(slow, 90)),
        examples=examples,
        trials_to_budget=to_budget,
        samples_per_second={model: median(pace.samples_per_second for pace in paces) for model, paces in by_model.items()},
        sources={model: " or ".join(dict.fromkeys(pace.source for pace in paces)) for model, paces in by_model.items()},
        overhead=course.overhead,
        first_stage_s={
            model: max(_seconds(pace, stage, stage, "samples_per_second") for pace in paces)
            for model, paces in by_model.items()
        },
    )


@dataclass(frozen=True)
class _Played:
    hours: float
    examples: int
    to_budget: int


def _play(course: Course, budget: int, stage: int, rate: str) -> list[_Played]:
    at_a_time = [course.allotment.at_a_time(config) for config in course.configs]
    return [_play_once(course, at_a_time, budget, stage, rate, random.Random(seed)) for seed in range(_PLAYED)]


def _play_once(course: Course, at_a_time: Sequence[int], budget: int, stage: int, rate: str, chance: random.Random) -> _Played:
    """Trials start in turn, each as soon as its part of the machine is free; rungs see them in that order."""
    rule = stopping_rule(
        course.scheduler, stage_examples=stage, budget_examples=budget, reduction_factor=course.reduction_factor
    )
    reached: dict[tuple[str, int], list[dict[int, float]]] = {}
    for model in course.older:
        _stopped_at(reached, model, rule, budget, chance.random())
    drawn, slots, overhead = _drawn(course, chance), course.allotment.slots.count, course.overhead
    running: list[tuple[float, float]] = []  # when it ends, and its part of the machine
    now, used, last_end, examples, to_budget = 0.0, 0.0, 0.0, 0, 0
    for number, draw in enumerate(drawn):
        seen = _stopped_at(reached, course.configs[draw].model_name, rule, budget, chance.random())
        part = 1 / at_a_time[draw]
        while running and (used + part > 1 + 1e-6 or len(running) >= slots):
            now, freed = heapq.heappop(running)
            used -= freed
        beside_s = overhead.process_s if number < slots else overhead.trial_s
        end = now + beside_s + _seconds(course.paces[draw] if course.paces else None, seen, stage, rate)
        heapq.heappush(running, (end, part))
        used, last_end = used + part, max(last_end, end)
        examples, to_budget = examples + seen, to_budget + (seen == budget)
    return _Played((overhead.sweep_s + last_end) / 3600, examples, to_budget)


def _drawn(course: Course, chance: random.Random) -> list[int]:
    """Which of ``configs`` the trials are, in turn, as the study draws them: the points, each architecture's minimum, then the
    sampler's choice."""
    names = [config.model_name for config in course.configs]
    free = range(course.num_points, len(names)) or range(len(names))
    points = range(0 if course.older else course.num_points)  # a warm start brings them along
    drawn = list(points[: course.num_trials])
    started = Counter((*course.older, *(names[draw] for draw in drawn)))
    while len(drawn) < course.num_trials:
        bound = course.quota.next_fixed(started) if course.quota is not None else {}
        model = next(iter(bound.values()), None)
        possible = free if model is None else [draw for draw in free if names[draw] == model]
        drawn.append(chance.choice(possible or [names.index(str(model))]))
        started[names[drawn[-1]]] += 1
    return drawn


def _stopped_at(
    reached: dict[tuple[str, int], list[dict[int, float]]], model: str, rule: StoppingRule, budget: int, worth: float
) -> int:
    """A trial of the same worth at every stage."""
    curve: dict[int, float] = {}
    for rung in rule.rungs:
        curve[rung] = worth
        earlier = reached.setdefault((model, rung), [])
        goes_on = rule.survives(curve, earlier)
        earlier.append(dict(curve))
        if not goes_on:
            return rung
    return budget


def _seconds(pace: ModelPace | None, seen: int, stage: int, rate: str) -> float:
    if pace is None:
        return math.nan
    return float(pace.start_s + seen / vars(pace)[rate] + seen // stage * pace.evaluation_s)
