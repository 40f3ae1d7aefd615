"""Asynchronous successive halving as a pure rule (Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning).

A trial that reaches a rung goes on if it is among the best 1/eta of those that reached it before; the first one always
does. This is the stopping variant that Ray Tune's ASHAScheduler runs, without its state.
"""

from collections.abc import Sequence

import numpy as np


def asha_rungs(grace_examples: int, budget_examples: int, reduction_factor: int) -> list[int]:
    """``grace * eta**k`` below the budget, in whole examples."""
    levels = []
    level = grace_examples
    while level < budget_examples:
        levels.append(level)
        level *= reduction_factor
    return levels


def survives_asha(value: float, earlier_values: Sequence[float], reduction_factor: int) -> bool:
    """Whether a trial goes on from a rung at which the earlier ones had these values; NaN never does."""
    if not np.isfinite(value):
        return False
    finite = [earlier for earlier in earlier_values if np.isfinite(earlier)]
    if not finite:
        return True
    return bool(value >= np.percentile(finite, (1 - 1 / reduction_factor) * 100))
