"""What a sweep runs on: this machine with its cards, or a cluster."""

from collections.abc import Sequence
from dataclasses import dataclass

from fashionclip_tune.config import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.machine import Machine, this_machine
from fashionclip_tune.precision import choose_device
from fashionclip_tune.tuning.allotment import Allotment, allot
from fashionclip_tune.tuning.resources import Node, plan_cluster_slots
from fashionclip_tune.tuning.settings import SweepSettings
from fashionclip_tune.tuning.shares import Card, GpuMemory, find_card


@dataclass(frozen=True)
class Site:
    device: str
    """``cpu`` or ``cuda``."""
    gpu: GpuMemory | None
    """Of this machine's cards, or of the one that is planned for; None: on a CPU, or on a cluster."""
    nodes: Sequence[Node] | None
    """Of the cluster; None: this machine."""
    machine: Machine

    def divide(self, configs: Sequence[ProjectConfig], settings: SweepSettings, num_trials: int) -> Allotment:
        """Among trials of such configurations.

        Raises:
            UserError: a flag's value, or a configuration that does not fit at all.
        """
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


def find_site(settings: SweepSettings, nodes: Sequence[Node] | None, *, dry_run: bool, machine: Machine | None = None) -> Site:
    """
    Args:
        nodes: of the cluster that the sweep runs on; None: this machine alone.
        dry_run: ``gpu_memory_gb`` may stand for a card that is not here, and asks for one.
        machine: None: this one.

    Raises:
        UserError: no such device here.
    """
    card = find_card(settings.gpu_memory_gb, may_be_imaginary=dry_run)
    if dry_run and settings.gpu_memory_gb is not None and settings.device == "cpu":
        raise UserError("--gpu-memory-gb with --device cpu is not allowed in a dry run: it plans for a card of that memory")
    device = _device(settings.device or "auto", nodes, card if dry_run and settings.gpu_memory_gb is not None else None)
    gpu = GpuMemory(card, settings.gpus_per_trial) if device == "cuda" and card is not None and nodes is None else None
    return Site(device, gpu, nodes, machine or this_machine())


def _device(wanted: str, nodes: Sequence[Node] | None, imaginary: Card | None) -> str:
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {wanted!r} is not allowed: auto, cpu or cuda (CUDA_VISIBLE_DEVICES chooses GPUs)")
    if nodes is not None and wanted == "auto":
        return "cuda" if any(node.gpus for node in nodes) else "cpu"
    if nodes is not None:
        return wanted
    return "cuda" if imaginary is not None else choose_device(wanted).type
