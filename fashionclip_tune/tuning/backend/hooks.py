"""Ray Tune's three hooks, thin over the study: what to try next, whether to go on, and who hears of it.

Everything that Ray is told here is in the journal first. Ray's trial ids mean nothing beyond this process.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.trial import TrialState
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import SCORES_NOTHING, StopReason, StorageError
from fashionclip_tune.evaluation.metric import DEFAULT_METRIC, METRICS
from fashionclip_tune.tuning.backend.stop_signal import StopSignal
from fashionclip_tune.tuning.planning.slots import Slots
from fashionclip_tune.tuning.planning.time_budget import TimeBudget
from fashionclip_tune.tuning.study.draws import Space
from fashionclip_tune.tuning.study.failure_guard import common_failure
from fashionclip_tune.tuning.study.search import Search
from fashionclip_tune.tuning.study.study import SweepStudy
from fashionclip_tune.tuning.trial import DurablePlan, Share, TrialPlan, trial_dir

_NORMAL_95 = 1.96  # deviations on either side
_NO_TIME = "no more trials were thawed: the time that is left ends before their next rungs"
_PROCESS_RETRIES = 3
_ROUNDING = 0.01  # of shares: three thirds are a whole


class _NotPickled:
    """Ray snapshots its hooks now and then; ours have nothing in them that the journal has not."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """What the trials of a sweep are and what each of them gets."""

    space: Space
    build: Callable[[dict[str, Any]], ProjectConfig]
    """A trial's configuration from what the space drew."""
    sweep_dir: Path
    slots: Slots
    share_of: Callable[[ProjectConfig], Share] = lambda config: Share(0.0, 1.0)
    """A trial's part of the machine."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """The short names of what trials start from."""
    durable: DurablePlan | None = None
    disk_budget_bytes: int | None = None
    """Of the sweep's folder in the results; None: as much as the disk has."""
    time_budget: TimeBudget | None = None
    metric: str = DEFAULT_METRIC.name


class StudySearcher(_NotPickled, Searcher):
    """Hands the study's unfinished trials to Ray, then new ones, at most as many at a time as there are slots."""

    def __init__(self, study: SweepStudy, search: Search, job: SweepJob, stop: StopSignal) -> None:
        super().__init__(metric=job.metric, mode="max")
        self._study = study
        self._search = search
        self._job = job
        self._stop = stop
        self._ended_before = {trial.number for trial in study.trials() if trial.state.is_finished()}
        self._running: dict[str, int] = {}
        self._deaths: Counter[int] = Counter()
        """Of trials' processes. Ray's own retries leave out a process that dies while it is taken over from another trial."""
        self._is_waiting = False
        """There is nothing to do for a free slot until a trial that runs has ended, or stands at a rung and waits."""
        self._gpus: dict[str, float] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        # Ray asks ahead of need; a suggestion is to know the results of all trials before it.
        if len(self._running) >= self._job.slots.count or self._gpus_are_taken() or self._is_waiting:
            return None
        with self._stop.on_storage_error():
            number, settings = self._next() if self._may_start() else (-1, None)
            if settings is None and not self._stop.received:
                self._is_waiting = bool(self._running)
                if self._is_waiting:
                    return None
                if self._job.time_budget is not None and not self._search.is_over():
                    self._job.time_budget.refuse(_NO_TIME)
            config = self._job.build(settings) if settings is not None else None
            # One whose first rung is too far stays as it is, unfinished: a resumed sweep begins with it.
            if settings is None or config is None or not self._may_start(config.model_name):
                finished: Any = Searcher.FINISHED
                return finished  # type: ignore[no-any-return]
            share = self._job.share_of(config)
            self._running[trial_id], self._gpus[trial_id] = number, share.gpus
            start = self._job.labels.get(config.model_name, settings["clip_model"])
            folder = trial_dir(self._job.sweep_dir, number, start, settings["loss_function"])
            job = self._job
            plan = TrialPlan(
                number, str(folder), config.to_dict(), job.durable, share, job.disk_budget_bytes, metric=job.metric
            )
            return plan.to_ray()
        return None

    def _gpus_are_taken(self) -> bool:
        """A trial that waits for a card of its own is not to be overtaken by small ones for ever: one waits at most."""
        num_gpus = self._job.slots.num_gpus
        return num_gpus > 0 and sum(self._gpus.values()) >= num_gpus - _ROUNDING

    def _may_start(self, model: str | None = None) -> bool:
        """Not once the sweep was told to end, nor what would not reach its first rung in time."""
        time_budget = self._job.time_budget
        return not self._stop.received and (time_budget is None or time_budget.may_start(model))

    def _next(self) -> tuple[int, dict[str, Any] | None]:
        while (fault := common_failure(self._study.trials(), self._ended_before)) is None:
            idle = [number for number in self._study.unfinished() if number not in self._running.values()]
            if idle:
                number, settings = idle[0], self._study.settings(idle[0], self._job.space)
            elif self._search.wants_new():
                number, settings = self._study.suggest(self._job.space)
            elif self._search.decides():
                continue
            else:
                return -1, None
            if settings is not None:  # else that trial has failed: the space raised, or drew no configuration
                return number, settings
        if not self._search.is_over():
            self._stop.ask(fault)
        return -1, None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._is_waiting = False
        number = self._running.pop(trial_id, None)
        self._gpus.pop(trial_id, None)
        if number is None or (result or {}).get("stop_reason") == StopReason.INTERRUPTED or self._stop.cannot_record:
            return
        if number in self._study.waiting:
            return
        if error:  # its process died; an exception of the run itself arrives as a reported stop_reason
            self._deaths[number] += 1
            if self._deaths[number] <= _PROCESS_RETRIES:
                return  # unfinished: a free slot goes on with it
        with self._stop.on_storage_error():
            if error:
                self._study.end(number, TrialState.FAIL, StopReason.ERROR, "the trial's process died repeatedly")
            else:
                self._study.end(number, TrialState.COMPLETE, StopReason.BUDGET)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal has it all."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep is resumed from its journal, not from Ray's snapshots")


