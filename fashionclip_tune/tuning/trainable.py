"""What a Ray worker runs: one trial, through the same ``train`` as everyone else."""

import gc
import json
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from ray import tune

from fashionclip_tune.config import ProjectConfig
from fashionclip_tune.dataset import run_shards
from fashionclip_tune.durable import DurableFolder
from fashionclip_tune.errors import BadDataError, DivergedError, OutOfMemoryError, StoppedError, UnavailableError
from fashionclip_tune.files import is_full
from fashionclip_tune.history import Row
from fashionclip_tune.portable import DurableRun
from fashionclip_tune.run import starting_point
from fashionclip_tune.training import train
from fashionclip_tune.tuning.disk import room_within
from fashionclip_tune.tuning.engine import DurablePlan, TrialPlan
from fashionclip_tune.tuning.gpu_share import claim_gpu_share
from fashionclip_tune.tuning.stop_signal import INTERRUPTED, StopPoll
from fashionclip_tune.tuning.study import METRIC
from fashionclip_tune.tuning.writer import StillOurs

_LETS_GO_WITHIN_S = 600.0  # who outlived its driver: the time that a large checkpoint takes on a slow disk


def run_trial(ray_config: dict[str, Any]) -> None:
    """Starts or continues a trial in its folder and reports each evaluation.

    Ray stops it by SystemExit out of ``tune.report``. How a trial fails of itself is reported like a result, so that Ray
    retries only what it should: a process that died.
    """
    plan = TrialPlan.from_ray(ray_config)
    config, trial_dir = ProjectConfig.from_dict(plan.config), Path(plan.trial_dir)
    reported = {"examples_seen": 0, METRIC: 0.0}
    # What the actor's last trial left is freed now: its traceback held on to it until it was gone.
    gc.collect()
    if not gc.get_freeze_count():
        gc.freeze()  # in a new process: what was imported stays, and searching it took 0.14 s a trial
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    stop_reason, message = "", ""
    try:
        with _alone_in(trial_dir):
            _train(plan, config, trial_dir, reported)
    except StoppedError as error:
        stop_reason, message = INTERRUPTED, str(error)
    except DivergedError as error:
        stop_reason, message = "diverged", str(error)
    except OutOfMemoryError as error:
        stop_reason, message = "out_of_memory", str(error)
    except Exception as error:
        if (missing := _what_is_missing(error, config)) is not None:
            stop_reason, message = "storage", missing
        elif isinstance(error, BadDataError):
            stop_reason, message = "bad_data", str(error)
        else:
            (trial_dir / "error.log").write_text(traceback.format_exc())
            stop_reason, message = "error", f"{type(error).__name__}: {error} (see {trial_dir / 'error.log'})"
    if stop_reason:
        tune.report({**reported, "stop_reason": stop_reason, "message": message})


@contextmanager
def _alone_in(trial_dir: Path) -> Iterator[None]:
    """A worker may outlive its driver for seconds: its successor waits until it is gone. Warnings go to a file of the trial."""

    def log_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        with open(trial_dir / "warnings.log", "a") as file:  # nobody sees a worker's own output
            file.write(f"{message}\n")

    trial_dir.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(trial_dir / ".lock").acquire(timeout=_LETS_GO_WITHIN_S)
    except Timeout:
        raise UnavailableError(
            f"{trial_dir} is held by the process of an earlier run of the sweep, for {_LETS_GO_WITHIN_S / 60:.0f} minutes now: "
            "end that one"
        ) from None
    with held, warnings.catch_warnings():
        warnings.showwarning = log_warning
        yield


def _train(plan: TrialPlan, config: ProjectConfig, trial_dir: Path, reported: dict[str, Any]) -> None:
    """``reported``: is to have what was reported last."""
    durable, budget_bytes = None, plan.disk_budget_bytes
    if plan.durable is not None:
        durable = RunSync(plan.durable, config, trial_dir, f"trials/{trial_dir.name}", budget_bytes)
    room_for = room_within(budget_bytes if durable is None else None, trial_dir.parents[1], trial_dir)

    def report(row: Row) -> None:
        reported.update(row)
        if durable is not None:
            durable.keep(row)
        tune.report(dict(row))

    if plan.share.gpu_memory_bytes is not None and plan.share.gpu_needed_bytes is not None:
        claim_gpu_share(plan.share.gpu_memory_bytes, plan.share.gpu_needed_bytes)
    if durable is not None:
        durable.run.fetch_state(trial_dir)
    train(
        config,
        trial_dir,
        on_eval=report,
        resume_from=trial_dir,
        durable=durable.run if durable is not None else None,
        should_stop=StopPoll(),
        room_for=room_for,
    )


def _what_is_missing(error: Exception, config: ProjectConfig) -> str | None:
    """What the user is to bring back, where the trial is not to blame: it waits for it, instead of ending as failed.

    Photos that cannot be read are bad ones, unless the shards themselves are gone.
    """
    if isinstance(error, UnavailableError):
        return str(error)
    if is_full(error):
        return f"the disk is full ({error}): make room"
    if isinstance(error, BadDataError):
        try:
            run_shards(config)
        except UnavailableError as gone:
            return str(gone)
    return None


class RunSync:
    """Keeps on the durable side what a run's reports are about, before they are made."""

    def __init__(
        self, plan: DurablePlan, config: ProjectConfig, run_dir: Path, name: str, budget_bytes: int | None = None
    ) -> None:
        """
        Args:
            name: the run's place on the durable side.
            budget_bytes: of all that the sweep may hold there.
        """
        self._name = name
        self._folder = DurableFolder(plan.location)
        self._folder.guard(StillOurs(self._folder, plan.writer))
        if budget_bytes is not None:
            self._folder.keep_below(budget_bytes)
        self._kept_at = plan.kept_at
        self._run_dir = run_dir
        turn = FileLock(plan.turn) if plan.turn is not None else None
        self.run = DurableRun(self._folder, name, starting_point(config), sync_every_s=plan.sync_every_s, turn=turn)

    def keep(self, row: Row) -> None:
        """The figures at once; the weights where the run may end with this report."""
        step = f"step_{row['step']:08d}"
        checkpoint = self._run_dir / "checkpoints" / step
        if row["examples_seen"] in self._kept_at and checkpoint.is_dir():
            self.run.put_weights(checkpoint)
        self._folder.put(f"{self._name}/evaluations/{step}.json", json.dumps(row, indent=2).encode())
