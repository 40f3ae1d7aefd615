"""Which trials are stopped early: pure rules on what the journal has, with no state of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fashionclip_tune.errors import UserError


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


FREEZE_THAW, ASHA, BEGUN_ASHA = "asha", "asha-stopping", "asha-begun"
"""The default; ASHA that stops trials for good; the same with rungs for each architecture, in sweeps of older versions only."""
SCHEDULERS = (FREEZE_THAW, ASHA, "median", "none")
_MIDWAY = "it changes a trial's settings midway, which a trial's frozen configuration and its fingerprint forbid"
_BRACKETS = "it lets trials wait for each other, and an interrupted one may never be decided; asha is its asynchronous form"
_REFUSED = {"pbt": _MIDWAY, "pb2": _MIDWAY, "hyperband": _BRACKETS, "bohb": _BRACKETS}


class StoppingRule(Protocol):
    """``rungs``: the examples seen at which a trial is judged, rising."""

    @property
    def rungs(self) -> tuple[int, ...]: ...

    def survives(self, curve: Mapping[int, float], earlier_curves: Sequence[Mapping[int, float]]) -> bool:
        """Whether a trial goes on from the last stage of its curve (value by examples seen).

        ``earlier_curves``: those of the other trials that have reached that stage, up to it.
        """

    @property
    def within_models(self) -> bool:
        """Whether the other trials are those of the same architecture."""

    def chance(self, num_earlier: int, rung: int) -> float:
        """Expected share of trials of chance worth that go on from the rung of that index, after so many others there."""


@dataclass(frozen=True)
class AshaRule:
    """One in ``reduction_factor`` goes on from a rung (see ``survives_asha``); without rungs every trial runs to its budget."""

    rungs: tuple[int, ...]
    reduction_factor: int
    within_models: bool = False

    def survives(self, curve: Mapping[int, float], earlier_curves: Sequence[Mapping[int, float]]) -> bool:
        stage = max(curve)
        return survives_asha(curve[stage], [earlier[stage] for earlier in earlier_curves], self.reduction_factor)

    def chance(self, num_earlier: int, rung: int) -> float:
        """Exact at the first rung. At later ones the very first trial is no rival: who gets there was ahead of it."""
        rivals = num_earlier if rung == 0 else max(0, num_earlier - 1)
        return (1 + (rivals - 1) / self.reduction_factor) / (rivals + 1) if rivals else 1.0

    def __str__(self) -> str:
        if not self.rungs:
            return "none: every trial runs to its budget"
        of_what = " of each architecture" if self.within_models else ""
        return f"asha, rungs at {_listed(self.rungs)} examples, the best 1/{self.reduction_factor}{of_what} go on"


@dataclass(frozen=True)
class MedianRule:
    """The better half goes on, judged at every stage from the grace on (see ``survives_median``)."""

    rungs: tuple[int, ...]
    within_models: bool = True

    def survives(self, curve: Mapping[int, float], earlier_curves: Sequence[Mapping[int, float]]) -> bool:
        return survives_median(curve, earlier_curves)

    def chance(self, num_earlier: int, rung: int) -> float:
        """A half at the first rung. Most of those that pass it pass the others too, as recorded curves show."""
        return 0.5 if rung == 0 and num_earlier >= MIN_EARLIER else 1.0

    def __str__(self) -> str:
        return f"median, judged every {self.rungs[0]:,} examples, from the fourth trial of an architecture on"


NO_STOPPING = AshaRule((), 2)


@dataclass(frozen=True)
class WaitingRule(AshaRule):
    """Of the search that lets trials wait at rungs (``study/freeze_thaw.py``): it stops none, and trains as much as ASHA."""

    def __str__(self) -> str:
        if not self.rungs:
            return super().__str__()
        return f"asha, rungs at {_listed(self.rungs)} examples: trials wait there, and what promises most for its cost goes on"


def stopping_rule(scheduler: str, *, stage_examples: int, budget_examples: int, reduction_factor: int) -> StoppingRule:
    """The rule of a scheduler; the grace is a stage."""
    levels: tuple[int, ...] = ()
    if scheduler in (FREEZE_THAW, ASHA, BEGUN_ASHA):
        levels = tuple(asha_rungs(stage_examples, budget_examples, reduction_factor))
    elif scheduler == "median":
        levels = tuple(range(stage_examples, budget_examples, stage_examples))
    if not levels:
        return NO_STOPPING
    if scheduler == "median":
        return MedianRule(levels)
    return (WaitingRule if scheduler == FREEZE_THAW else AshaRule)(levels, reduction_factor, scheduler == BEGUN_ASHA)


def check_scheduler(name: str) -> None:
    """Raises UserError for a scheduler that is not there, with the reason where it could not be."""
    if name not in SCHEDULERS:
        reason = _REFUSED.get(name.lower().replace("-", "_"))
        because = f"; {name} is not possible: {reason}" if reason else ""
        raise UserError(f"--scheduler {name!r} is not allowed: {', '.join(SCHEDULERS[:-1])} or {SCHEDULERS[-1]}{because}")


def _listed(rungs: Sequence[int]) -> str:
    return ", ".join(f"{rung:,}" for rung in rungs)
