"""Slots of a sweep: how many trials run side by side, and what each gets of the machine."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fashionclip_tune.errors import UserError
from fashionclip_tune.machine.hardware import available_cores


@dataclass(frozen=True)
class Slots:
    """Trials side by side and each one's share; requests never exceed what exists, so nothing waits for ever."""

    count: int
    cpus_per_trial: float
    gpus_per_trial: float
    """The smallest share, where trials have shares of their own."""
    num_gpus: int = 0
    """Of this machine; none on a CPU, and none of our business on a cluster."""

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus_per_trial))


def plan_slots(
    *,
    device: str,
    num_trials: int,
    max_concurrent: int | None,
    gpus_per_trial: float | None,
    num_gpus: int = 1,
    side_by_side: int = 1,
    cores: int | None = None,
) -> Slots:
    """On a CPU a slot a core, on GPUs as many as fit, and a third of the trials at most.

    Trials that start together know nothing of each other's results: with all of them at once nothing would be searched.

    Args:
        gpus_per_trial: given, it decides; else ``side_by_side``, the trials that fit one card by their memory.

    Raises:
        UserError: a share outside (0, 1], or no trial at a time.
    """
    _check_shares(max_concurrent, gpus_per_trial)
    cores = cores or available_cores()
    searching = max(2, math.ceil(num_trials / 3))
    if device == "cpu":
        gpu_share, limit = 0.0, min(cores, searching)
    else:
        gpu_share = gpus_per_trial if gpus_per_trial is not None else 1 / side_by_side
        fitting = num_gpus * int(1 / gpu_share)
        limit = min(fitting, max(searching, num_gpus))
        max_concurrent = min(max_concurrent or limit, fitting)
    count = min(max_concurrent or limit, num_trials)
    return Slots(count, cores / count if count <= cores else 1.0, gpu_share, 0 if device == "cpu" else num_gpus)


def _check_shares(max_concurrent: int | None, gpus_per_trial: float | None) -> None:
    if max_concurrent is not None and max_concurrent < 1:
        raise UserError(f"--max-concurrent {max_concurrent} is not allowed: at least 1")
    if gpus_per_trial is not None and not 0 < gpus_per_trial <= 1:
        raise UserError(f"--gpus-per-trial {gpus_per_trial:g} is not allowed: above 0, at most 1 (a trial runs on one GPU)")


@dataclass(frozen=True)
class Node:
    """A machine of a Ray cluster, as it was told what it has."""

    cpus: int
    gpus: int


def plan_cluster_slots(
    nodes: Sequence[Node], *, device: str, num_trials: int, max_concurrent: int | None, gpus_per_trial: float | None
) -> Slots:
    """As ``plan_slots``, over the machines of a cluster: a trial runs within one of them.

    Raises:
        UserError: a share outside (0, 1], no trial at a time, or no machine for the device.
    """
    _check_shares(max_concurrent, gpus_per_trial)
    share = 0.0 if device == "cpu" else gpus_per_trial or 1.0
    room = [node.cpus if device == "cpu" else min(node.cpus, node.gpus * int(1 / share)) for node in nodes]
    limit = sum(room)
    if not limit:
        raise UserError(f"the cluster has no machine for --device {device}: it has {', '.join(map(str, nodes)) or 'none'}")
    count = min(max_concurrent or limit, limit, num_trials)
    # As many a machine as it has room for, so that the narrowest one decides how many cores each gets.
    used = [(node, min(slots, count)) for node, slots in zip(nodes, room, strict=True) if slots]
    return Slots(count, float(min(node.cpus // slots for node, slots in used)), share)
