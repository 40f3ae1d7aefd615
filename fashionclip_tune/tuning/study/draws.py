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


def draw_points(
    space: Space, count: int, seed: int, points: Sequence[Mapping[str, Any]] = (), *, skips_errors: bool = False
) -> Iterator[DrawnPoint]:
    """The given points, then random ones, without a sweep.

    What a point does not say is drawn. ``skips_errors``: draws at which the space raises are left out.
    """
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for point in points:
        study.enqueue_trial(dict(point))
    for _ in range(len(points) + count):
        trial = study.ask()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a point out of range: who checks the space says so
            try:
                settings = space(trial)
            except Exception:  # whatever the user's space raises
                if not skips_errors:
                    raise
                continue
        yield DrawnPoint(settings, trial.params, trial.distributions)
