"""What this machine is, gathered once: the driver, torch, cores, memory, disks, packages. ``doctor`` judges it."""

import fcntl
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from fashionclip_tune.machine.hardware import Machine, cuda_of_driver, this_machine

PACKAGES = ("torch", "torchvision", "open_clip_torch", "ray", "optuna", "transformers", "webdataset", "safetensors")
_MOUNT_TIMEOUT_S = 10.0
_DRIVER_PROC = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int
    has_bf16: bool
    """In hardware: torch emulates it before Ampere, slower than fp32."""


@dataclass(frozen=True)
class Mount:
    """What a folder's file system can do, tried in a file of our own. None: it could not be found out in ten seconds."""

    path: str
    purpose: str
    is_writable: bool
    free_bytes: int = 0
    fsync_s: float | None = None
    renames: bool | None = None
    locks: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that ``judge`` goes by; tests make their own."""

    machine: Machine
    python: str
    packages: Mapping[str, str | None]
    cuda_of_torch: str | None
    """The CUDA version that torch was built for; None: a build for CPUs."""
    driver: str | None
    cuda_of_driver: tuple[int, int] | None
    """The newest CUDA version that the driver can run."""
    system_gpus: tuple[str, ...]
    """As the system shows them, whatever torch sees."""
    gpus: tuple[Gpu, ...]
    """As torch sees them."""
    mounts: tuple[Mount, ...] = ()
    leftovers: Mapping[str, int] = field(default_factory=dict)
    """Folders of sweeps in the scratch folder of which no process runs here, with their bytes."""


def gather(folders: Mapping[str, Path]) -> Facts:
    """Looks at this machine; ``folders`` by purpose, such as ``{"results": Path("results")}``, need not exist yet."""
    system_gpus, driver = _nvidia_smi()
    return Facts(
        machine=this_machine(),
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        cuda_of_torch=torch.version.cuda,
        driver=driver,
        cuda_of_driver=(number // 1000, number % 1000 // 10) if (number := cuda_of_driver()) is not None else None,
        system_gpus=system_gpus,
        gpus=_torch_gpus(),
        mounts=tuple(look_at_mount(path, purpose) for purpose, path in folders.items()),
        leftovers=_leftovers(folders["scratch"]) if "scratch" in folders else {},
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nvidia_smi() -> tuple[tuple[str, ...], str | None]:
    """Names of the GPUs and the driver's version, without torch."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            lines = [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 1]
            if done.returncode == 0 and lines:
                return tuple(name for name, _ in lines), lines[0][1]
        except (OSError, subprocess.TimeoutExpired):
            pass  # a driver that hangs: what the kernel shows has to do
    found = tuple(f"/dev/{path.name}" for path in sorted(Path("/dev").glob("nvidia[0-9]*")))
    shown = _DRIVER_PROC.read_text() if _DRIVER_PROC.exists() else ""
    driver = re.search(r"Module\s+(?:for \S+\s+)?(\d+\.[\d.]+)", shown)
    return found, driver[1] if driver else None


def _torch_gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return ()
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return tuple(Gpu(card.name, int(card.total_memory), has_bf16) for card in found)


def look_at_mount(path: Path, purpose: str, timeout_s: float = _MOUNT_TIMEOUT_S) -> Mount:
    """Writes, syncs, renames and locks a small file in the nearest folder that exists; gives up on a mount that hangs."""
    found: list[Mount] = []
    # To ask whether a folder exists hangs there, too.
    thread = threading.Thread(target=lambda: found.append(_try(path.absolute(), purpose)), daemon=True)
    thread.start()
    thread.join(timeout_s)
    return found[0] if found else Mount(str(path.absolute()), purpose, is_writable=True)


def _synced_write_s(file: Path) -> float:
    started = time.perf_counter()
    with open(file, "wb") as opened:
        opened.write(b"0" * 4096)
        opened.flush()
        os.fsync(opened.fileno())
    return time.perf_counter() - started


def _try(folder: Path, purpose: str) -> Mount:
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        free_bytes = shutil.disk_usage(folder).free
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as inside:
            file = Path(inside) / "written"
            return Mount(
                str(folder),
                purpose,
                is_writable=True,
                free_bytes=free_bytes,
                fsync_s=min(_synced_write_s(file) for _ in range(3)),  # one may have waited for what others write
                renames=_succeeds(lambda: file.replace(file.with_name("renamed"))),
                locks=_succeeds(lambda: _lock(Path(inside) / "lock")),
            )
    except OSError:
        return Mount(str(folder), purpose, is_writable=False)


def _lock(path: Path) -> None:
    """As FileLock does it, which where the mount knows no locks would quietly go on with a file that a kill leaves behind."""
    with open(path, "wb") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _leftovers(scratch: Path) -> dict[str, int]:
    """Those that neither a driver nor a trial's worker has locked."""
    found = {}
    for folder in sorted(scratch.absolute().glob("sweeps/*")):
        locks = [folder / ".lock", *folder.glob("trials/*/.lock")]
        if not any(_is_held(lock) for lock in locks if lock.exists()):
            found[str(folder)] = sum(map(_num_bytes, folder.rglob("*")))
    return found


def _num_bytes(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # just removed
        return 0


def _is_held(lock: Path) -> bool:
    try:
        with FileLock(lock, timeout=0):
            return False
    except (Timeout, OSError):
        return True


def _succeeds(action: Callable[[], object]) -> bool:
    try:
        action()
    except (OSError, NotImplementedError):
        return False
    return True


def folders_of(results: str, scratch: str | None) -> dict[str, Path]:
    """The local folders of a sweep, by purpose."""
    named = {"results": results, "scratch": scratch}
    return {purpose: Path(path) for purpose, path in named.items() if path and "://" not in path}
