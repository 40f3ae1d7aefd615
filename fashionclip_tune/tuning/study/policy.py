"""A minimum number of trials for each architecture, before the sampler chooses among them freely.

ASHA's rungs and TPE's model know an architecture by its trials only: one that was unlucky with its first two would never be
drawn again.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fashionclip_tune.errors import UserError

_DEFAULT = 6
_MAX_STARTUP_TRIALS = 6


def startup_trials(num_trials: int) -> int:
    """Random trials before TPE takes over: a third of the sweep, at most six (Optuna's ten: results/README.md)."""
    return min(_MAX_STARTUP_TRIALS, math.ceil(num_trials / 3))


@dataclass(frozen=True)
class ModelQuota:
    """Every architecture gets ``min_trials``, the cheap ones first: they take turns of like cost.

    A model that takes four times another's time has its first trial after four of the other's, so that an interrupted sweep has
    spent like sums on each, and the sampler soon knows them all.

    Attributes:
        parameter: the categorical parameter that decides what is started from.
        cost_of_model: of one trial of each of its values, in any unit.
    """

    parameter: str
    cost_of_model: Mapping[Any, float]
    min_trials: int
    start_of: Mapping[Any, str] = field(default_factory=dict)
    """What each value starts from, where it is not named so itself."""

    def next_fixed(self, num_started: Mapping[Any, int]) -> dict[str, Any]:
        """What the next trial's draws are bound to, given how many of each architecture were started; nothing: free."""
        open_models = [model for model in self.cost_of_model if num_started.get(model, 0) < self.min_trials]
        if not open_models:
            return {}
        # Where two have cost the same, the one named first.
        return {self.parameter: min(open_models, key=lambda model: (num_started.get(model, 0) + 1) * self.cost_of_model[model])}


def plan_quota(
    wanted: int | None,
    *,
    parameter: str | None,
    models: Sequence[Any],
    num_trials: int,
    cost: Callable[[Any], float],
    start_of: Mapping[Any, str] | None = None,
) -> ModelQuota | None:
    """By default six an architecture, but half of the sweep at most: the rest is the sampler's.

    Args:
        wanted: ``--min-trials-per-model``; None: the default.
        parameter: that decides what is started from; None: the space has none, and nothing can be bound.
        models: its values; of two that cost the same the first one comes first.
        cost: of a trial of one, in any unit.
        start_of: what they start from, where they do not say it themselves.

    Raises:
        UserError: a number that is negative, does not fit the sweep, or that this space cannot be bound to.
    """
    if wanted is not None and wanted < 0:
        raise UserError(f"--min-trials-per-model {wanted} is not allowed: at least 0")
    if wanted == 0 or len(models) < 2:
        return None
    if parameter is None:
        if wanted is None:
            return None
        raise UserError(
            f"--min-trials-per-model {wanted} is not possible: clip_model is no categorical parameter of its own in this space"
        )
    if wanted is not None and wanted * len(models) > num_trials:
        raise UserError(
            f"--min-trials-per-model {wanted} is not allowed: {len(models)} models and --num-trials {num_trials} leave "
            f"at most {num_trials // len(models)}"
        )
    min_trials = min(_DEFAULT, num_trials // (2 * len(models))) if wanted is None else wanted
    return ModelQuota(parameter, {model: cost(model) for model in models}, min_trials, start_of or {}) if min_trials else None
