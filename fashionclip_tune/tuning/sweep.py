"""A sweep from its settings to its winner: start, resume, finish."""

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from fashionclip_tune.durable import DurableFolder
from fashionclip_tune.errors import StoppedError, StorageError, UserError
from fashionclip_tune.files import write_json
from fashionclip_tune.model import fetch_weights
from fashionclip_tune.plan_against_fact import fact_lines, plan_against_fact
from fashionclip_tune.pretraining import pretrain_missing
from fashionclip_tune.progress_bars import progress_bar
from fashionclip_tune.report import has_failed, ranked, ties_with_best
from fashionclip_tune.report_html import write_report
from fashionclip_tune.report_terminal import bad_sample_lines, print_lines, trials_table, winner_lines
from fashionclip_tune.tiny import TINY_MODELS
from fashionclip_tune.tuning.changes import data_changes, text_changes
from fashionclip_tune.tuning.disk import KEPT_PER_MODEL, DiskBudget
from fashionclip_tune.tuning.engine import DurablePlan
from fashionclip_tune.tuning.execution import run_trials
from fashionclip_tune.tuning.header import sweep_header
from fashionclip_tune.tuning.hparams import HParamsTab
from fashionclip_tune.tuning.overhead import keep_overhead
from fashionclip_tune.tuning.place import Place, Results
from fashionclip_tune.tuning.plan import SweepPlan, plan_sweep
from fashionclip_tune.tuning.plan_lines import plan_lines
from fashionclip_tune.tuning.progress import Progress
from fashionclip_tune.tuning.rates import keep_measured, measured_in, runs_of
from fashionclip_tune.tuning.record import SweepRecord
from fashionclip_tune.tuning.refit import refit_winner
from fashionclip_tune.tuning.retention import Retention
from fashionclip_tune.tuning.settings import SweepSettings
from fashionclip_tune.tuning.shares import GB
from fashionclip_tune.tuning.stop_signal import StopSignal
from fashionclip_tune.tuning.study import SweepStudy
from fashionclip_tune.tuning.time_budget import TimeBudget
from fashionclip_tune.tuning.warm_start import older_trials
from fashionclip_tune.tuning.winner import export_best


def sweep(
    settings: SweepSettings,
    *,
    results: str | Path,
    name: str | None,
    resume: bool,
    dry_run: bool,
    console: Console,
    refit: int | None = None,
) -> dict[str, Any] | None:
    """Starts a sweep, or goes on with an interrupted one, and returns the content of its sweep.json.

    Args:
        settings: None where the plan is to choose; of a resumed sweep they may only repeat what it was started with.
        results: the folder of all sweeps; with ``settings.scratch`` the durable one, which may be slow and no POSIX file
            system, or an address such as ``s3://bucket/path``.
        name: the sweep's folder in it; None: the next free one, or with ``resume`` the latest unfinished one.
        resume: go on with an interrupted sweep; with nothing to resume, start.
        dry_run: print the plan only, and return None.
        refit: train the winner of the named, finished sweep anew, with so many times the examples.

    Raises:
        UserError: anything that the user can put right.
    """

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    started = time.monotonic()
    sweeps = Results(str(results))
    found = sweeps.to_resume(name) if resume or refit is not None else None
    if refit is not None and (name is None or found is None):
        raise UserError("--refit wants the name of a finished sweep: --name NAME")
    if found is not None:
        name, saved = found
        settings = SweepSettings(**saved["settings"]).resumed(settings, name)
        place = sweeps.place(name, settings.scratch, saved)
        plan = plan_sweep(settings, say, dry_run=dry_run)
        _check_unchanged(saved, plan)
    else:
        name = sweeps.new(name, may_be_begun=resume)
        place = sweeps.place(name, settings.scratch)
        plan = plan_sweep(settings, say, dry_run=dry_run)
    if refit is not None:
        if dry_run:
            return refit_winner(plan, saved, place.readable, refit, say, dry_run=True)
        return _refit(plan, saved, place, refit, say, _time_budget(plan, place, started))
    # One that goes on has them in its journal.
    older = older_trials(plan) if found is None else []
    plan = plan.after(older) if older else plan
    two_tiers = f" (runs in {place.run_dir})" if place.mirror is not None else ""
    print_lines(console, [f"sweep:    {place.shown}{two_tiers}", *plan_lines(plan)])
    if older:
        say(f"older:    {len(older)} ended trials of {plan.settings.warm_start} come first: not counted, not ranked here")
    if found is not None and saved["state"] != "FINISHED":
        ended = sum(row["state"] != "RUNNING" for row in saved.get("trials", []))
        say(f"so far:   {ended} of {plan.num_trials} trials have ended; the plan above is that of the whole sweep")
    disk_budget = _disk_budget(plan, place)
    if dry_run:
        return None
    if found is not None and saved["state"] == "FINISHED":
        say("this sweep is finished: nothing to resume")
        if place.is_at_an_address:
            with _only_driver(place.run_dir):
                place.fetch_result()
        _print_result(saved, place, console)
        return saved
    _prepare_models(plan, say)
    with _driving(place, say):
        place.restore()
        result = _run(plan, place, console, _time_budget(plan, place, started), disk_budget)
        _print_result(result, place, console)
        _write_report(place, say, finished=result["state"] == "FINISHED")
    return result


