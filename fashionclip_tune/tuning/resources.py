"""Slots of a sweep: how many trials run side by side, and what each gets of the machine."""

import math
import os
from dataclasses import dataclass

import torch

from fashionclip_tune.errors import UserError


@dataclass(frozen=True)
class Slots:
    """Trials side by side and each one's share; requests never exceed what exists, so nothing waits for ever."""

    count: int
    cpus_per_trial: float
    gpus_per_trial: float

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus_per_trial))


def plan_slots(*, device: str, num_trials: int, max_concurrent: int | None, gpus_per_trial: float | None) -> Slots:
    """On a CPU a slot a core, but a third of the trials at most; on GPUs as many as their fractions allow.

    Trials that start together know nothing of each other's results: with all of them at once nothing would be searched.

    Raises:
        UserError: a share outside (0, 1], or no trial at a time.
    """
    if max_concurrent is not None and max_concurrent < 1:
        raise UserError(f"--max-concurrent {max_concurrent} is not allowed: at least 1")
    if gpus_per_trial is not None and not 0 < gpus_per_trial <= 1:
        raise UserError(f"--gpus-per-trial {gpus_per_trial:g} is not allowed: above 0, at most 1 (a trial runs on one GPU)")
    cores = available_cores()
    if device == "cpu":
        gpu_share, limit = 0.0, min(cores, max(2, math.ceil(num_trials / 3)))
    else:
        gpu_share = gpus_per_trial if gpus_per_trial is not None else 1.0
        limit = torch.cuda.device_count() * int(1 / gpu_share)
        max_concurrent = min(max_concurrent or limit, limit)
    count = min(max_concurrent or limit, num_trials)
    return Slots(count, cores / count if count <= cores else 1.0, gpu_share)


def available_cores() -> int:
    """Cores that this process may run on: a container often has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
