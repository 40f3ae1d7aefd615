"""What a search decides: whether a trial goes on from where it has reported, and what a free slot does next."""

from typing import Protocol

from optuna.trial import TrialState

from fashionclip_tune.errors import stop_at_rung
from fashionclip_tune.tuning.schedulers import StoppingRule
from fashionclip_tune.tuning.study.study import SweepStudy


class Search(Protocol):
    """Decides from the journal, and writes into it before anything takes effect."""

    def goes_on(self, number: int, examples_seen: int, variance: float | None = None) -> bool:
        """Whether a trial goes on after a stage; else it has ended, or waits to be thawed.

        ``variance``: of the value that was recorded of the stage; None: not known.
        """

    def wants_new(self) -> bool:
        """Whether a free slot is to draw a new trial."""

    def decides(self) -> bool:
        """Looks for something else for a free slot: afterwards a trial is to be drawn, or one that waited is unfinished."""

    def is_over(self) -> bool:
        """Whether nothing is to be started, gone on with or thawed any more."""

    def close(self) -> None:
        """When it is over: what waits ends where it stands."""


class StoppingSearch:
    """Each trial runs until a rule stops it for good; new ones are the sampler's, until there are ``num_trials``."""

    def __init__(self, study: SweepStudy, rule: StoppingRule, num_trials: int) -> None:
        self._study = study
        self._rule = rule
        self._num_trials = num_trials

    def goes_on(self, number: int, examples_seen: int, variance: float | None = None) -> bool:
        study, rungs = self._study, self._rule.rungs
        if examples_seen not in rungs or examples_seen in study.passed_rungs(number):
            return True
        model = study.model_of(number) if self._rule.within_models else None
        if self._rule.survives(study.curve(number), study.curves_to(examples_seen, clip_model=model, other_than=number)):
            study.pass_rung(number, examples_seen)
            return True
        study.end(number, TrialState.PRUNED, stop_at_rung(rungs.index(examples_seen) + 1))
        return False

    def wants_new(self) -> bool:
        return len(self._study.trials()) < self._num_trials

    def decides(self) -> bool:
        return False

    def is_over(self) -> bool:
        return not self._study.unfinished() and not self.wants_new()

    def close(self) -> None:
        """Nothing waits."""