def _refit(
    plan: SweepPlan,
    saved: dict[str, Any],
    place: Place,
    times: int,
    say: Callable[[str], None],
    time_budget: TimeBudget | None,
) -> dict[str, Any]:
    go_on = _how_to_go_on(place, "--refit", str(times))

    def is_late() -> bool:
        return time_budget is not None and time_budget.left_s() == 0

    with _driving(place, say):
        if place.mirror is not None:
            place.fetch_result()
        durable = _durable_plan(plan, place, kept_at=())
        try:
            result = refit_winner(plan, saved, place.run_dir, times, say, durable=durable, should_stop=is_late)
        except StoppedError as error:
            if is_late():
                say(f"the time of this run is up; {go_on}")
                return {**saved, "time_is_up": True}
            raise StoppedError(f"{error}; {go_on}") from error
        report = write_report([place.run_dir])
        if place.mirror is not None:
            place.mirror.publish_run(place.run_dir / "refit")
            place.mirror.publish()
            say(f"      kept in {place.shown}/refit/best")
    say(f"report: {place.readable / report.name}")
    return result


def _check_unchanged(saved: dict[str, Any], plan: SweepPlan) -> None:
    changes: list[tuple[Path | str, str]] = []
    if saved["space_hash"] != plan.space.content_hash:
        changes.append((plan.space.file, text_changes(saved["space_text"], plan.space.text)))
    if saved["data_fingerprint"] != plan.data_fingerprint:
        changes.append((plan.base.dataset_dir, data_changes(saved["data"], plan.data)))
    if changes:
        started = f"has changed since sweep {saved['name']} was started"
        raise UserError(
            f"{'; '.join(f'{source} {started}: {how}' for source, how in changes)}. Put it back, or start a new sweep"
        )


def _prepare_models(plan: SweepPlan, say: Any) -> None:
    """Makes or fetches weights once, before trials would do so side by side."""
    configs = plan.check.config_of_model
    for config in configs.values():
        if len(configs) > 1 and config.model.pretrained not in ("default", None) and Path(config.model.pretrained).exists():
            raise UserError(
                f"model.pretrained = {config.model.pretrained} holds one model's weights, the space has {', '.join(configs)}: "
                f"add --set clip_model={config.model_name}"
            )
    pretrain_missing([name for name, config in configs.items() if config.model.pretrained == "default"], say)
    for name, config in configs.items():
        if name not in TINY_MODELS:
            say(f"weights of {name}: from {config.model_cache_dir}, else from the hub")
        fetch_weights(config)


@contextmanager
def _driving(place: Place, say: Callable[[str], None]) -> Iterator[None]:
    """On this machine no other driver may be at it; one on another machine is told to stop."""
    with _only_driver(place.run_dir):
        if (before := place.take_over()) is not None:
            say(f"note:     {before} did not say that it had ended; if it still runs, it stops where it would write next")
        yield
        place.let_go()


