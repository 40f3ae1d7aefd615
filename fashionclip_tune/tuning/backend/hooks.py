"""Ray Tune's three hooks, thin over the study: what to try next, whether to go on, and who hears of it.

Everything that Ray is told here is in the journal first. Ray's trial ids mean nothing beyond this process.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.trial import TrialState
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import StorageError
from fashionclip_tune.tuning.backend.stop_signal import INTERRUPTED, StopSignal
from fashionclip_tune.tuning.planning.disk import DiskBudget
from fashionclip_tune.tuning.planning.time_budget import TimeBudget
from fashionclip_tune.tuning.schedulers import StoppingRule
from fashionclip_tune.tuning.study.failure_guard import common_failure
from fashionclip_tune.tuning.study.study import Space, SweepStudy
from fashionclip_tune.tuning.trial import METRIC, DurablePlan, Share, TrialPlan, trial_dir

_ROUNDING = 0.01  # of shares: three thirds are a whole


class _NotPickled:
    """Ray snapshots its hooks now and then; ours have nothing in them that the journal has not."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class StudySearcher(_NotPickled, Searcher):
    """Hands the study's unfinished trials to Ray, then new ones, at most ``max_concurrent`` at a time."""

    def __init__(
        self,
        study: SweepStudy,
        space: Space,
        build: Callable[[dict[str, Any]], ProjectConfig],
        *,
        sweep_dir: Path,
        num_trials: int,
        max_concurrent: int,
        share_of: Callable[[ProjectConfig], Share] = lambda config: Share(0.0, 1.0),
        num_gpus: int = 0,
        stop: StopSignal | None = None,
        durable: DurablePlan | None = None,
        time_budget: TimeBudget | None = None,
        disk_budget: DiskBudget | None = None,
    ) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._disk_budget = disk_budget
        self._models: dict[int, str] = {}
        self._share_of = share_of
        self._num_gpus = num_gpus
        self._time_budget = time_budget
        self._stop = stop or StopSignal()
        self._durable = durable
        self._study = study
        self._space = space
        self._build = build
        self._sweep_dir = sweep_dir
        self._num_trials = num_trials
        self._max_concurrent = max_concurrent
        self._to_continue = study.unfinished()
        self._ended_before = {trial.number for trial in study.trials()} - set(self._to_continue)
        self._running: dict[str, int] = {}
        self._gpus: dict[str, float] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        # Ray asks ahead of need; a suggestion is to know the results of all trials before it.
        if len(self._running) >= self._max_concurrent or self._gpus_are_taken():
            return None
        with self._stop.on_storage_error():
            number, settings = self._next() if self._may_start() else (-1, None)
            config = self._build(settings) if settings is not None else None
            # One whose first rung is too far stays as it is, unfinished: a resumed sweep begins with it.
            if settings is None or config is None or not self._may_start(config.model_name):
                finished: Any = Searcher.FINISHED
                return finished  # type: ignore[no-any-return]
            if not self._has_room(number, config.model_name):
                self._to_continue.insert(0, number)  # when a running one has ended
                return None
            share = self._share_of(config)
            self._running[trial_id], self._gpus[trial_id], self._models[number] = number, share.gpus, config.model_name
            folder = trial_dir(self._sweep_dir, number, settings)
            budget_bytes = self._disk_budget.budget_bytes if self._disk_budget is not None else None
            return TrialPlan(number, str(folder), config.to_dict(), self._durable, share, budget_bytes).to_ray()
        return None

    def _has_room(self, number: int, model: str) -> bool:
        """On the disk, beside the trials that run."""
        if self._disk_budget is None:
            return True
        running = [(other, self._models[other]) for other in self._running.values()]
        ended = {trial.number for trial in self._study.trials()} - set(self._study.unfinished())
        return self._disk_budget.has_room(number, model, running, ended)

    def _gpus_are_taken(self) -> bool:
        """A trial that waits for a card of its own is not to be overtaken by small ones for ever: one waits at most."""
        return self._num_gpus > 0 and sum(self._gpus.values()) >= self._num_gpus - _ROUNDING

    def _may_start(self, model: str | None = None) -> bool:
        """Not once the sweep was told to end, nor what would not reach its first rung in time."""
        return not self._stop.received and (self._time_budget is None or self._time_budget.may_start(model))

    def _next(self) -> tuple[int, dict[str, Any] | None]:
        while self._to_continue or len(self._study.trials()) < self._num_trials:
            if (fault := common_failure(self._study.trials(), self._ended_before)) is not None:
                self._stop.ask(fault)
                break
            if self._to_continue:
                number = self._to_continue.pop(0)
                settings = self._study.settings(number, self._space)
            else:
                number, settings = self._study.suggest(self._space)
            if settings is not None:  # else that trial has failed: the space raised, or drew no configuration
                return number, settings
        return -1, None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self._running.pop(trial_id, None)
        self._gpus.pop(trial_id, None)
        if number is None or (result or {}).get("stop_reason") == INTERRUPTED or self._stop.cannot_record:
            return
        with self._stop.on_storage_error():
            if error:  # its process died again and again; an exception of the run itself arrives as a reported stop_reason
                self._study.end(number, TrialState.FAIL, "error", "the trial's process died repeatedly")
            else:
                self._study.end(number, TrialState.COMPLETE, "budget")

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal has it all."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep is resumed from its journal, not from Ray's snapshots")


