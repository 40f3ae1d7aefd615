"""How fast this card trains a configuration, alone and with a second trial beside it; measured by ``probe`` and kept.

Two processes on one card take turns at its kernels: small models gain by filling each other's gaps, large ones do not.
"""

import json
import logging
import multiprocessing
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import OutOfMemoryError, UserError
from fashionclip_tune.files import cache_dir, write_json
from fashionclip_tune.machine.child_processes import call_ending_with_parent
from fashionclip_tune.models.openclip import load_random_model
from fashionclip_tune.models.precision import plan_precision
from fashionclip_tune.models.token_rows import USUAL_ROWS, use_token_rows
from fashionclip_tune.profiling.memory import CONTEXT_BYTES
from fashionclip_tune.profiling.probe import probe_identity, random_batch
from fashionclip_tune.progress import OnProgress, no_progress, progress_bar
from fashionclip_tune.training.device import ran_out_of_memory, repeatable
from fashionclip_tune.training.trainer import Trainer

_log = logging.getLogger(__name__)

# The first steps make Adam's moments and choose kernels.
_WARM_UP_STEPS, _TIMED_STEPS = 5, 30
_TIMEOUT_S = 600.0
_LOOK_S = 2.0  # between looks at processes whose answers are waited for

RunSideBySide = Callable[[ProjectConfig, int], list[float]]
"""(configuration, processes) to the samples a second of each, all training at the same time."""


@dataclass(frozen=True)
class Pace:
    """Samples a second on photos that are in memory already."""

    alone: float
    side_by_side: float | None
    """Of two processes together; None where they do not fit."""

    @property
    def packing_gain(self) -> float | None:
        """What two at a time finish more of than one after the other, as a share."""
        return None if self.side_by_side is None else self.side_by_side / self.alone - 1


def known_pace(config: ProjectConfig) -> Pace | None:
    """What was measured on this card before, with this torch; None where nothing was, or there is no card."""
    path = _path(config)
    return Pace(**json.loads(path.read_text())) if path is not None and path.is_file() else None


def packing_gain(config: ProjectConfig) -> float | None:
    """By which share two trials at a time are faster than one after the other; 0 where they did not fit, None where it was not
    measured."""
    pace = known_pace(config)
    return None if pace is None else pace.packing_gain or 0.0


def measured_packing_gain(config: ProjectConfig) -> float | None:
    """Likewise, measured now, as it is told; None where that failed, which is told, too."""
    what = f"measuring {config.model_name} on this card, alone and two side by side"
    _log.info(f"{what}: once, a minute or two; --max-concurrent or --gpus-per-trial says instead how many share it")
    try:
        with progress_bar(what) as on_progress:
            return measure_pace(config, on_progress=on_progress).packing_gain or 0.0
    except (UserError, OutOfMemoryError, OSError, RuntimeError) as error:
        _log.info(f"note: {error}; how many trials of {config.model_name} share the card follows from their memory")
        return None


def measure_pace(config: ProjectConfig, run: RunSideBySide | None = None, on_progress: OnProgress = no_progress) -> Pace:
    """Trains some steps alone, then in two processes side by side with half of the card each, and keeps the answer.

    Raises:
        OutOfMemoryError: not even one fits.
        UserError: a process failed, or was killed, or takes too long.
    """
    run = run or run_side_by_side
    on_progress(0, 2)
    (alone,) = run(config, 1)
    on_progress(1, 2)
    try:
        pace = Pace(alone, sum(run(config, 2)))
    except OutOfMemoryError:
        pace = Pace(alone, None)
    on_progress(2, 2)
    if (path := _path(config)) is not None:
        write_json(path, asdict(pace))
    return pace


def _path(config: ProjectConfig) -> Path | None:
    identity = probe_identity(config)
    return cache_dir() / "paces" / f"{identity}.json" if identity is not None else None


def run_side_by_side(config: ProjectConfig, count: int, *, card_bytes: int | None = None) -> list[float]:
    """Real processes, that begin to be timed together.

    Args:
        card_bytes: that they share, each with an equal part; None: all that the card has.

    Raises:
        OutOfMemoryError: one of them did not fit its part of the card.
        UserError: one of them failed otherwise, or gave no answer.
    """
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.Queue()
    arguments = (f"{__name__}:{time_steps.__name__}", config.to_dict(), count, barrier, results, card_bytes)
    processes = [context.Process(target=call_ending_with_parent, args=arguments, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        found = _answers(processes, results)
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    # Where one runs out of memory, the others fail too: they wait for it in vain.
    failed = sorted((each for each in found if isinstance(each, str)), key=lambda each: not each.startswith("OutOfMemory"))
    if failed:
        kind = OutOfMemoryError if failed[0].startswith("OutOfMemory") else UserError
        raise kind(f"the pace was not measured: {failed[0]}")
    return [float(result) for result in found]


def _answers(processes: Sequence[Any], results: Any) -> list[Any]:
    """One of each process; of one that is gone without, and of those that it leaves waiting, that it is gone."""
    found: list[Any] = []
    ends = time.monotonic() + _TIMEOUT_S
    while len(found) < len(processes):
        gone = [process for process in processes if process.exitcode]
        try:
            found.append(results.get(timeout=_LOOK_S))
        except queue.Empty:
            if gone:
                return [f"a process ended with status {gone[0].exitcode}"]
            if time.monotonic() > ends:
                return [f"no answer after {_TIMEOUT_S:.0f} s"]
    return found


def time_steps(settings: dict[str, Any], count: int, barrier: Any, results: Any, card_bytes: int | None = None) -> None:
    """One of ``count`` processes: warms up, waits for the others, and puts its samples a second into ``results``."""
    try:
        config = ProjectConfig.from_dict(settings)
        if config.hardware.threads is not None:
            torch.set_num_threads(config.hardware.threads)
        plan = plan_precision(config)
        if plan.device.type == "cuda":
            total = torch.cuda.get_device_properties(plan.device).total_memory
            part_bytes = min(total, card_bytes or total) / count - CONTEXT_BYTES
            torch.cuda.set_per_process_memory_fraction(max(0.0, part_bytes / total), plan.device)
        loaded = load_random_model(config)
        use_token_rows(loaded.network, config, USUAL_ROWS)
        trainer = Trainer(loaded, config, _WARM_UP_STEPS + _TIMED_STEPS, plan)
        batch = random_batch(config, loaded)
        batch = batch.pin_memory() if plan.device.type == "cuda" else batch
        with repeatable(config.hardware.deterministic, plan.device):
            trainer.run_stage(iter([batch] * _WARM_UP_STEPS), _WARM_UP_STEPS, lambda batch: None)
            barrier.wait(timeout=_TIMEOUT_S)
            stats = trainer.run_stage(iter([batch] * _TIMED_STEPS), _TIMED_STEPS, lambda batch: None)
        assert stats is not None
        results.put(stats.samples_per_second)
    except Exception as error:  # it is the parent who raises
        barrier.abort()
        kind = OutOfMemoryError if ran_out_of_memory(error) else type(error)  # of which there are several types
        results.put(f"{kind.__name__}: {error}")