@contextmanager
def _only_driver(sweep_dir: Path) -> Iterator[None]:
    try:
        sweep_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{sweep_dir} cannot be written to ({error}): choose another folder") from error
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


def _run(
    plan: SweepPlan, place: Place, console: Console, time_budget: TimeBudget | None, disk_budget: DiskBudget | None
) -> dict[str, Any]:
    header = sweep_header(plan, place)
    mirror, stop = place.mirror, StopSignal()
    if mirror is not None:
        mirror.start(header)
    if not (place.run_dir / "sweep.json").is_file():  # before the journal: what is not in here has not begun
        write_json(place.run_dir / "sweep.json", {**header, "state": "RUNNING", "best": None, "zero_shot": {}, "trials": []})
    study = SweepStudy(
        place.run_dir / "study.journal",
        seed=plan.seed,
        num_startup_trials=plan.num_startup_trials,
        points=plan.space.points,
        on_append=mirror.append_journal if mirror is not None else lambda: None,
        quota=plan.quota,
        older=lambda: older_trials(plan),
    )
    record = SweepRecord(place.run_dir, study, header)
    started = record.write("RUNNING")
    retention = Retention(place.run_dir, plan.build, mirror)
    hparams = HParamsTab(place.run_dir, plan.check.settings)
    assert plan.settings.budget_examples
    assert plan.settings.grace_examples
    with Progress(
        console,
        num_trials=plan.num_trials,
        side_by_side=plan.slots.count,
        budget_examples=plan.settings.budget_examples,
        stage_examples=plan.settings.grace_examples,
        expected_examples=plan.forecast.examples / plan.num_trials,
    ) as progress:
        progress.show(started)  # Ray takes some seconds until it begins

        def on_event() -> None:
            with stop.on_storage_error():
                if mirror is not None and plan.settings.address is not None:
                    mirror.fetch_evaluations()  # of trials on other machines
                sweep = record.write("RUNNING")
                progress.show(sweep)
                hparams.add(sweep["trials"])
                retention.apply(sweep["trials"])
                if mirror is not None:
                    mirror.publish(not_before_s=plan.sync_every_s)

        completed = run_trials(
            study,
            plan.draw,
            plan.build,
            sweep_dir=place.run_dir,
            num_trials=plan.num_trials,
            slots=plan.slots,
            rule=plan.rule,
            on_event=on_event,
            stop=stop,
            address=plan.settings.address,
            share_of=plan.allotment.share_of,
            time_budget=time_budget,
            disk_budget=disk_budget,
            durable=_durable_plan(plan, place, plan.may_end_at),
        )
        if stop.cannot_record:
            with suppress(OSError, StorageError):
                record.write("INTERRUPTED")
            raise StorageError(f"the sweep has stopped, nothing is lost: {stop.reason}\n{_how_to_go_on(place)}")
        hparams.add(record.rows())
        retention.apply(record.rows())
        export_best(place.run_dir, record.rows(), plan.build, mirror)
        result = record.write("FINISHED" if completed else "INTERRUPTED")
        progress.show(result)
    _keep_for_later_plans(plan, place, study, result, in_one_go=completed and "elapsed_s" not in header)
    if time_budget is not None and time_budget.is_over and not completed:
        result = {**result, "time_is_up": True}
        if time_budget.refusal is not None:
            console.print(time_budget.refusal, highlight=False, soft_wrap=True)
    if stop.reason is not None:
        console.print(f"stopped: {stop.reason}", highlight=False, soft_wrap=True)
    if mirror is not None:
        mirror.publish()
    if retention.freed_bytes:
        console.print(
            f"freed {retention.freed_bytes / 1e6:,.0f} MB: states of ended trials, and weights but for the best "
            f"{KEPT_PER_MODEL} of each model",
            highlight=False,
        )
    return result


