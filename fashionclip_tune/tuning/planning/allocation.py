"""The machine, or a cluster, divided among the trials of a sweep."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.machine.hardware import Machine, this_machine
from fashionclip_tune.models.precision import choose_device
from fashionclip_tune.profiling.throughput import measured_packing_gain, packing_gain
from fashionclip_tune.tuning.planning.gpu_memory import GB, Card, GpuMemory, HostMemory, check_room, find_card, plan_host_memory
from fashionclip_tune.tuning.planning.settings import SweepSettings
from fashionclip_tune.tuning.planning.slots import Node, Slots, plan_cluster_slots, plan_slots
from fashionclip_tune.tuning.trial import Share

# Batches of several loader processes wait there, beside Ray's object store.
_MIN_SHARED_MEMORY_BYTES = 512 * 10**6


@dataclass(frozen=True)
class ShareGroup:
    """Trials with the same share, of one model or several: how many run side by side, and what they take of the host."""

    count: int
    host: HostMemory
    configs: tuple[ProjectConfig, ...]

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(config.model_name for config in self.configs))

    @property
    def host_bytes(self) -> int:
        return self.host.total_bytes(self.count)


@dataclass(frozen=True)
class Allotment:
    """``slots`` is what all trials have in common, ``share_of`` what one gets."""

    slots: Slots
    machine: Machine
    groups: Mapping[int, ShareGroup]
    """By the trials that fit one card by its memory. Empty: on a cluster, whose machines are not this one."""
    gpu: GpuMemory | None
    """None: on a CPU, or on a cluster."""
    gpus_per_trial: float | None
    """As a flag said."""
    cuts: tuple[str, ...] = ()
    """What was asked for, or would have fitted otherwise, and why it was cut."""

    def at_a_time(self, config: ProjectConfig) -> int:
        """Trials like this one that run side by side, on all cards."""
        if not self.groups:
            return self.slots.count
        fitting = _fitting(config, self.gpu, self.gpus_per_trial)
        # One that was not among the draws that the plan was made for, and needs more memory than they: as the nearest.
        known = max((each for each in self.groups if each <= fitting), default=min(self.groups))
        count = self.groups[known].count
        return count if self.gpu is None or self.gpus_per_trial is not None else min(count, self.gpu.card.count * fitting)

    def most_at_a_time(self, configs: Sequence[ProjectConfig]) -> dict[str, int]:
        """By model, where configurations of a model need different shares."""
        most: dict[str, int] = {}
        for config in configs:
            most[config.model_name] = max(most.get(config.model_name, 1), self.at_a_time(config))
        return most

    @property
    def host_bytes(self) -> int | None:
        """At most: trials with different shares side by side take no more than as many as fit of one kind. None: not known."""
        return max((each.host_bytes for each in self.groups.values()), default=None)

    def share_of(self, config: ProjectConfig) -> Share:
        """What Ray is asked for, and the part of the card that the trial's process keeps to."""
        if self.gpu is None:
            return Share(self.slots.gpus_per_trial, self.slots.cpus_per_trial)
        # A trial that has no neighbour, for whatever reason, has the whole card.
        on_a_card = math.ceil(self.at_a_time(config) / self.gpu.card.count)
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
    cards = gpu.card.count if gpu is not None else 1
    kinds: dict[int, list[ProjectConfig]] = {}
    for config in configs:
        kinds.setdefault(_fitting(config, gpu, gpus_per_trial), []).append(config)
    groups, cut = _divide(kinds, slots.count, machine, cards)
    # Where there is no room for one a card, cards stay empty, whatever runs.
    counts = [each.count for each in groups.values()]
    count = min([max(counts), *(each for each in counts if each < cards)])
    if count < slots.count:
        slots = Slots(count, machine.cores / count if count <= machine.cores else 1.0, slots.gpus_per_trial, slots.num_gpus)
    if machine.shared_memory_bytes < _MIN_SHARED_MEMORY_BYTES and any(config.training.num_workers for config in configs):
        cuts.append("loader processes to none: /dev/shm is too small (docker: --shm-size=2g)")
    return Allotment(slots, machine, groups, gpu, gpus_per_trial, (*cuts, *cut))


def _fitting(config: ProjectConfig, gpu: GpuMemory | None, gpus_per_trial: float | None) -> int:
    """Trials like this one that fit a card by its memory; 0: that decides nothing, and all trials are alike."""
    return gpu.side_by_side(config) if gpu is not None and gpus_per_trial is None else 0


