"""``--refit N``: the winner's setting, trained from its first weights with N times the examples.

A cosine schedule that has ended cannot be continued, so this is a run of its own; what it can be compared with is the trial.
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.files import write_json
from fashionclip_tune.models.named_model import starting_point
from fashionclip_tune.models.openclip import load_model, load_weights
from fashionclip_tune.reporting.sweep_files import read_sweep, refit_lines
from fashionclip_tune.storage.checkpoint import newest_weights
from fashionclip_tune.training.callbacks import RunCallbacks
from fashionclip_tune.training.history import Row
from fashionclip_tune.training.train import print_row, run_training
from fashionclip_tune.tuning.persistence.export import export_whole
from fashionclip_tune.tuning.persistence.location import SweepLocation
from fashionclip_tune.tuning.persistence.record import recalls
from fashionclip_tune.tuning.persistence.run_sync import RunSync
from fashionclip_tune.tuning.planning.disk import room_within
from fashionclip_tune.tuning.planning.plan import SweepPlan

_log = logging.getLogger(__name__)


def refit_winner(
    plan: SweepPlan,
    saved: Mapping[str, Any],
    location: SweepLocation,
    times: int,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Trains in ``SWEEP/refit/``, goes on there if it was stopped, and leaves ``refit/best/`` as an OpenCLIP folder.

    Args:
        should_stop: as of ``RunCallbacks``.

    Returns:
        The content of sweep.json, in which ``refit`` has what came of it.

    Raises:
        UserError: the sweep has no winner or is unfinished, ``times`` is below 1, or the folder has another refit.
        StoppedError: as ``train``.
        StorageError: it does not fit the disk, or the budget.
    """
    check_refit(saved, times)
    sweep_dir = location.readable if dry_run else location.run_dir
    best, folder = saved["best"], sweep_dir / "refit"
    config = _refit_config(plan, best["config"], times)
    _log.info(
        f"refit:    trial {best['trial_id']}, {config.model_name}, {config.training.budget_examples:,} examples, in {folder}"
    )
    _check_same_length(folder, config)
    if dry_run:
        return dict(saved)
    limited, durable = location.keep_below(plan.disk_budget_bytes), location.durable_plan(plan.sync_every_s)
    sync = RunSync(durable, config, folder, "refit", plan.disk_budget_bytes) if durable is not None else None
    if sync is not None:
        sync.run.fetch_state(folder)

    def report(row: Row) -> None:
        print_row(row)
        if sync is not None:
            sync.keep(row)

    room_for = room_within(plan.disk_budget_bytes if durable is None else None, sweep_dir, folder)
    callbacks = RunCallbacks(on_evaluation=report, should_stop=should_stop, reserve_space=room_for)
    if sync is not None:
        callbacks = sync.run.watching(callbacks)
    row = run_training(config, folder, callbacks, resume_from=folder).metrics
    weights = newest_weights(folder)
    assert weights is not None
    loaded = load_model(starting_point(config))
    load_weights(loaded.network, weights)
    export_whole(loaded, folder / "best", limited)
    known = {name: row[name] for name in ("step", "examples_seen", "duration_s")}
    refit = {"trial_id": best["trial_id"], "times": times, **known, "metrics": recalls(row)}
    sweep = {**read_sweep(sweep_dir), "refit": refit}
    write_json(sweep_dir / "sweep.json", sweep)
    for line in refit_lines(sweep, sweep_dir):
        _log.info(line)
    if location.mirror is not None:
        location.mirror.publish_run(folder)
        location.mirror.publish()
        _log.info(f"      kept in {location.shown}/refit/best")
    if sync is not None:
        sync.run.forget_state()
    return sweep


def check_refit(saved: Mapping[str, Any], times: int) -> None:
    """Raises UserError for a sweep that cannot be refitted: before its driver on another machine is told to stop."""
    if times < 1:
        raise UserError(f"--refit {times} is not allowed: at least 1")
    if saved["state"] != "FINISHED" or saved["best"] is None:
        raise UserError(f"sweep {saved['name']} has no winner yet: --refit wants a finished sweep (finish it with --resume)")


def is_done(saved: Mapping[str, Any], location: SweepLocation, times: int) -> bool:
    """Whether this refit was finished, on this machine or another, and its model is still there.

    That it is, is recorded last (``SweepMirror.publish``). Who has moved the model away wants another one.
    """
    if saved.get("refit", {}).get("times") != times:
        return False
    if location.mirror is not None:
        return bool(location.mirror.folder.sizes("refit/best"))
    return (location.run_dir / "refit" / "best").is_dir()


def _refit_config(plan: SweepPlan, settings: Mapping[str, Any], times: int) -> ProjectConfig:
    alone = {"training.budget_examples": times * plan.budget_examples, "hardware.device_share": 1.0}
    return plan.build(settings).with_overrides(alone)


def _check_same_length(folder: Path, config: ProjectConfig) -> None:
    """A run of another length has another schedule: it can neither be gone on with nor be overwritten."""
    try:
        before = json.loads((folder / "config.json").read_text())["training.budget_examples"]
    except (OSError, ValueError, KeyError):  # none was begun
        return
    if before != config.training.budget_examples:
        now = config.training.budget_examples
        raise UserError(f"{folder} is a refit with {before:,} examples, not {now:,}: move it away, or ask for as many again")