def _keep_for_later_plans(plan: SweepPlan, place: Place, study: SweepStudy, result: dict[str, Any], *, in_one_go: bool) -> None:
    keep_measured(place.run_dir, plan.fitted_configs, plan.allotment.at_a_time, plan.num_valid)
    if in_one_go:
        durations_s = {int(row["trial_id"]): row["duration_s"] for row in result["trials"]}
        keep_overhead(study.trials(), durations_s, result["elapsed_s"], plan.slots.count)


def _durable_plan(plan: SweepPlan, place: Place, kept_at: tuple[int, ...]) -> DurablePlan | None:
    if place.mirror is None:
        return None
    return DurablePlan(place.shown, plan.sync_every_s, kept_at, place.mirror.writer, str(place.run_dir / ".durable.lock"))


def _disk_budget(plan: SweepPlan, place: Place) -> DiskBudget | None:
    if plan.settings.disk_budget_gb is None:
        return None
    folder = DurableFolder(place.shown)

    def used(running: Sequence[int]) -> int:
        left_out = ("best/", *(f"trials/{number:04d}-" for number in running))
        return sum(size for name, size in folder.sizes().items() if not name.startswith(left_out))

    budget_bytes = int(plan.settings.disk_budget_gb * GB)
    return DiskBudget(budget_bytes, plan.disk, is_durable=place.mirror is not None, used=used)


def _how_to_go_on(place: Place, *how: str) -> str:
    results, _, name = place.shown.rpartition("/")
    scratch = ["--scratch", str(place.run_dir.parents[1])] if place.mirror is not None else []
    command = ["python", "sweeps/run_sweep.py", "--results", results, "--name", name, *scratch, *(how or ("--resume",))]
    return f"go on with: {shlex.join(command)}"


def _time_budget(plan: SweepPlan, place: Place, started: float) -> TimeBudget | None:
    minutes, stage = plan.settings.time_budget, plan.base.training.stage_examples
    if minutes is None:
        return None
    assert stage is not None

    def first_stage_s(model: str) -> float | None:
        """Of this sweep's own trials, else as planned; with the start of its process, or what comes between two trials."""
        if (measured := measured_in(runs_of(place.run_dir, model))) is not None:
            return plan.course.overhead.trial_s + measured.start_s + measured.stage_s(stage)
        planned = plan.forecast.first_stage_s.get(model)
        return None if planned is None else plan.course.overhead.process_s + planned

    return TimeBudget(minutes, first_stage_s, tuple(plan.check.config_of_model), started=started)


def _print_result(result: dict[str, Any], place: Place, console: Console) -> None:
    sweep_dir = place.readable
    rows = ranked(result["trials"])
    ties = ties_with_best(sweep_dir, rows)
    console.print(trials_table(rows, f"{result['name']}, best first", result["state"], ties))
    print_lines(console, winner_lines(result, sweep_dir, ties))
    failed = [row for row in result["trials"] if has_failed(row)]
    print_lines(console, [f"failed: trial {row['trial_id']} ({row['stop_reason']}): {row['message']}" for row in failed])
    if result["state"] == "FINISHED":
        print_lines(console, fact_lines(plan_against_fact(result, sweep_dir)))
    print_lines(console, bad_sample_lines(sweep_dir))
    if result["state"] == "INTERRUPTED":
        why = "the time of this run is up" if result.get("time_is_up") else "interrupted"
        console.print(f"{why}; {_how_to_go_on(place)}", highlight=False, soft_wrap=True)
    console.print(f"curves: tensorboard --logdir {sweep_dir / 'trials'}", highlight=False, soft_wrap=True)


def _write_report(place: Place, say: Any, *, finished: bool) -> None:
    """With the winner's photos where the sweep has ended; who pressed Ctrl-C is not to wait for them."""
    try:
        with progress_bar("encoding photos for the report's gallery") as on_progress:
            path = write_report([place.run_dir], gallery=finished, on_progress=on_progress)
        if place.mirror is not None:
            place.mirror.publish()
    except (OSError, StorageError) as error:  # a full disk: the sweep's own files are there
        say(f"no report ({error}); python sweeps/compare.py {place.readable} makes it")
    else:
        say(f"report: {place.readable / path.name}")