def _divide(
    kinds: Mapping[int, Sequence[ProjectConfig]], at_most: int, machine: Machine, cards: int
) -> tuple[dict[int, ShareGroup], list[str]]:
    """Those that fit a card equally often get as many trials side by side as that, and as the host has memory for.

    As many as another kind have the same share, and so the same processes, which then keep the weights of all their models.
    """
    by_count: dict[int, list[int]] = {}
    for fitting in kinds:
        by_count.setdefault(min(at_most, cards * fitting) if fitting else at_most, []).append(fitting)
    groups: dict[int, ShareGroup] = {}
    cuts = []
    while by_count:
        count = max(by_count)
        fittings = by_count.pop(count)
        found = _that_fit([config for fitting in fittings for config in kinds[fitting]], count, machine, cards)
        if found.count == count:
            groups |= dict.fromkeys(fittings, found)
            continue
        needed = plan_host_memory(found.configs, cores=max(1.0, machine.cores / count)).total_bytes(count)
        cuts.append(
            f"{', '.join(found.models)}: {count} trials side by side to {found.count}: they would take {needed / GB:.1f} GB of "
            f"{machine.memory_bytes / GB:.1f} GB of host memory"
        )
        by_count[found.count] = fittings + by_count.get(found.count, [])
    return groups, cuts


def _that_fit(configs: Sequence[ProjectConfig], wanted: int, machine: Machine, cards: int) -> ShareGroup:
    """As many of the wanted trials as the host has memory for, equally many on each card."""

    def host(count: int) -> HostMemory:
        return plan_host_memory(configs, cores=max(1.0, machine.cores / count))

    check_room(host(1), machine.memory_bytes)
    counts = [count for count in range(wanted, 0, -1) if count <= cards or count == wanted or count % cards == 0]
    count = next((count for count in counts if host(count).room(machine.memory_bytes) >= count), 1)
    return ShareGroup(count, host(count), tuple(configs))


@dataclass(frozen=True)
class Site:
    device: str
    """``cpu`` or ``cuda``."""
    gpu: GpuMemory | None
    """Of this machine's cards, or of the one that is planned for; None: on a CPU, or on a cluster."""
    nodes: Sequence[Node] | None
    """Of the cluster; None: this machine."""
    machine: Machine
    measure_gain: Callable[[ProjectConfig], float | None] | None = None
    """What two trials of a configuration gain side by side; None: by what is known."""

    def divide(self, configs: Sequence[ProjectConfig], settings: SweepSettings, num_trials: int) -> Allotment:
        """Among trials of such configurations.

        Raises:
            UserError: a flag's value, or a configuration that does not fit at all.
        """
        if self.gpu is not None and num_trials > 1:
            self.gpu.learn_gains(configs, self.measure_gain)
        if self.nodes is None:
            return allot(
                configs,
                device=self.device,
                machine=self.machine,
                gpu=self.gpu,
                num_trials=num_trials,
                max_concurrent=settings.max_concurrent,
                gpus_per_trial=settings.gpus_per_trial,
            )
        slots = plan_cluster_slots(
            self.nodes,
            device=self.device,
            num_trials=num_trials,
            max_concurrent=settings.max_concurrent,
            gpus_per_trial=settings.gpus_per_trial,
        )
        return Allotment(slots, self.machine, {}, None, settings.gpus_per_trial)


def find_site(
    settings: SweepSettings,
    nodes: Sequence[Node] | None,
    *,
    dry_run: bool,
    machine: Machine | None = None,
    begun: Mapping[str, Any] | None = None,
) -> Site:
    """
    Args:
        nodes: of the cluster that the sweep runs on; None: this machine alone.
        dry_run: ``gpu_memory_gb`` may stand for a card that is not here, and asks for one.
        machine: None: this one.
        begun: the stored content of a sweep that goes on; one that is over measures nothing.

    Raises:
        UserError: no such device here.
    """
    only_look = dry_run or (begun is not None and begun.get("state") == "FINISHED")
    card = find_card(settings.gpu_memory_gb, may_be_imaginary=dry_run)
    if dry_run and settings.gpu_memory_gb is not None and settings.device == "cpu":
        raise UserError("--gpu-memory-gb with --device cpu is not allowed in a dry run: it plans for a card of that memory")
    device = _device(settings.device or "auto", nodes, card if dry_run and settings.gpu_memory_gb is not None else None)
    is_said = settings.max_concurrent is not None or settings.gpus_per_trial is not None
    gpu = None
    if device == "cuda" and card is not None and nodes is None:
        gpu = GpuMemory(card, settings.gpus_per_trial, packing=_by_memory_alone if is_said else packing_gain)
    return Site(device, gpu, nodes, machine or this_machine(), None if is_said or only_look else measured_packing_gain)


def _by_memory_alone(config: ProjectConfig) -> None:
    """Where a flag says how many trials share a card, it does so whatever they gain."""


def _device(wanted: str, nodes: Sequence[Node] | None, imaginary: Card | None) -> str:
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {wanted!r} is not allowed: auto, cpu or cuda (CUDA_VISIBLE_DEVICES chooses GPUs)")
    if nodes is not None and wanted == "auto":
        return "cuda" if any(node.gpus for node in nodes) else "cpu"
    if nodes is not None:
        return wanted
    return "cuda" if imaginary is not None else choose_device(wanted).type
