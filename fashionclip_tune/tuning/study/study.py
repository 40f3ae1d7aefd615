"""The sweep's one memory: an Optuna study in a journal file, appended to and synced before anything takes effect.

A trial is known by its number in the study. Its settings and why it ended are user attributes; the value reported at
``examples_seen`` is the sweep's metric at that stage. Nothing else needs to be kept: rungs, searcher and tables follow from it.
Trials of an older sweep may come first: the sampler and the rungs know them, but they are not trials of this sweep.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from fashionclip_tune.errors import SCORES_NOTHING, StopReason
from fashionclip_tune.tuning.study.decisions import Decision, Decisions
from fashionclip_tune.tuning.study.draws import Space
from fashionclip_tune.tuning.study.journal import open_storage
from fashionclip_tune.tuning.study.policy import ModelQuota

STUDY_NAME = "sweep"
_SETTINGS, _PASSED_RUNGS, _END, _ORIGIN = "settings", "passed_rungs", "end", "origin"
_ADDED_OLDER = "added_older_trials"
_DECISION, _TERMS = "decision", "search"
# Ends that the sampler is to keep away from. Optuna ranks a trial that breaks a constraint behind all others; by its value
# alone one that broke late would come before those that were stopped early.
_CONSTRAINT = "ends"

optuna.logging.set_verbosity(optuna.logging.WARNING)


class SweepStudy:
    """Suggests trials and records what becomes of them."""

    def __init__(
        self,
        journal: Path,
        *,
        seed: int,
        num_startup_trials: int | None,
        points: Sequence[Mapping[str, Any]] = (),
        on_append: Callable[[], None] = lambda: None,
        quota: ModelQuota | None = None,
        older: Callable[[], Sequence[FrozenTrial]] = lambda: (),
    ) -> None:
        """Opens or starts the journal.

        Args:
            num_startup_trials: drawn at random, before TPE; None: what is not decided on is always drawn at random.
            points: settings of the first trials, by parameter name.
            on_append: called when the journal has grown, before that takes effect.
            quota: how many trials each architecture gets before the sampler chooses among them.
            older: reads the ended trials of an older sweep, with their origin; called until they are all in the journal.
        """
        self._seed = seed
        self._num_startup_trials = num_startup_trials
        self._quota = quota
        self._points = points
        self._storage = open_storage(journal, on_append)
        self._study = optuna.create_study(
            study_name=STUDY_NAME, storage=self._storage, direction="maximize", load_if_exists=True
        )
        for trial in self.trials():
            if not trial.state.is_finished() and _END in trial.user_attrs:
                self._tell_end(trial.number)
        recorded = self._study.user_attrs
        self._decisions = Decisions(recorded[name] for name in sorted(recorded) if name.startswith(f"{_DECISION} "))
        if self._decisions.all:
            self._carry_out(self._decisions.all[-1])
        if _ADDED_OLDER not in recorded:
            self._add_older(older())
        for point in points:  # again after a kill among them: those that are there are not added twice
            self._study.enqueue_trial(dict(point), skip_if_exists=True)

    def _add_older(self, trials: Sequence[FrozenTrial]) -> None:
        there = {str(origin(trial)) for trial in self._started()}  # again after a kill among them
        for trial in trials:
            if str(origin(trial)) not in there:
                self._study.add_trial(trial)
        self._study.set_user_attr(_ADDED_OLDER, len(trials))

    def trials(self) -> list[FrozenTrial]:
        """All trials of this sweep that were started, by number."""
        return [trial for trial in self._started() if origin(trial) is None]

    def older_trials(self) -> list[FrozenTrial]:
        """Trials of an older sweep that this one was started with."""
        return [trial for trial in self._started() if origin(trial) is not None]

    def _started(self) -> list[FrozenTrial]:
        return [trial for trial in self._study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]

    def unfinished(self) -> list[int]:
        """Numbers of the trials without an end that are to run: running, or interrupted."""
        return [trial.number for trial in self.trials() if not trial.state.is_finished() and trial.number not in self.waiting]

    @property
    def waiting(self) -> Mapping[int, int]:
        """Trials that wait at a rung to be thawed, and the examples that they had seen there."""
        return {each: seen for each, seen in self._decisions.waiting.items() if not self._frozen(each).state.is_finished()}

    @property
    def decisions(self) -> Sequence[Decision]:
        return self._decisions.all

    def queued(self) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
        """Trials that are to be drawn next: those of ``points``, and those that were decided on."""
        queued = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        decided = [each for each in queued if _DECISION in each.user_attrs]
        return [each for each in queued if _DECISION not in each.user_attrs], decided

    def decide(self, decision: Decision) -> None:
        """Records a decision, then does what it says."""
        self._study.set_user_attr(f"{_DECISION} {len(self.decisions):06d}", decision.to_record())
        self._decisions.add(decision)
        self._carry_out(decision)

    def _carry_out(self, decision: Decision) -> None:
        """Of the last decision; done again when a study is opened, if a kill came between the two."""
        for number, reason in (decision.given_up or {}).items():
            self.end(number, TrialState.PRUNED, reason)
        place = len(self.decisions) - 1
        if decision.chosen is None or decision.chosen.trial is not None:
            return
        if not any(trial.user_attrs.get(_DECISION) == place for trial in self._study.get_trials(deepcopy=False)):
            self._study.enqueue_trial(dict(decision.chosen.params), user_attrs={_DECISION: place})

    def decided_params(self, trial: FrozenTrial) -> dict[str, Any]:
        """What a trial is drawn with that was decided on; empty for others."""
        place: int | None = trial.user_attrs.get(_DECISION)
        chosen = None if place is None else self.decisions[place].chosen
        return {} if chosen is None else dict(chosen.params)

    def judged_at(self, number: int) -> Mapping[int, float | None]:
        """Examples seen at which it was decided whether the trial goes on, and the variance of its value there."""
        return self._decisions.judged_at(number)

    def terms(self) -> dict[str, Any] | None:
        """What was fixed of the search before the first trial, as ``fix_terms`` was given it last."""
        found: dict[str, Any] | None = self._study.user_attrs.get(_TERMS)
        return found

    def fix_terms(self, terms: Mapping[str, Any]) -> None:
        if self.terms() != terms:
            self._study.set_user_attr(_TERMS, dict(terms))

    def suggest(self, space: Space) -> tuple[int, dict[str, Any] | None]:
        """A new trial: its number and the settings that the space made of the sampler's draws.

        None where the space raised, or made settings that are no configuration: that trial has ended as failed.
        """
        self._study.sampler = self._sampler(len(self._started()))
        trial = self._study.ask()
        return trial.number, self._unless_it_raises(lambda: self._draw(trial, space), trial.number)

    def settings(self, number: int, space: Space) -> dict[str, Any] | None:
        """The settings of a trial; drawn to the end if the process died while they were drawn, or None as ``suggest``."""
        trial = self._frozen(number)
        if _SETTINGS in trial.user_attrs:
            return settings(trial)
        return self._unless_it_raises(lambda: self._draw_again(trial, space), number)

    def _unless_it_raises(self, draw: Callable[[], dict[str, Any]], number: int) -> dict[str, Any] | None:
        try:
            return draw()
        except Exception as error:  # of the user's space
            self.end(number, TrialState.FAIL, StopReason.ERROR, f"{type(error).__name__}: {error}")
            return None

    def _draw_again(self, trial: FrozenTrial, space: Space) -> dict[str, Any]:
        # What it had drawn is in the journal, but where its random stream stood is not: draw all of it again beside.
        beside = optuna.create_study(direction="maximize", sampler=self._sampler(trial.number))
        beside.add_trials(each for each in self._started() if each.number < trial.number)
        place = sum(each.number < trial.number for each in self.trials())
        if decided := self.decided_params(trial):
            beside.enqueue_trial(decided)
        elif place < len(self._points):
            beside.enqueue_trial(dict(self._points[place]))
        drawn = beside.ask()
        space(drawn)
        with _experimental_allowed():
            self._study.sampler = PartialFixedSampler(drawn.params, self._sampler(trial.number))
        return self._draw(self._open(trial.number), space)

    def _draw(self, trial: optuna.trial.Trial, space: Space) -> dict[str, Any]:
        overrides = space(trial)
        trial.set_user_attr(_SETTINGS, overrides)
        return overrides

    def _sampler(self, number: int) -> BaseSampler:
        """Tied to the trial's number: a sampler that goes on from its seed would suggest other things after a resume."""
        fixed: dict[str, Any] = {}
        if self._quota is not None:
            before = (trial.params for trial in self._started() if trial.number < number)
            fixed = self._quota.next_fixed(Counter(params.get(self._quota.parameter) for params in before))
        seed = (self._seed * 1_000_003 + number) % 2**32
        if self._num_startup_trials is None:
            return RandomSampler(seed)
        with _experimental_allowed():
            sampler = TPESampler(
                seed=seed,
                n_startup_trials=self._num_startup_trials,
                multivariate=True,
                group=True,  # parameters that exist in one branch of the space are modelled apart
                constant_liar=True,  # running trials push the next suggestion away
            )
            return PartialFixedSampler(fixed, sampler) if fixed else sampler

    def record_stage(self, number: int, examples_seen: int, value: float) -> None:
        """Adds a stage's value; recording a stage again changes nothing."""
        if examples_seen not in self._frozen(number).intermediate_values:
            self._open(number).report(value, examples_seen)

    def passed_rungs(self, number: int) -> list[int]:
        """Rungs, in examples, from which the trial has been sent on."""
        return list(self._frozen(number).user_attrs.get(_PASSED_RUNGS, []))

    def pass_rung(self, number: int, examples_seen: int) -> None:
        """Records that the trial goes on: a resumed one reports its last stage again, and is not to be judged twice."""
        passed = [*self.passed_rungs(number), examples_seen]
        self._open(number).set_user_attr(_PASSED_RUNGS, passed)

    def model_of(self, number: int) -> str | None:
        return settings(self._frozen(number)).get("clip_model")

    def curve(self, number: int) -> dict[int, float]:
        """A trial's value at each of its stages, by examples seen."""
        return dict(self._frozen(number).intermediate_values)

    def curves_to(self, examples_seen: int, *, clip_model: str | None, other_than: int) -> list[dict[int, float]]:
        """Those of other trials that have reached a stage, up to it; of one architecture, or of all."""
        return [
            {seen: value for seen, value in trial.intermediate_values.items() if seen <= examples_seen}
            for trial in self._started()
            if trial.number != other_than
            and clip_model in (None, settings(trial).get("clip_model"))
            and examples_seen in trial.intermediate_values
        ]

    def end(self, number: int, state: TrialState, stop_reason: str, message: str = "") -> None:
        """Ends a trial once, with its last stage's value. TPE avoids where one diverged or ran out of memory."""
        if not self._frozen(number).state.is_finished():
            end = {"state": state.name, "stop_reason": str(stop_reason), "message": message}
            self._open(number).set_user_attr(_END, end)
            self._tell_end(number)

    def _tell_end(self, number: int) -> None:
        """The rest of an end, from its record: done again when a study is opened, if a kill came between the two."""
        trial = self._frozen(number)
        state = TrialState[trial.user_attrs[_END]["state"]]
        values = trial.intermediate_values
        if stop_reason(trial) in SCORES_NOTHING and not trial.constraints:
            self._open(number).set_constraint(_CONSTRAINT, 1.0)
        last = values[max(values)] if values else math.nan
        if state == TrialState.COMPLETE and math.isnan(last):
            state = TrialState.FAIL
        self._study.tell(number, last if state == TrialState.COMPLETE else None, state)

    def _open(self, number: int) -> optuna.trial.Trial:
        """An unfinished trial, to be written to; ``ask`` gives it only to the process that began it."""
        study_id = self._storage.get_study_id_from_name(STUDY_NAME)
        return optuna.trial.Trial(self._study, self._storage.get_trial_id_from_study_id_trial_number(study_id, number))

    def _frozen(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]


