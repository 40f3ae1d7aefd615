"""A sweep from its settings to its winner: start, resume, finish."""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from fashionclip_tune.errors import StoppedError, UnavailableError, UserError, command
from fashionclip_tune.models.openclip import fetch_weights
from fashionclip_tune.models.start_facts import facts_of_starts, start_changes
from fashionclip_tune.models.starts import find_start
from fashionclip_tune.progress import messages_on
from fashionclip_tune.reporting.sweep_files import is_open, refit_lines
from fashionclip_tune.reporting.terminal import print_lines
from fashionclip_tune.training.pretraining import pretrain_missing
from fashionclip_tune.tuning.backend.cluster import nodes_at
from fashionclip_tune.tuning.console.outcome import how_to_go_on, print_result, with_resume_hint, write_sweep_report
from fashionclip_tune.tuning.console.plan_text import plan_lines
from fashionclip_tune.tuning.persistence.location import SweepCatalog, SweepLocation
from fashionclip_tune.tuning.planning.dataset import copy_data, data_changes, text_changes
from fashionclip_tune.tuning.planning.plan import SweepPlan, plan_sweep
from fashionclip_tune.tuning.planning.settings import SweepSettings, stored_settings
from fashionclip_tune.tuning.refit import check_refit, is_done, refit_winner
from fashionclip_tune.tuning.session import drive, driving, only_driver, time_budget_of
from fashionclip_tune.tuning.warm_start import older_trials

_log = logging.getLogger(__name__)


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

    started, sweeps = time.monotonic(), SweepCatalog(str(results))
    with messages_on(console):
        if refit is not None:
            return _refit(settings, sweeps, name, refit, started, dry_run=dry_run)
        if resume and (found := sweeps.to_resume(name)) is not None:
            return _resume(_reopened(settings, sweeps, *found, dry_run=dry_run), console, started, dry_run=dry_run)
        return _start(settings, sweeps, sweeps.new(name, may_be_begun=resume), console, started, dry_run=dry_run)


def _start(
    settings: SweepSettings, sweeps: SweepCatalog, name: str, console: Console, started: float, *, dry_run: bool
) -> dict[str, Any] | None:
    location = sweeps.place(name, settings.scratch)
    plan = plan_sweep(settings, find_nodes=lambda: nodes_at(settings.cluster), dry_run=dry_run)
    older = older_trials(plan)
    plan = plan.after(older)
    _print_plan(plan, location, console)
    if older:
        _log.info(f"older:    {len(older)} ended trials of {plan.settings.warm_start} come first: not counted, not ranked here")
    if dry_run:
        return None
    plan = prepared(plan)
    with driving(location, is_new=True), with_resume_hint(how_to_go_on(location, plan.settings)):
        return _drive(plan, location, console, started)


class _Reopened(NamedTuple):
    saved: dict[str, Any]
    location: SweepLocation
    plan: SweepPlan


def _reopened(settings: SweepSettings, sweeps: SweepCatalog, name: str, saved: dict[str, Any], *, dry_run: bool) -> _Reopened:
    """A sweep that was started before, planned as it was then, for the machine as it is now."""
    before = stored_settings(saved["settings"], name)
    settings = before.resumed(settings, name)
    if settings.num_trials != before.num_trials:  # there is more to do, whatever was finished
        saved = {**saved, "state": "RUNNING"}
    _check_device(settings, name, dry_run=dry_run)
    location = sweeps.place(name, settings.scratch, saved)
    plan = plan_sweep(settings, find_nodes=lambda: nodes_at(settings.cluster), dry_run=dry_run, begun=saved)
    _check_unchanged(saved, plan)
    return _Reopened(saved, location, plan)


def _resume(found: _Reopened, console: Console, started: float, *, dry_run: bool) -> dict[str, Any] | None:
    saved, location, plan = found
    _print_plan(plan, location, console)
    is_finished = saved["state"] == "FINISHED"
    if not is_finished:
        ended = sum(not is_open(row) for row in saved.get("trials", []))
        _log.info(f"so far:   {ended} of {plan.num_trials} trials have ended; the plan above is that of the whole sweep")
    if dry_run:
        return None
    if is_finished:
        _log.info("this sweep is finished: nothing to resume")
        _fetch_result(location)
        print_result(saved, location, plan.settings, console)
        return saved
    with with_resume_hint(how_to_go_on(location, plan.settings)):
        plan = prepared(plan)
        with driving(location):
            location.restore()
            return _drive(plan, location, console, started)


