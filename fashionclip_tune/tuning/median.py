"""The median stopping rule as a pure rule (Golovin et al. 2017, Google Vizier, section 3.2.2).

A trial stops at a stage if the best value that it has had is strictly below the median of the others' running averages:
each one's mean over its stages so far. The paper averages over finished trials; here, as with ASHA, over all that have
reached the stage, so that trials side by side are judged too.
"""

from collections.abc import Mapping, Sequence

import numpy as np

# Of the architecture, at the stage; Ray Tune's rule asks for as many. A median of one or two is a toss of a coin.
MIN_EARLIER = 3


def survives_median(curve: Mapping[int, float], earlier_curves: Sequence[Mapping[int, float]]) -> bool:
    """Whether a trial goes on.

    Args:
        curve: its value at each stage so far, by examples seen; what it had before training (0 examples) does not count.
        earlier_curves: those of the others that have reached the same stage, up to it.
    """
    own = _trained(curve)
    if not own or not np.isfinite(curve[max(curve)]):
        return False
    averages = [np.mean(values) for earlier in earlier_curves if (values := _trained(earlier))]
    return len(averages) < MIN_EARLIER or bool(max(own) >= np.median(averages))


def _trained(curve: Mapping[int, float]) -> list[float]:
    return [value for examples_seen, value in curve.items() if examples_seen > 0 and np.isfinite(value)]