class StudyScheduler(_NotPickled, FIFOScheduler):
    """Records each stage, then decides by the sweep's rule, for each architecture on its own trials."""

    def __init__(self, study: SweepStudy, rule: StoppingRule, stop: StopSignal | None = None) -> None:
        super().__init__()
        self._stop = stop or StopSignal()
        self._study = study
        self._rule = rule

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        with self._stop.on_storage_error():
            return self._decide(TrialPlan.from_ray(trial.config), result)
        return str(TrialScheduler.STOP)

    def _decide(self, plan: TrialPlan, result: dict[str, Any]) -> str:
        if result.get("stop_reason") == "storage":  # not the trial's fault: it goes on when there is room
            raise StorageError(result["message"])
        if result.get("stop_reason") == INTERRUPTED:
            return str(TrialScheduler.STOP)
        if "stop_reason" in result:
            self._study.end(plan.number, _state_at(result["stop_reason"]), result["stop_reason"], result["message"])
            return str(TrialScheduler.STOP)
        examples_seen, value = int(result["examples_seen"]), float(result[METRIC])
        self._study.record_stage(plan.number, examples_seen, value)
        if not math.isfinite(value):
            said = f"recall_at_10 is {value} after {examples_seen} examples"
            self._study.end(plan.number, _state_at("diverged"), "diverged", said)
            return str(TrialScheduler.STOP)
        rungs = self._rule.rungs
        if examples_seen not in rungs or examples_seen in self._study.passed_rungs(plan.number):
            return str(TrialScheduler.CONTINUE)
        earlier = self._study.curves_to(examples_seen, clip_model=plan.config["clip_model"], other_than=plan.number)
        if self._rule.survives(self._study.curve(plan.number), earlier):
            self._study.pass_rung(plan.number, examples_seen)
            return str(TrialScheduler.CONTINUE)
        self._study.end(plan.number, TrialState.PRUNED, f"rung_{rungs.index(examples_seen) + 1}")
        return str(TrialScheduler.STOP)


def _state_at(stop_reason: str) -> TrialState:
    """Divergence and lack of memory are the settings' fault, and TPE learns from pruned trials; the rest says nothing."""
    return TrialState.PRUNED if stop_reason in ("diverged", "out_of_memory") else TrialState.FAIL


class Announcer(_NotPickled, Callback):
    """Calls back after every event of a trial, once it has taken effect."""

    def __init__(self, on_event: Callable[[], None]) -> None:
        self._on_event = on_event

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._on_event()

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        self._on_event()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._on_event()

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._on_event()
