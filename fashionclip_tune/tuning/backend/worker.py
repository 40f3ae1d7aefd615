"""Runs one trial in a Ray worker, within its share of the card, and reports its stages and how it ended."""

import ctypes
import gc
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from ray import tune

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.dataset import run_shards
from fashionclip_tune.errors import BadDataError, DivergedError, OutOfMemoryError, StoppedError, StopReason, UnavailableError
from fashionclip_tune.evaluation.metric import METRICS, Metric
from fashionclip_tune.files import is_full
from fashionclip_tune.profiling.memory import CONTEXT_BYTES
from fashionclip_tune.reporting.sweep_files import queries_at
from fashionclip_tune.training.callbacks import RunCallbacks
from fashionclip_tune.training.device import free_memory, ran_out_of_memory
from fashionclip_tune.training.history import Row
from fashionclip_tune.training.train import run_training
from fashionclip_tune.tuning.backend.stop_signal import StopPoll
from fashionclip_tune.tuning.persistence.run_sync import RunSync
from fashionclip_tune.tuning.planning.disk import room_within
from fashionclip_tune.tuning.trial import TrialPlan

_WAIT_S = 120.0
_POLL_S = 2.0


def claim_gpu_share(
    share_bytes: int, needed_bytes: int, *, wait_s: float = _WAIT_S, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Caps this process's allocator to its share, less CUDA's context, and waits until the card has what it needs.

    Ray's ``wait_for_gpu`` waits for a card that nobody uses, which one that is shared never is.

    Raises:
        UnavailableError: another program holds the memory and does not give it back in ``wait_s``.
    """
    free_memory()  # of the actor's last trial
    total = int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    allowed = max(0, min(share_bytes, total) - CONTEXT_BYTES)
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    # Asking makes this process's context; what the allocator still holds is ours already.
    needed, waited = min(allowed, needed_bytes - CONTEXT_BYTES), 0.0
    while (free := _free_bytes()) < needed:
        if waited >= wait_s:
            raise UnavailableError(
                f"the card has {free / 2**30:.1f} GiB free after {wait_s:.0f} s, this trial needs {needed / 2**30:.1f}: "
                "another program holds the rest (nvidia-smi names it): end it, or leave it its part with --gpu-memory-gb"
            )
        sleep(_POLL_S)
        waited += _POLL_S


def _free_bytes() -> int:
    try:
        return int(torch.cuda.mem_get_info()[0]) + int(torch.cuda.memory_reserved())
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        return 0  # not even a context fits


_LETS_GO_WITHIN_S = 600.0  # who outlived its driver: the time that a large checkpoint takes on a slow disk


def run_trial(ray_config: dict[str, Any]) -> None:
    """Starts or continues a trial in its folder and reports each evaluation.

    Ray stops it by SystemExit out of ``tune.report``. How a trial fails of itself is reported like a result, so that Ray
    retries only what it should: a process that died.
    """
    plan = TrialPlan.from_ray(ray_config)
    config, trial_dir = ProjectConfig.from_dict(plan.config), Path(plan.trial_dir)
    reported = {"examples_seen": 0, plan.metric: 0.0}
    # What the actor's last trial left is freed now: its traceback held on to it until it was gone.
    gc.collect()
    _give_back_memory()
    if not gc.get_freeze_count():
        gc.freeze()  # in a new process: what was imported stays, and searching it took 0.14 s a trial
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    stop_reason: StopReason | None = None
    message = ""
    try:
        with _alone_in(trial_dir):
            _train(plan, config, trial_dir, reported)
    except StoppedError as error:
        stop_reason, message = StopReason.INTERRUPTED, str(error)
    except DivergedError as error:
        stop_reason, message = StopReason.DIVERGED, str(error)
    except OutOfMemoryError as error:
        stop_reason, message = StopReason.OUT_OF_MEMORY, str(error)
    except Exception as error:
        if (missing := _what_is_missing(error, config)) is not None:
            stop_reason, message = StopReason.STORAGE, missing
        elif isinstance(error, BadDataError):
            stop_reason, message = StopReason.BAD_DATA, str(error)
        else:
            (trial_dir / "error.log").write_text(traceback.format_exc())
            stop_reason, message = StopReason.ERROR, f"{type(error).__name__}: {error} (see {trial_dir / 'error.log'})"
    if stop_reason is not None:
        tune.report({**reported, "stop_reason": str(stop_reason), "message": message})


def _give_back_memory() -> None:
    """Each trial runs in a thread of its own, and the C library keeps what a thread has freed for later ones. glibc gives it
    back when asked; others have no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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
        tune.report({**row, **_interval(METRICS[plan.metric], row, trial_dir)})

    if plan.share.gpu_memory_bytes is not None and plan.share.gpu_needed_bytes is not None:
        claim_gpu_share(plan.share.gpu_memory_bytes, plan.share.gpu_needed_bytes)
    if durable is not None:
        durable.run.fetch_state(trial_dir)
    callbacks = RunCallbacks(on_evaluation=report, should_stop=StopPoll(), reserve_space=room_for)
    if durable is not None:
        callbacks = durable.run.watching(callbacks)
    run_training(config, trial_dir, callbacks, resume_from=trial_dir)


def _interval(metric: Metric, row: Row, trial_dir: Path) -> dict[str, float]:
    """How certain the value is, for the search: of a metric of which the evaluation does not say it."""
    if metric.interval(row) is not None or (found := queries_at(trial_dir, row.get("step", 0))) is None:
        return {}
    return metric.computed_interval(found[0])


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
