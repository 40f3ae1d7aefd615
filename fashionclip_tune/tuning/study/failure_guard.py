"""Stops a sweep whose trials fail one after the other in the same way: the machine is at fault, not their settings."""

from collections.abc import Collection, Sequence
from datetime import datetime
from itertools import takewhile

from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from fashionclip_tune.errors import StopReason
from fashionclip_tune.tuning.study.study import message, stop_reason

_IN_A_ROW = 3


def common_failure(trials: Sequence[FrozenTrial], ended_before: Collection[int] = ()) -> str | None:
    """What is wrong with the machine, by the last trials to end: three in a row or more that failed the same way, untrained.

    They may all share a choice, such as the model, with which no trial has trained yet. That choice may be at fault, and so
    they are not enough.

    Args:
        trials: of one sweep, as its journal has them.
        ended_before: numbers of those that had ended when this life of the sweep began: it tries one at least.
    """
    ended = [trial for trial in trials if trial.state.is_finished()]
    ended.sort(key=lambda trial: trial.datetime_complete or datetime.min, reverse=True)
    row = list(takewhile(lambda trial: _untrained_failure(trial) == _untrained_failure(ended[0]) is not None, ended))
    if len(row) < _IN_A_ROW or all(trial.number in ended_before for trial in row) or _have_a_choice_in_common(row, trials):
        return None
    return (
        f"the last {len(row)} trials to end failed the same way before they had trained a stage, whatever their settings: "
        f"{message(row[0])}. They are lost; put that right before those that are left"
    )


def _untrained_failure(trial: FrozenTrial) -> tuple[str | None, str] | None:
    """How it failed before its first stage was trained; messages of errors begin with their kind, and differ in paths."""
    if trial.state != TrialState.FAIL or _has_trained(trial):
        return None
    reason = stop_reason(trial)
    return reason, (message(trial) or "").partition(":")[0] if reason == StopReason.ERROR else ""


def _has_trained(trial: FrozenTrial) -> bool:
    return max(trial.intermediate_values, default=0) > 0


def _have_a_choice_in_common(row: Sequence[FrozenTrial], trials: Sequence[FrozenTrial]) -> bool:
    """One of several categorical values, with which no trial has trained."""
    chosen = [
        (name, row[0].params[name])
        for name, kind in row[0].distributions.items()
        if isinstance(kind, CategoricalDistribution) and len(kind.choices) > 1
    ]
    trained = [trial for trial in trials if _has_trained(trial)]
    return any(
        all(choice in trial.params.items() for trial in row) and not any(choice in trial.params.items() for trial in trained)
        for choice in chosen
    )
