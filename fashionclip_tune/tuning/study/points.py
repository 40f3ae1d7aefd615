"""Settings as points: numbers that a model can measure distances in, variations of them, and good defaults."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

_NOT_DRAWN = 0.5
_ABSENT = object()
_STEP, _REDRAWN = 0.15, 1 / 6  # of a variation: in the range's width, and the chance of another choice


class Encoding:
    """Params as [F] numbers: choices of two 0 or 1, of more one-hot over sqrt 2, numbers scaled to 0 to 1 (in logarithms where
    the range is).

    A parameter that a branch of the space does not draw is 0.5. A name's first distribution is the one that counts: numbers
    of another range lie outside 0 to 1, a choice that is not among the first ones is none of them.
    """

    def __init__(self, distributions: Iterable[Mapping[str, BaseDistribution]]) -> None:
        self._distributions: dict[str, BaseDistribution] = {}
        for each in distributions:
            for name, distribution in each.items():
                if not distribution.single():
                    self._distributions.setdefault(name, distribution)

    def __call__(self, points: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """[N, F]; F is at least 1."""
        columns = [_columns(kind, [point.get(name, _ABSENT) for point in points]) for name, kind in self._distributions.items()]
        return np.hstack(columns or [np.zeros((len(points), 1))])


def _columns(distribution: BaseDistribution, values: Sequence[Any]) -> np.ndarray:
    if isinstance(distribution, CategoricalDistribution):
        choices = distribution.choices[1:] if len(distribution.choices) == 2 else distribution.choices
        high = 1.0 if len(choices) == 1 else 2**-0.5
        rows = [[_NOT_DRAWN if value is _ABSENT else high * (value == choice) for choice in choices] for value in values]
        return np.array(rows).reshape(len(values), len(choices))
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    # A name may have been that of a choice in another sweep: only numbers have a place.
    numbers = np.array([value if type(value) in (float, int) else np.nan for value in values], dtype=float)
    return np.where(np.isnan(numbers), _NOT_DRAWN, _to_unit(distribution, numbers))[:, None]


def _to_unit(distribution: FloatDistribution | IntDistribution, values: np.ndarray) -> np.ndarray:
    low, high = distribution.low, distribution.high
    if distribution.log:
        return np.asarray(np.log(np.maximum(values, 1e-300) / low) / np.log(high / low))
    return (values - low) / (high - low)


def varied(
    params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution], generator: np.random.Generator
) -> dict[str, Any]:
    """Each number moved by about a seventh of its range, each choice drawn anew with a chance of one in six."""
    steps, shares = generator.normal(size=len(params)).tolist(), generator.random((len(params), 2)).tolist()
    drawn = zip(params.items(), steps, shares, strict=True)
    return {name: _moved(value, distributions[name], step, *each) for (name, value), step, each in drawn}


def _moved(value: Any, distribution: BaseDistribution, step: float, redrawn: float, choice: float) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(choice * len(distribution.choices))] if redrawn < _REDRAWN else value
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if distribution.single():
        return value
    place = float(_to_unit(distribution, np.array(value))) + _STEP * step
    return _from_unit(distribution, min(max(place, 0.0), 1.0))


def _from_unit(distribution: FloatDistribution | IntDistribution, place: float) -> float | int:
    low, high = distribution.low, distribution.high
    value = low * (high / low) ** place if distribution.log else low + (high - low) * place
    if distribution.step is not None and not distribution.log:
        value = low + round((value - low) / distribution.step) * distribution.step
    value = min(max(value, low), high)
    return round(value) if isinstance(distribution, IntDistribution) else float(value)


def default_points(
    draw: Callable[[optuna.Trial], Any], parameter: str | None = None, choices: Sequence[Any] = ()
) -> list[dict[str, Any]]:
    """Where a space names no points: one for each start, the middle of each log range, no augmentation.

    Numbers of other ranges are at their lowest, choices at their first, which is how spaces write "none" and "off".

    Args:
        draw: the space, called once for each point; parameters of a branch are there where the branch is taken.
        parameter: that decides what is started from; None: there is one point.
        choices: its values.
    """
    points = []
    every: list[dict[str | None, Any]] = [{}] if parameter is None else [{parameter: choice} for choice in choices]
    for fixed in every:
        trial = optuna.create_study(sampler=_Middle(fixed)).ask()
        draw(trial)
        points.append(dict(trial.params))
    return points


class _Middle(BaseSampler):
    def __init__(self, fixed: Mapping[str | None, Any]) -> None:
        self._fixed = fixed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if param_name in self._fixed:
            return self._fixed[param_name]
        if isinstance(param_distribution, CategoricalDistribution):
            return param_distribution.choices[0]
        assert isinstance(param_distribution, FloatDistribution | IntDistribution)
        return _from_unit(param_distribution, 0.5 if param_distribution.log else 0.0)
