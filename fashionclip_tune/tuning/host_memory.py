"""Host memory of a sweep, planned like the card's: what each process holds, and how many trials that leaves room for."""

from collections.abc import Sequence
from dataclasses import dataclass

from fashionclip_tune.config import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.tuning.shares import GB, weights_bytes

OBJECT_STORE_BYTES = 256 * 2**20
# Measured on Linux with torch 2.14 on a CPU: driver 0.94 GB, a trial's process 1.18 GB with a tiny model in it. What CUDA's
# libraries add on the host, Ray's own processes and a loader process are estimates.
_DRIVER_BYTES = 10**9
_RAY_BYTES = 400 * 10**6
_PROCESS_BYTES = {"cpu": 1_200 * 10**6, "cuda": 2_200 * 10**6}
_WORKER_BYTES = 300 * 10**6
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
    """Of a trial's loader processes."""

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
    kept = sum(sizes[:_MODELS_KEPT])
    copies = sizes[0]  # of the weights, made to load a model or to write a checkpoint
    copies += sizes[0] if device == "cpu" else 0  # the model itself is on the card otherwise
    copies += 3 * sizes[0] if device == "cpu" else 0  # gradients and Adam's moments
    return HostMemory(
        _DRIVER_BYTES + _RAY_BYTES + OBJECT_STORE_BYTES,
        _PROCESS_BYTES[device] + kept + copies,
        num_workers * _WORKER_BYTES,
    )


def check_room(memory: HostMemory, memory_bytes: int) -> None:
    """Raises UserError where even one trial at a time is more than the machine has at all."""
    if memory.total_bytes(1) > memory_bytes:
        raise UserError(
            f"a trial of this space needs {memory.total_bytes(1) / GB:.1f} GB of host memory, this machine has "
            f"{memory_bytes / GB:.1f}: choose smaller models, e.g. --set clip_model=ViT-B-32"
        )