@contextmanager
def _experimental_allowed() -> Iterator[None]:
    """For the parts of Optuna that may still change: its version is pinned narrowly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def stop_reason(trial: FrozenTrial) -> str | None:
    """A ``StopReason`` or ``rung_N``; None while it runs."""
    return dict(trial.user_attrs.get(_END, {})).get("stop_reason")


def message(trial: FrozenTrial) -> str | None:
    """What a failed trial said."""
    return dict(trial.user_attrs.get(_END, {})).get("message") or None


def settings(trial: FrozenTrial) -> dict[str, Any]:
    """What the space drew for a trial, by dotted path; empty if it died while drawing."""
    return dict(trial.user_attrs.get(_SETTINGS, {}))


def scores_nothing(trial: FrozenTrial) -> bool:
    """Whether it ended in a way that counts as 0, whatever it had reached before."""
    return stop_reason(trial) in SCORES_NOTHING


def origin(trial: FrozenTrial) -> dict[str, Any] | None:
    """``sweep`` and ``trial_id`` of an older sweep's trial, ``data`` and ``budget_examples`` where the data is another."""
    found: dict[str, Any] | None = trial.user_attrs.get(_ORIGIN)
    return found


def with_origin(trial: FrozenTrial, sweep: str, **other_data: Any) -> FrozenTrial:
    """An ended trial of another study as it is added to this one; where it came from first is kept."""
    came_from = {**other_data, **(origin(trial) or {"sweep": sweep, "trial_id": f"{trial.number:04d}"})}
    return optuna.trial.create_trial(
        state=trial.state,
        value=trial.value,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={**trial.user_attrs, _ORIGIN: came_from},
        intermediate_values=trial.intermediate_values,
        constraints=trial.constraints,
    )
