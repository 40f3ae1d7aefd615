"""The machine divided among the trials of a sweep: how many at a time, and what a configuration gets."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fashionclip_tune.config import ProjectConfig
from fashionclip_tune.machine import Machine
from fashionclip_tune.tuning.host_memory import HostMemory, check_room, plan_host_memory
from fashionclip_tune.tuning.resources import Share, Slots, plan_slots
from fashionclip_tune.tuning.shares import GB, SMALL_CARD_BYTES, GpuMemory, has_large_token_table

# Batches of several loader processes wait there, beside Ray's object store.
_MIN_SHARED_MEMORY_BYTES = 512 * 10**6
_TABLE = "freeze.token_embedding"


@dataclass(frozen=True)
class Allotment:
    """``slots`` is what all trials have in common, ``share_of`` what one gets."""

    slots: Slots
    machine: Machine
    host: HostMemory | None
    """None: on a cluster, whose machines are not this one."""
    gpu: GpuMemory | None
    """None: on a CPU, or on a cluster."""
    gpus_per_trial: float | None
    """As a flag said."""
    cuts: tuple[str, ...] = ()
    """What was asked for, or would have fitted otherwise, and why it was cut."""

    def at_a_time(self, config: ProjectConfig) -> int:
        """Trials like this one that run side by side, on all cards."""
        if self.gpu is None or self.gpus_per_trial is not None:
            return self.slots.count
        return min(self.slots.count, self.gpu.card.count * self.gpu.side_by_side(config))

    def most_at_a_time(self, configs: Sequence[ProjectConfig]) -> dict[str, int]:
        """By model, where configurations of a model need different shares."""
        most: dict[str, int] = {}
        for config in configs:
            most[config.model_name] = max(most.get(config.model_name, 1), self.at_a_time(config))
        return most

    def share_of(self, config: ProjectConfig) -> Share:
        """What Ray is asked for, and the part of the card that the trial's process keeps to."""
        if self.gpu is None:
            return Share(self.slots.gpus_per_trial, self.slots.cpus_per_trial)
        # A trial that has no neighbour, for whatever reason, has the whole card.
        on_a_card = min(self.gpu.side_by_side(config), math.ceil(self.slots.count / self.gpu.card.count))
        gpus = self.gpus_per_trial if self.gpus_per_trial is not None else 1 / on_a_card
        # Ray counts in ten-thousandths: three thirds must not be more than one.
        gpus = int(10_000 * gpus) / 10_000
        cpus = max(1.0, self.machine.cores / self.at_a_time(config))
        memory_bytes = int(gpus * self.gpu.card.memory_bytes)
        needed_bytes = min(self.gpu.need(config).memory_bytes, memory_bytes)
        return Share(gpus, min(cpus, self.num_cpus), memory_bytes, needed_bytes)

    @property
    def num_cpus(self) -> int:
        """Logical cores that Ray has to give: each trial's share is one at least."""
        return max(1, round(self.slots.count * self.slots.cpus_per_trial))

    def fitted(self, config: ProjectConfig) -> ProjectConfig:
        """With a micro-batch that fits the card, and no more loader processes than cores are left for them."""
        changes: dict[str, object] = {}
        share = self.share_of(config).gpus or 1.0
        if share != config.hardware.device_share:
            changes["hardware.device_share"] = share
        workers = self._workers(config)
        if workers < config.training.num_workers:
            changes["training.num_workers"] = workers
        if self.gpu is not None:
            size = self.gpu.need(config).micro_batch_size
            if size < (config.training.micro_batch_size or config.training.batch_size):
                changes["training.micro_batch_size"] = size
        return config.with_overrides(changes) if changes else config

    def _workers(self, config: ProjectConfig) -> int:
        if self.machine.shared_memory_bytes < _MIN_SHARED_MEMORY_BYTES:
            return 0
        # On a GPU the training itself needs little of a core.
        cpus = self.slots.cpus_per_trial if self.gpu is None else max(1.0, self.machine.cores / self.at_a_time(config))
        return max(0, min(config.training.num_workers, int(cpus) - (config.device == "cpu")))


def allot(
    configs: Sequence[ProjectConfig],
    *,
    device: str,
    machine: Machine,
    gpu: GpuMemory | None,
    num_trials: int,
    max_concurrent: int | None,
    gpus_per_trial: float | None,
) -> Allotment:
    """Divides a machine among trials of such configurations; what does not fit is cut, and said.

    Raises:
        UserError: a flag's value, or a configuration that does not fit at all.
    """
    fitting = max(gpu.side_by_side(config) for config in configs) if gpu is not None and gpus_per_trial is None else 1
    slots = plan_slots(
        device=device,
        num_trials=num_trials,
        max_concurrent=max_concurrent,
        gpus_per_trial=gpus_per_trial,
        num_gpus=gpu.card.count if gpu is not None else 1,
        side_by_side=fitting,
        cores=machine.cores,
    )
    cuts = []
    if max_concurrent is not None and slots.count < min(max_concurrent, num_trials):
        cuts.append(f"--max-concurrent {max_concurrent} to {slots.count}: more do not fit the card")
    workers = min(max(config.training.num_workers for config in configs), int(slots.cpus_per_trial))
    host = plan_host_memory(configs, num_workers=workers if device != "cpu" else max(0, workers - 1))
    check_room(host, machine.memory_bytes)
    if (room := max(1, host.room(machine.memory_bytes))) < slots.count:
        cuts.append(
            f"{slots.count} trials side by side to {room}: they would take {host.total_bytes(slots.count) / GB:.1f} GB of "
            f"{machine.memory_bytes / GB:.1f} GB of host memory"
        )
        slots = Slots(room, machine.cores / room if room <= machine.cores else 1.0, slots.gpus_per_trial, slots.num_gpus)
    if machine.shared_memory_bytes < _MIN_SHARED_MEMORY_BYTES and any(config.training.num_workers for config in configs):
        cuts.append("loader processes to none: /dev/shm is too small (docker: --shm-size=2g)")
    return Allotment(slots, machine, host, gpu, gpus_per_trial, tuple(cuts))


def with_default_freeze(config: ProjectConfig, gpu: GpuMemory | None, given: Mapping[str, object]) -> ProjectConfig:
    """On a small card a large token embedding is frozen, unless a space or ``--set`` speaks of it."""
    if gpu is None or gpu.card.memory_bytes >= SMALL_CARD_BYTES or _TABLE in given or not has_large_token_table(config):
        return config
    return config.with_overrides({_TABLE: True})