def _refit(
    settings: SweepSettings,
    sweeps: SweepCatalog,
    name: str | None,
    times: int,
    started: float,
    *,
    dry_run: bool,
) -> dict[str, Any] | None:
    if name is None:
        raise UserError("--refit wants the name of a finished sweep: --name NAME")
    if (found := sweeps.to_resume(name)) is None:
        there = f"there are {', '.join(sweeps.names())}" if sweeps.names() else "there is none"
        raise UserError(f"--refit: no sweep {name} in {sweeps.location}: {there}")
    saved, location, plan = _reopened(settings, sweeps, *found, dry_run=dry_run)
    check_refit(saved, times)
    if is_done(saved, location, times):
        _log.info("this refit is finished: nothing to train")
        if not dry_run:
            _fetch_result(location)
        for line in refit_lines(saved, location.readable):
            _log.info(line)
        return None if dry_run else saved
    if dry_run:
        return refit_winner(plan, saved, location, times, dry_run=True)
    time_budget = time_budget_of(plan, location, started)

    def is_late() -> bool:
        return time_budget is not None and time_budget.left_s() == 0

    go_on = how_to_go_on(location, plan.settings, "--refit", str(times))
    with driving(location), with_resume_hint(go_on):
        if location.mirror is not None:
            location.fetch_result()
        try:
            result = refit_winner(plan, saved, location, times, should_stop=is_late)
        except StoppedError as error:
            if is_late():
                _log.info(f"the time of this run is up; {go_on}")
                return {**saved, "time_is_up": True}
            raise StoppedError(f"{error}; {go_on}") from error
        write_sweep_report(location, plan.settings, finished=True)
    return result


def _drive(plan: SweepPlan, location: SweepLocation, console: Console, started: float) -> dict[str, Any]:
    result = drive(plan, location, console, time_budget_of(plan, location, started))
    print_result(result, location, plan.settings, console)
    write_sweep_report(location, plan.settings, finished=result["state"] == "FINISHED")
    return result


def _print_plan(plan: SweepPlan, location: SweepLocation, console: Console) -> None:
    two_tiers = f" (runs in {location.run_dir})" if location.mirror is not None else ""
    print_lines(console, [f"sweep:    {location.shown}{two_tiers}", *plan_lines(plan)])


def prepared(plan: SweepPlan) -> SweepPlan:
    """Weights, and copies of shards where trials run here: once, before trials would make them side by side.

    The plan then has what is known of starts that are here only now.
    """
    _prepare_models(plan)
    if plan.settings.cluster is None:
        copy_data(plan.base)
    return replace(plan, starts=facts_of_starts(plan.check.config_of_model))


def _fetch_result(location: SweepLocation) -> None:
    """Where the sweep lies at an address."""
    if location.is_at_an_address:
        with only_driver(location.run_dir):
            location.fetch_result()


def _check_unchanged(saved: dict[str, Any], plan: SweepPlan) -> None:
    changes: list[tuple[Path | str, str]] = []
    if saved["space_hash"] != plan.space.content_hash:
        changes.append((plan.space.file, text_changes(saved["space_text"], plan.space.text)))
    if saved["data_fingerprint"] != plan.data_fingerprint:
        changes.append((plan.base.dataset_dir, data_changes(saved["data"], plan.data)))
    changes += start_changes(saved.get("starts"), plan.starts)
    if changes:
        started = f"has changed since sweep {saved['name']} was started"
        raise UserError(
            f"{'; '.join(f'{source} {started}: {how}' for source, how in changes)}. Put it back, or start a new sweep"
        )


def _check_device(settings: SweepSettings, name: str, *, dry_run: bool) -> None:
    """A sweep stays on the kind of device that it was started on; ``dry_run``: for a card that it remembers."""
    is_needed = settings.device == "cuda" and settings.cluster is None and not (dry_run and settings.gpu_memory_gb)
    if is_needed and not torch.cuda.is_available():
        raise UnavailableError(
            f"sweep {name} was started on a GPU, and torch sees none here: go on with it where there is one (what is wrong "
            f"here: {command('doctor', '--device', 'cuda')}), or start a new sweep with another --name"
        )


def _prepare_models(plan: SweepPlan) -> None:
    """Makes or fetches weights."""
    configs = plan.check.config_of_model
    pretrain_missing([name for name, config in configs.items() if config.model.pretrained == "default"])
    for name, config in configs.items():
        start = find_start(name, config.model.pretrained)
        if start.has_weights and start.at_hand(config.model_cache_dir) is None:
            _log.info(f"fetching the weights of {name}")
        fetch_weights(config)
