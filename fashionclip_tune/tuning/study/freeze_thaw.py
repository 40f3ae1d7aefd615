"""The default search: trials wait at rungs instead of ending there, and a model decides which of them goes on.

ASHA as its paper has it (Li et al. 2020, algorithm 2), with a model of learning curves in the place of "the best 1/eta"
(freeze-thaw: Swersky et al. 2014; DyHPO: Wistuba et al. 2022). A trial that reaches a rung is held against all that wait and
against new settings; what promises most for what it costs runs, up to its next rung.

A decision is a function of the journal, the sweep's seed and the number of decisions before it. Costs are by rates that are
fixed before the first trial, never by a clock, so that a killed sweep decides as one that never was.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from fashionclip_tune.errors import stop_at_rung
from fashionclip_tune.tuning.study.choice import Fresh, FreshPoint, Judged, KnownTrial, choose
from fashionclip_tune.tuning.study.decisions import Candidate, Decision
from fashionclip_tune.tuning.study.policy import startup_trials
from fashionclip_tune.tuning.study.study import SweepStudy, origin, scores_nothing, settings


@dataclass(frozen=True)
class SearchTerms:
    """What is fixed before the first trial.

    Attributes:
        rungs: examples seen at which trials are held against each other, rising, below ``budget_examples``.
        cost_of_start: of a whole trial, by what it starts from: seconds of a slot, or operations where no rate is known.
        total_cost: of all trials together, in the same unit.
        keep_paused: trials of each start that may wait at a time.
        num_points: as for ``choose``; a sweep that began before there was this rule goes on without.
        cost_of_batch: likewise, by start and batch size (``batch_key``), where the space draws that: what does not fit a card
            at once is cut, and takes longer. A sweep that began before goes by its starts.
    """

    num_trials: int
    rungs: tuple[int, ...]
    budget_examples: int
    cost_of_start: Mapping[str, float]
    total_cost: float
    keep_paused: int
    num_points: int = 0
    cost_of_batch: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "SearchTerms":
        return cls(**{**record, "rungs": tuple(record["rungs"])})

    def to_record(self) -> dict[str, Any]:
        return {**asdict(self), "rungs": list(self.rungs)}

    def extended(self, num_trials: int) -> "SearchTerms":
        """The same for more trials: each brings its part of what all may cost."""
        return replace(self, num_trials=num_trials, total_cost=self.total_cost * num_trials / self.num_trials)

    def next_rung(self, examples_seen: int) -> int:
        """Where a trial is held against others next; the last time at the end of its budget."""
        return min((rung for rung in self.rungs if rung > examples_seen), default=self.budget_examples)

    def cost(self, start: str, batch_size: int | None, first: int, last: int) -> float:
        """Of the examples between two moments of a trial; ``batch_size``: None where the space does not draw it."""
        usual = sum(self.cost_of_start.values()) / len(self.cost_of_start)
        of_start = self.cost_of_start.get(start, usual)
        return self.cost_of_batch.get(batch_key(start, batch_size), of_start) * (last - first) / self.budget_examples


def batch_key(start: str, batch_size: int | None) -> str:
    return f"{start}, batch {batch_size}"


class FreezeThaw:
    """A ``Search``.

    Args:
        fresh: as for ``choose``: new settings of the space.
        in_time: whether a trial that starts so gets from one number of examples to another before the sweep has to end.
    """

    def __init__(
        self,
        study: SweepStudy,
        terms: SearchTerms,
        *,
        seed: int,
        fresh: Fresh,
        in_time: Callable[[str, int, int], bool] = lambda start, first, last: True,
    ) -> None:
        recorded = study.terms()
        self._study = study
        self._terms = terms if recorded is None else SearchTerms.from_record(recorded).extended(terms.num_trials)
        study.fix_terms(self._terms.to_record())
        self._seed = seed
        self._fresh = fresh
        self._in_time = in_time

    def goes_on(self, number: int, examples_seen: int, variance: float | None = None) -> bool:
        if examples_seen not in self._terms.rungs or examples_seen in self._study.judged_at(number):
            return True
        decision = self._decision(number, examples_seen, variance)
        self._study.decide(decision)
        return decision.chosen is not None and decision.chosen.trial == number

    def wants_new(self) -> bool:
        return len(self._study.trials()) < self._terms.num_trials and any(self._study.queued())

    def decides(self) -> bool:
        decision = self._decision()
        if decision.chosen is None:
            return False
        self._study.decide(decision)
        return True

    def is_over(self) -> bool:
        if self._study.unfinished() or self._num_begun() < self._terms.num_trials:
            return False
        return not any(self._is_affordable(each, None) for each in self._study.trials() if each.number in self._study.waiting)

    def close(self) -> None:
        for number, examples_seen in list(self._study.waiting.items()):
            self._study.end(number, TrialState.PRUNED, self._rung(examples_seen))

    def _num_begun(self) -> int:
        """Trials, with those that were decided on and are not drawn yet."""
        return len(self._study.trials()) + len(self._study.queued()[1])

    def _decision(self, reporter: int | None = None, examples_seen: int = 0, variance: float | None = None) -> Decision:
        """What runs next: the reporter, one that waits, or new settings; nothing, where nothing may. Points come first."""
        known = self._known(reporter)
        may_start = self._num_begun() < self._terms.num_trials
        comes_point = may_start and reporter is not None and bool(self._study.queued()[0])
        choice = None
        if (may_start and not comes_point) or any(trial.cost is not None for trial in known):
            choice = choose(
                known,
                fresh=self._fresh_in_time if may_start and not comes_point else None,
                cost_of_start=self._terms.cost_of_start,
                seed=(self._seed * 1_000_003 + len(self._study.decisions)) % 2**32,
                num_random=startup_trials(self._terms.num_trials),
                num_points=self._terms.num_points,
            )
        chosen, runner_up = (None, None) if choice is None or comes_point else (choice.chosen, choice.runner_up)
        predicted = {} if choice is None else choice.predicted
        given_up = self._given_up(known, None if chosen is None else chosen.trial, predicted)
        candidate = _candidate(chosen)
        if candidate is None and may_start and not comes_point and self._has_time_for_one():
            candidate = Candidate(None, {})  # a space that raised each time: what it does now is that trial's end
        return Decision(reporter, examples_seen, candidate, _candidate(runner_up), given_up, variance)

    def _given_up(self, known: Sequence[KnownTrial], goes_on: int | None, predicted: Mapping[int, float]) -> dict[int, str]:
        """Of those that wait, all but the best predicted of each start, with the rungs at which they stand."""
        of_start: dict[str, list[KnownTrial]] = {}
        for trial in known:
            if trial.state == "waiting" and trial.number != goes_on:
                of_start.setdefault(trial.start, []).append(trial)
        given_up = {}
        for trials in of_start.values():
            trials.sort(key=lambda trial: (-predicted.get(trial.number, trial.curve[max(trial.curve)]), trial.number))
            for trial in trials[self._terms.keep_paused :]:
                given_up[trial.number] = self._rung(round(max(trial.curve) * self._terms.budget_examples))
        return given_up

    def _rung(self, examples_seen: int) -> str:
        return stop_at_rung(self._terms.rungs.index(examples_seen) + 1)

    def _known(self, reporter: int | None) -> list[KnownTrial]:
        """All trials, older ones first; those that were decided on and are not drawn yet run, too."""
        trials = [*self._study.older_trials(), *self._study.trials(), *self._study.queued()[1]]
        return [self._as_known(each, reporter) for each in trials]

    def _as_known(self, trial: FrozenTrial, reporter: int | None) -> KnownTrial:
        terms, judged, came_from = self._terms, self._study.judged_at(trial.number), origin(trial) or {}
        budget = came_from.get("budget_examples", terms.budget_examples)
        seen = {each: value for each, value in trial.intermediate_values.items() if each > 0}
        rungs = {round(rung / terms.budget_examples * budget) for rung in terms.rungs}
        shown = {each: value for each, value in seen.items() if each in rungs or each == max(seen)}
        waits = trial.number == reporter or trial.number in self._study.waiting
        start, last = self._start(trial), max(seen, default=0)
        # One that runs goes on until the sweep has to end: it loses nothing, and nothing else has time for more.
        in_time = trial.number == reporter or self._in_time(start, last, terms.next_rung(last))
        may_run = waits and in_time and self._is_affordable(trial, reporter)
        return KnownTrial(
            number=trial.number,
            start=start,
            params=trial.params or self._study.decided_params(trial),
            distributions=trial.distributions,
            curve={each / budget: value for each, value in shown.items()},
            variances={each / budget: found for each, found in judged.items() if found is not None},
            state="ended" if trial.state.is_finished() else "waiting" if waits else "running",
            cost=self._cost(trial, last, terms.budget_examples) if may_run else None,
            data=came_from.get("data", ""),
            is_failure=scores_nothing(trial),
        )

    def _start(self, trial: FrozenTrial) -> str:
        return str(settings(trial).get("clip_model", ""))

    def _cost(self, trial: FrozenTrial, first: int, last: int) -> float:
        return self._terms.cost(self._start(trial), settings(trial).get("training.batch_size"), first, last)

    def _is_affordable(self, trial: FrozenTrial, reporter: int | None) -> bool:
        """Whether half of the way to its next rung at least is within what all trials together may cost.

        Counted are what trials have seen, what running ones will have seen at their next rungs, and the first rungs of those
        that are still to be started.
        """
        terms, last = self._terms, max(trial.intermediate_values, default=0)
        begun = [*self._study.trials(), *self._study.queued()[1]]
        spent = sum(self._cost(each, 0, self._will_have_seen(each, reporter)) for each in begun)
        first_rungs = terms.num_trials - len(begun)
        to_start = first_rungs * terms.cost("", None, 0, terms.next_rung(0))
        return spent + to_start + self._cost(trial, last, terms.next_rung(last)) / 2 <= terms.total_cost

    def _will_have_seen(self, trial: FrozenTrial, reporter: int | None) -> int:
        last = max(trial.intermediate_values, default=0)
        runs = not trial.state.is_finished() and trial.number != reporter and trial.number not in self._study.waiting
        return self._terms.next_rung(last) if runs else last

    def _has_time_for_one(self) -> bool:
        return any(self._in_time(start, 0, self._terms.next_rung(0)) for start in self._terms.cost_of_start)

    def _fresh_in_time(self, seed: int, given: Sequence[Mapping[str, Any]], count: int) -> list[FreshPoint]:
        terms = self._terms
        return [
            replace(point, cost=terms.cost_of_batch.get(batch_key(point.start, point.batch_size)))
            for point in self._fresh(seed, given, count)
            if self._in_time(point.start, 0, terms.next_rung(0))
        ]


def _candidate(judged: Judged | None) -> Candidate | None:
    if judged is None:
        return None
    figures = (judged.predicted, judged.deviation, judged.score)
    return Candidate(judged.trial, dict(judged.params), *(figure if math.isfinite(figure) else None for figure in figures))
