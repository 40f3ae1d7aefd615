"""One life of a sweep: its driver, alone at its folder, from the journal as it is to the last event."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from fashionclip_tune.errors import StorageError, UserError
from fashionclip_tune.files import write_json
from fashionclip_tune.reporting.model_card import model_card
from fashionclip_tune.reporting.sweep_files import best_row, freed_line
from fashionclip_tune.storage.folder import RemoteFolder
from fashionclip_tune.tuning.backend.hooks import SweepJob
from fashionclip_tune.tuning.backend.runner import run_trials
from fashionclip_tune.tuning.backend.stop_signal import StopSignal
from fashionclip_tune.tuning.console.live_table import Progress
from fashionclip_tune.tuning.console.outcome import how_to_go_on
from fashionclip_tune.tuning.persistence.export import export_best
from fashionclip_tune.tuning.persistence.hparams import HParamsTab
from fashionclip_tune.tuning.persistence.location import SweepLocation
from fashionclip_tune.tuning.persistence.record import SweepRecord, start_labels_of, sweep_header
from fashionclip_tune.tuning.persistence.retention import Retention
from fashionclip_tune.tuning.planning.forecast import PROCESS_S, TRIAL_S
from fashionclip_tune.tuning.planning.plan import SweepPlan
from fashionclip_tune.tuning.planning.throughput import keep_measured, measured_in, runs_of
from fashionclip_tune.tuning.planning.time_budget import TimeBudget
from fashionclip_tune.tuning.schedulers import WaitingRule
from fashionclip_tune.tuning.study.freeze_thaw import FreezeThaw
from fashionclip_tune.tuning.study.search import Search, StoppingSearch
from fashionclip_tune.tuning.study.study import SweepStudy
from fashionclip_tune.tuning.warm_start import older_trials

_log = logging.getLogger(__name__)


@contextmanager
def driving(location: SweepLocation, *, is_new: bool = False) -> Iterator[None]:
    """On this machine no other driver may be at it; one on another machine is told to stop.

    ``is_new``: the sweep was not there when it was planned.
    """
    with only_driver(location.run_dir):
        if is_new:
            location.check_is_new()
        if (before := location.take_over()) is not None:
            _log.warning(
                f"note:     {before} did not say that it had ended; if it still runs, it stops where it would write next"
            )
        yield
        location.let_go()


@contextmanager
def only_driver(sweep_dir: Path) -> Iterator[None]:
    """Raises UserError where another process of this machine has the sweep."""
    lock = FileLock(sweep_dir / ".lock")
    try:
        sweep_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"sweep {sweep_dir} is being run by another process: wait for it, or stop it") from None
    except OSError as error:
        raise UserError(f"{sweep_dir} cannot be written to ({error}): choose another folder") from error
    try:
        yield
    finally:
        lock.release()


class _Bookkeeping:
    """What is brought up to date after each event: the record first, then what is made of it."""

    def __init__(
        self, plan: SweepPlan, location: SweepLocation, study: SweepStudy, header: dict[str, Any], stop: StopSignal
    ) -> None:
        self._plan = plan
        self._location = location
        self._stop = stop
        self._header = header
        self._record = SweepRecord(location.run_dir, study, header)
        self._retention = Retention(
            location.run_dir,
            plan.build,
            location.mirror,
            plan.settings.maximised,
            keeps_paused_states=plan.disk.keeps_paused_states,
        )
        self._hparams = HParamsTab(location.run_dir, plan.check.settings, plan.settings.maximised)

    def record(self, state: str) -> dict[str, Any]:
        """Writes sweep.json and its tables, and returns the content."""
        return self._record.write(state, (self._retention.freed_bytes, self._retention.freed_durable_bytes))

    def on_event(self, progress: Progress) -> None:
        mirror = self._location.mirror
        with self._stop.on_storage_error():
            if mirror is not None and self._plan.settings.cluster is not None:
                mirror.fetch_evaluations()  # of trials on other machines
            sweep = self.record("RUNNING")
            progress.show(sweep)
            self._hparams.add(sweep["trials"])
            self._retention.apply(sweep["trials"])
            if mirror is not None:
                mirror.publish(not_before_s=self._plan.sync_every_s)

    def finish(self, state: str, limited: RemoteFolder | None) -> dict[str, Any]:
        """The winner, before the record says that there is one. ``limited``: as for ``export_best``."""
        rows = self._record.rows()
        self._hparams.add(rows)
        self._retention.apply(rows)
        best = best_row(rows, self._plan.settings.maximised)
        card = None if best is None else partial(model_card, {**self._header, "trials": rows}, best)
        export_best(self._location.run_dir, best, self._plan.build, self._location.mirror, limited, card)
        return self.record(state)


def drive(plan: SweepPlan, location: SweepLocation, console: Console, time_budget: TimeBudget | None) -> dict[str, Any]:
    """Runs what is left of a sweep, and returns the content of sweep.json: FINISHED, or INTERRUPTED.

    Raises:
        StorageError: something could not be recorded; the sweep can be resumed after room was made.
    """
    header, stop, limited = sweep_header(plan, location), StopSignal(), location.keep_below(plan.disk_budget_bytes)
    study = _open_study(plan, location, header)
    books = _Bookkeeping(plan, location, study, header, stop)
    search = _search(plan, study, time_budget)
    started = books.record("RUNNING")
    with Progress(
        console,
        num_trials=plan.num_trials,
        side_by_side=plan.slots.count,
        budget_examples=plan.budget_examples,
        stage_examples=plan.stage_examples,
        expected_examples=plan.forecast.examples / plan.num_trials,
    ) as progress:
        progress.show(started)  # Ray takes some seconds until it begins
        completed = run_trials(
            study,
            search,
            SweepJob(
                space=plan.draw,
                build=plan.build,
                sweep_dir=location.run_dir,
                slots=plan.slots,
                share_of=plan.allotment.share_of,
                labels=start_labels_of(header),
                durable=location.durable_plan(plan.sync_every_s, plan.may_end_at),
                disk_budget_bytes=plan.disk_budget_bytes,
                time_budget=time_budget,
                metric=plan.settings.maximised.name,
            ),
            on_event=lambda: books.on_event(progress),
            stop=stop,
            address=plan.settings.cluster,
            go_on=how_to_go_on(location, plan.settings),
        )
        if stop.cannot_record:
            with suppress(OSError, StorageError):
                books.record("INTERRUPTED")
            raise StorageError(stop.reason)
        if completed:
            search.close()
        result = books.finish("FINISHED" if completed else "INTERRUPTED", limited)
        progress.show(result)
    if location.mirror is not None:
        location.mirror.publish()
    with suppress(OSError):  # of the cache: the sweep itself is whole
        keep_measured(location.run_dir, plan.fitted_configs, plan.allotment.at_a_time, plan.num_valid)
    time_is_up = time_budget is not None and time_budget.is_over and not completed
    _log_why(stop, time_budget if time_is_up else None, result)
    return {**result, "time_is_up": True} if time_is_up else result


def _open_study(plan: SweepPlan, location: SweepLocation, header: dict[str, Any]) -> SweepStudy:
    mirror, record = location.mirror, location.run_dir / "sweep.json"
    if mirror is not None:
        mirror.start(header)
    if not record.is_file():  # before the journal: what is not in here has not begun
        write_json(record, {**header, "state": "RUNNING", "best": None, "zero_shot": {}, "trials": []})
    return SweepStudy(
        location.run_dir / "study.journal",
        seed=plan.seed,
        num_startup_trials=plan.num_startup_trials,
        points=plan.space.points,
        on_append=mirror.append_journal if mirror is not None else lambda: None,
        quota=plan.quota,
        older=lambda: older_trials(plan),
    )


def _search(plan: SweepPlan, study: SweepStudy, time_budget: TimeBudget | None) -> Search:
    if not isinstance(plan.rule, WaitingRule):
        return StoppingSearch(study, plan.rule, plan.num_trials)

    def in_time(start: str, first: int, last: int) -> bool:
        return time_budget is None or time_budget.reaches(start, last - first)

    return FreezeThaw(study, plan.search_terms, seed=plan.seed, fresh=plan.fresh, in_time=in_time)


def _log_why(stop: StopSignal, over: TimeBudget | None, result: dict[str, Any]) -> None:
    """Why it ended early, and what was freed. ``over``: the budget of the time that is up."""
    if over is not None and over.refusal is not None:
        _log.info(over.refusal)
    if stop.reason is not None:
        _log.info(f"stopped: {stop.reason}")
    if (freed := freed_line(result)) is not None:
        _log.info(freed)


def time_budget_of(plan: SweepPlan, location: SweepLocation, started: float) -> TimeBudget | None:
    minutes, stage = plan.settings.time_budget, plan.stage_examples
    if minutes is None:
        return None

    def seconds_of(model: str, examples: int) -> float | None:
        """By this sweep's own trials, else as planned; with the start of its process, or what comes between two trials."""
        if (measured := measured_in(runs_of(location.run_dir, model))) is not None:
            return TRIAL_S + measured.start_s + examples / stage * measured.stage_s(stage)
        planned = plan.course.seconds_of(model, examples, stage)
        return None if planned is None else PROCESS_S + planned

    return TimeBudget(minutes, seconds_of, stage, tuple(plan.check.config_of_model), started=started)
