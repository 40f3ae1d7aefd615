"""What the machine has: cores, memory, shared memory, of which a container often has less than its host; the GPU's driver."""

import ctypes
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Machine:
    """Of this process: its cores, and bytes of host memory and of ``/dev/shm``."""

    cores: int
    memory_bytes: int
    shared_memory_bytes: int


def this_machine() -> Machine:
    return Machine(available_cores(), memory_limit_bytes(), shared_memory_bytes())


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit_bytes(cgroup_limits: tuple[str, ...] = _CGROUP_LIMITS) -> int:
    """Host memory, or the container's limit where that is less."""
    total: int = psutil.virtual_memory().total
    for path in map(Path, cgroup_limits):
        if path.is_file() and (text := path.read_text().strip()).isdigit():  # "max": no limit
            total = min(total, int(text))
    return total


def cuda_of_driver() -> int | None:
    """The newest CUDA version that the GPU's driver can run, as CUDA writes it: 12040 is 12.4; None: there is no driver.

    From the driver's own library. torch has no public function for it, and a private one that not every version has.
    """
    number = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):  # no such library, or one without this function
        return None
    return number.value if status == 0 else None


def shared_memory_bytes() -> int:
    """Size of ``/dev/shm``, through which loader processes hand over their batches; 0 where there is none."""
    return shutil.disk_usage(_SHARED_MEMORY).total if _SHARED_MEMORY.is_dir() else 0