class StudyScheduler(_NotPickled, FIFOScheduler):
    """Records each stage, then asks the search whether the trial goes on."""

    def __init__(self, study: SweepStudy, search: Search, stop: StopSignal) -> None:
        super().__init__()
        self._stop = stop
        self._study = study
        self._search = search

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        with self._stop.on_storage_error():
            return self._decide(TrialPlan.from_ray(trial.config), result)
        return str(TrialScheduler.STOP)

    def _decide(self, plan: TrialPlan, result: dict[str, Any]) -> str:
        if result.get("stop_reason") == StopReason.STORAGE:  # not the trial's fault: it goes on when there is room
            raise StorageError(result["message"])
        if result.get("stop_reason") == StopReason.INTERRUPTED:
            return str(TrialScheduler.STOP)
        if "stop_reason" in result:
            self._study.end(plan.number, _state_at(result["stop_reason"]), result["stop_reason"], result["message"])
            return str(TrialScheduler.STOP)
        examples_seen, value = int(result["examples_seen"]), float(result[plan.metric])
        self._study.record_stage(plan.number, examples_seen, value)
        if not math.isfinite(value):
            said = f"{plan.metric} is {value} after {examples_seen} examples"
            self._study.end(plan.number, _state_at(StopReason.DIVERGED), StopReason.DIVERGED, said)
            return str(TrialScheduler.STOP)
        goes_on = self._search.goes_on(plan.number, examples_seen, _variance(result, plan.metric))
        return str(TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP)


def _variance(result: Mapping[str, Any], metric: str) -> float | None:
    """Of the value, by its interval of 95 %."""
    ends = METRICS[metric].interval(result)
    return None if ends is None else ((ends[1] - ends[0]) / (2 * _NORMAL_95)) ** 2


def _state_at(stop_reason: str) -> TrialState:
    """Divergence and lack of memory are the settings' fault, and TPE learns from pruned trials; the rest says nothing."""
    return TrialState.PRUNED if stop_reason in SCORES_NOTHING else TrialState.FAIL


class Announcer(_NotPickled, Callback):
    """Calls back after every event of a trial, once it has taken effect."""

    def __init__(self, on_event: Callable[[], None]) -> None:
        self._on_event = on_event

    def _announce(self, *given: Any, **info: Any) -> None:
        self._on_event()

    on_trial_start = on_trial_result = on_trial_complete = on_trial_error = _announce
