"""What a search space makes of points and of random draws, without a sweep."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution

Space = Callable[[optuna.trial.Trial], dict[str, Any]]


@dataclass(frozen=True)
class DrawnPoint:
    """What a space made of one set of draws, and from which distributions they came."""

    settings: Any
    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]


def draw_points(space: Space, count: int, seed: int, points: Sequence[Mapping[str, Any]] = ()) -> Iterator[DrawnPoint]:
    """The given points, then random ones, without a sweep: to check a space before anything is started."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for point in points:
        study.enqueue_trial(dict(point))
    for _ in range(len(points) + count):
        trial = study.ask()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a point out of range: who checks the space says so
            settings = space(trial)
        yield DrawnPoint(settings, trial.params, trial.distributions)
