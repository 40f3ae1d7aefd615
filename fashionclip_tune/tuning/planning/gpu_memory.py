"""How much of a card, and of the host's memory, each configuration needs, and so how many trials fit side by side."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from fashionclip_tune.config.choices import BatchNorms, Precision
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.architecture import has_known_text_tower, meta_model, planned_network
from fashionclip_tune.models.batch_norms import needs_one_pass
from fashionclip_tune.models.precision import plan_precision
from fashionclip_tune.models.starts import check_architecture
from fashionclip_tune.models.token_rows import USUAL_ROWS
from fashionclip_tune.profiling.memory import estimate_memory
from fashionclip_tune.profiling.probe import known_peak
from fashionclip_tune.profiling.throughput import packing_gain

OBJECT_STORE_BYTES = 256 * 2**20
# Measured on Linux with torch 2.14 on a CPU: driver 0.94 GB, a trial's process 1.18 GB with a tiny model in it, its fork server
# 0.38 GB, and a loader process 0.06 GB beside what it shares with that one; of their 0.7 GB and 0.45 GB the rest is the
# libraries' files, which the trial's process has, too. What CUDA's libraries add on the host, and Ray's own processes, are
# estimates.
_DRIVER_BYTES = 10**9
_RAY_BYTES = 400 * 10**6
_PROCESS_BYTES = {"cpu": 1_200 * 10**6, "cuda": 2_200 * 10**6}
_FORK_SERVER_BYTES, _WORKER_BYTES = 400 * 10**6, 100 * 10**6
# Batches of one loader process: two that wait, torch's default, and the one that it makes.
_BATCHES = 3
_CANVAS_AREA = 2**2  # of a photo that a loader process hands on, of what the model sees, at most
_MODELS_KEPT = 3  # by model._load_cached
# The rest is the system's, its file cache's, and what other programs take: of 12.7 GB at most 9.9 are planned for.
_USABLE = 0.78


@dataclass(frozen=True)
class HostMemory:
    """Bytes of host memory at the peak of a sweep, by what holds them."""

    shared_bytes: int
    """Driver, Ray and its object store."""
    trial_bytes: int
    """Process, weights that it keeps in memory, the copy that a checkpoint is written from."""
    worker_bytes: int
    """Of a trial's loader processes, the server that they are forked from, and the batches that wait."""

    def total_bytes(self, count: int) -> int:
        return self.shared_bytes + count * (self.trial_bytes + self.worker_bytes)

    def room(self, memory_bytes: int) -> int:
        """Trials side by side that fit."""
        return int((_USABLE * memory_bytes - self.shared_bytes) // (self.trial_bytes + self.worker_bytes))


def plan_host_memory(configs: Sequence[ProjectConfig], *, cores: float) -> HostMemory:
    """For trials that may be of any of these models, on one process each, which they share one after the other.

    Ray hands a process on to trials with the same share only.

    Args:
        cores: of each trial; loader processes are cut to them.
    """
    by_model = {config.model_name: config for config in configs}
    sizes = sorted((weights_bytes(config) for config in by_model.values()), reverse=True)
    device = next(iter(by_model.values())).device.partition(":")[0]
    num_workers = min(max(config.training.num_workers for config in configs), int(cores) - (device == "cpu"))
    photos_bytes = [3 * _CANVAS_AREA * photo_side(each.model_name) ** 2 * each.training.batch_size for each in configs]
    batches_bytes = _BATCHES * max(photos_bytes)
    kept = sum(sizes[:_MODELS_KEPT])
    copies = sizes[0]  # of the weights, made to load a model or to write a checkpoint
    copies += sizes[0] if device == "cpu" else 0  # the model itself is on the card otherwise
    copies += 3 * sizes[0] if device == "cpu" else 0  # gradients and Adam's moments
    return HostMemory(
        _DRIVER_BYTES + _RAY_BYTES + OBJECT_STORE_BYTES,
        _PROCESS_BYTES[device] + kept + copies,
        _FORK_SERVER_BYTES + num_workers * (_WORKER_BYTES + batches_bytes) if num_workers > 0 else 0,
    )


def photo_side(name: str) -> int:
    """Of the square that a model sees, whoever describes its text tower."""
    size = check_architecture(name)["vision_cfg"].get("image_size", 224)
    return size if isinstance(size, int) else int(max(size))


def check_room(memory: HostMemory, memory_bytes: int) -> None:
    """Raises UserError where even one trial at a time is more than the machine has at all."""
    if memory.total_bytes(1) > memory_bytes:
        raise UserError(
            f"a trial of this space needs {memory.total_bytes(1) / GB:.1f} GB of host memory, this machine has "
            f"{memory_bytes / GB:.1f}: choose smaller models, e.g. --set clip_model=ViT-B-32"
        )


GB = 10**9
# Below it two trials side by side are no gain over one after the other, and each may run out of memory.
MIN_PACKING_GAIN = 0.10


@dataclass(frozen=True)
class Card:
    """The GPUs of this machine, which are taken to be alike: the smallest one's memory counts."""

    name: str
    memory_bytes: int
    count: int = 1
    is_here: bool = True
    """Else it is planned for only."""


@dataclass(frozen=True)
class Need:
    """GPU memory of a trial, the micro-batch with which it fits, and where the figure comes from."""

    memory_bytes: int
    micro_batch_size: int
    source: str
    """``measured`` by probe on this card, or ``estimate``."""


def find_card(gpu_memory_gb: float | None, *, may_be_imaginary: bool) -> Card | None:
    """The GPUs that torch sees, taken for at most ``gpu_memory_gb`` each; None where there is none.

    Args:
        may_be_imaginary: to plan on another machine: ``gpu_memory_gb`` stands for a card that is not here.
    """
    limit = math.inf if gpu_memory_gb is None else gpu_memory_gb * GB
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        smallest = min(found, key=lambda each: int(each.total_memory))
        return Card(smallest.name, int(min(limit, smallest.total_memory)), len(found))
    if may_be_imaginary and gpu_memory_gb is not None:
        return Card("a card that is not here", int(limit), is_here=False)
    return None


class GpuMemory:
    """How much of a card's memory each configuration needs; equal ones are estimated once."""

    def __init__(
        self, card: Card, share: float | None = None, *, packing: Callable[[ProjectConfig], float | None] = packing_gain
    ) -> None:
        """
        Args:
            share: of the card, that a flag gives to each trial; None: up to the whole card.
        """
        self.card = card
        self.clip_rows = USUAL_ROWS
        """Of the captions, as for ``planned_network``; to be set before a need is asked for."""
        self.share = share
        self._room_bytes = int(card.memory_bytes * (share or 1.0))
        self._packing = packing
        self._needs: dict[Any, Need] = {}
        self._gains: dict[str, float | None] = {}

    def need(self, config: ProjectConfig) -> Need:
        """The memory of a trial with the largest micro-batch, halved from the configured one, that its share of the card holds.

        Raises:
            UserError: one photo at a time is too much.
        """
        key = _memory_settings(config)
        if key not in self._needs:
            self._needs[key] = self._largest(config) if is_described_here(config) else self._whole(config)
        return self._needs[key]

    def side_by_side(self, config: ProjectConfig) -> int:
        """Trials like this one that share a card: as many as fit, or one where two gain too little."""
        gain = self.packing_gain(config)
        return 1 if gain is not None and gain < MIN_PACKING_GAIN else self._room(config)

    def packing_gain(self, config: ProjectConfig) -> float | None:
        """What two at a time finish more of than one after the other, as a share; None: not known, or there is room for one."""
        if self._room(config) == 1:
            return None
        gain = self._packing(config)
        return self._gains.get(config.model_name) if gain is None else gain

    def learn_gains(
        self, configs: Sequence[ProjectConfig], measure: Callable[[ProjectConfig], float | None] | None = None
    ) -> None:
        """Of each model of which two trials fit: what is known of any of its configurations holds for the others.

        Args:
            measure: what is known of none; once for a model.
        """
        models = dict.fromkeys(config.model_name for config in configs if self._room(config) > 1)
        for model in (name for name in models if name not in self._gains):
            fitting = [config for config in configs if config.model_name == model and self._room(config) > 1]
            known = (gain for config in fitting if (gain := self._packing(config)) is not None)
            if (gain := next(known, None)) is None and measure is not None:
                first = fitting[0]
                gain = measure(first.with_overrides({"training.micro_batch_size": self.need(first).micro_batch_size}))
            self._gains[model] = gain

    def _room(self, config: ProjectConfig) -> int:
        return max(1, int(self.card.memory_bytes // self.need(config).memory_bytes))

    def _whole(self, config: ProjectConfig) -> Need:
        """A text tower that only the hub describes cannot be sized: such a trial has a card alone."""
        return Need(self._room_bytes, config.training.micro_batch_size or config.training.batch_size, "not known")

    def _largest(self, config: ProjectConfig) -> Need:
        size = min(config.training.micro_batch_size or config.training.batch_size, config.training.batch_size)
        while True:
            at_size = config.with_overrides({"training.micro_batch_size": size})
            measured = known_peak(at_size)
            needed = measured if measured is not None else _estimate_bytes(at_size, self.clip_rows)
            if needed <= self._room_bytes:
                return Need(needed, size, "measured" if measured is not None else "estimate")
            if size == 1 or _needs_one_pass(config):
                raise self._refusal(config, size, needed)
            size = (size + 1) // 2

    def _refusal(self, config: ProjectConfig, size: int, needed: int) -> UserError:
        allowed, cure = f"the card has {self.card.memory_bytes / GB:.1f}", ""
        if self.share is not None:
            allowed = f"--gpus-per-trial {self.share:g} allows {self._room_bytes / GB:.1f} of the card's"
            allowed, cure = f"{allowed} {self.card.memory_bytes / GB:.1f}", "give a larger share or none, "
        needs = f"{config.model_name} needs {needed / GB:.1f} GB of GPU memory for one photo at a time"
        if size > 1:
            needs = f"{config.model_name} needs {needed / GB:.1f} GB of GPU memory for the {size} photos of a batch"
            cure = f"set model.batch_norm=fixed (with update it cannot be cut), {cure}"
        return UserError(
            f"{needs}, {allowed}: {cure}freeze a "
            "part of it (--set freeze.text_tower=true, freeze.image_blocks), or leave it out of the space"
        )


def _memory_settings(config: ProjectConfig) -> tuple[Any, ...]:
    training, hardware = config.training, config.hardware
    settings = (training.batch_size, training.micro_batch_size, hardware.gradient_checkpointing, hardware.precision)
    model = (config.model_name, config.model.patch_dropout, config.model.batch_norm)
    return (*model, *settings, config.freeze, config.optimizer.ema_decay is None, training.edition)


def _needs_one_pass(config: ProjectConfig) -> bool:
    return config.model.batch_norm is BatchNorms.UPDATE and needs_one_pass(planned_network(config), config)


def _estimate_bytes(config: ProjectConfig, clip_rows: int) -> int:
    # Without patch dropout: an upper bound, whatever it drops.
    network = planned_network(config.with_overrides({"model.patch_dropout": 0.0}), clip_rows)
    assert config.training.micro_batch_size is not None
    estimate = estimate_memory(
        network,
        batch_size=config.training.batch_size,
        micro_batch_size=config.training.micro_batch_size,
        autocast_dtype=autocast_dtype(config),
        gradient_checkpointing=config.hardware.gradient_checkpointing,
        averages_weights=config.optimizer.ema_decay is not None,
    )
    return estimate.total_bytes


def autocast_dtype(config: ProjectConfig) -> torch.dtype | None:
    """Of the card that is here, else of a T4's: bf16 takes as much."""
    if torch.cuda.is_available():
        return plan_precision(config).autocast_dtype
    return None if config.hardware.precision is Precision.FP32 else torch.float16


def is_described_here(config: ProjectConfig) -> bool:
    """Whether the architecture can be built without the hub."""
    return has_known_text_tower(check_architecture(config.model_name))


def weights_bytes(config: ProjectConfig) -> int:
    """Of the model, in fp32; 2 GB where only the hub knows its text tower."""
    if not is_described_here(config):
        return 2 * GB
    return _weights_bytes(config.model_name)


@cache
def _weights_bytes(name: str) -> int:
    network = meta_model(name)
    return sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))
