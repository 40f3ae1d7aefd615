"""What is wrong with a machine, and what to do about it. ``judge`` is a function of the facts alone."""

from dataclasses import dataclass
from enum import Enum

from fashionclip_tune.errors import module_command
from fashionclip_tune.machine.facts import Facts, Gpu, Mount

GB = 10**9
_LOADERS_SHARED_BYTES = 512 * 10**6
_MIN_FREE_BYTES = {"results": 8 * GB, "scratch": 20 * GB}
_SLOW_FSYNC_S = 0.2
_MIN_HOST_BYTES = 6 * GB
_INSTALL_CUDA_12 = module_command("pip", "install", "--upgrade", "torch>=2.4,<2.9", "torchvision")


class Level(str, Enum):
    OK = "ok"
    WARNING = "warning"  # it will work, but worse
    PROBLEM = "problem"  # nothing is started


@dataclass(frozen=True)
class Finding:
    level: Level
    about: str
    text: str


def judge(facts: Facts, *, device: str = "auto") -> list[Finding]:
    """A finding for each thing looked at, problems with what solves them. ``device``: as for a sweep."""
    return [
        *_judge_gpu(facts, device),
        *_judge_host(facts),
        *(finding for mount in facts.mounts for finding in _judge_mount(mount, alone=len(facts.mounts) == 1)),
        *_judge_leftovers(facts),
        *_judge_packages(facts),
    ]


def lines(findings: list[Finding]) -> list[str]:
    return [f"{finding.level.value:<8} {finding.about:<9} {finding.text}" for finding in findings]


def problems(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level is Level.PROBLEM]


def _judge_gpu(facts: Facts, device: str) -> list[Finding]:
    cuda = f"CUDA {facts.cuda_of_torch}" if facts.cuda_of_torch else "CPUs only"
    built_for = f"torch {facts.packages.get('torch')} is built for {cuda}"
    if device == "cpu":
        return [Finding(Level.OK, "GPU", "not asked for: --device cpu")]
    if facts.gpus:
        driver = f"driver {facts.driver or 'not known'}; {built_for}"
        return [Finding(Level.OK, "GPU", f"{', '.join(map(_described, facts.gpus))}; {driver}")]
    if facts.system_gpus:
        seen = f"the system has {', '.join(facts.system_gpus)} (driver {facts.driver or 'not known'}), torch sees none"
        return [Finding(Level.PROBLEM, "GPU", f"{seen}: {built_for}. {_cure(facts)}; or go without it: --device cpu")]
    if device == "cuda":
        return [Finding(Level.PROBLEM, "GPU", f"--device cuda, and there is none; {built_for}: use --device cpu")]
    return [Finding(Level.OK, "GPU", f"none: a sweep runs on the CPU; {built_for}")]


def _described(gpu: Gpu) -> str:
    precision = "bf16" if gpu.has_bf16 else "no bf16 in hardware, so fp16 with loss scaling"
    return f"{gpu.name}, {gpu.memory_bytes / 2**30:.1f} GiB, {precision}"


def _cure(facts: Facts) -> str:
    """The command that makes torch see the GPU."""
    built, driven = facts.cuda_of_torch, facts.cuda_of_driver
    if built is not None and driven is not None and int(built.split(".")[0]) <= driven[0]:
        return "The driver is new enough: see that no GPU is hidden (unset CUDA_VISIBLE_DEVICES)"
    if facts.cuda_of_driver is not None and facts.cuda_of_driver[0] < 12:
        major, minor = facts.cuda_of_driver
        return f"The driver knows CUDA {major}.{minor} at most, older than what torch 2.4 and later are built for: update it"
    # The default builds up to 2.8 are for CUDA 12, which any driver of CUDA 12 runs, whatever the minor version.
    return f"Install a torch that was built for CUDA 12: {_INSTALL_CUDA_12}"


def _judge_host(facts: Facts) -> list[Finding]:
    machine = facts.machine
    memory, shared = machine.memory_bytes, machine.shared_memory_bytes
    too_little = "too little for loader processes, sweeps go without (docker: --shm-size=2g)"
    return [
        Finding(Level.OK, "cores", f"{machine.cores} for this process: trials and loader workers are cut to them"),
        _enough("memory", f"{memory / GB:.1f} GB on the host", memory >= _MIN_HOST_BYTES, "tiny models only"),
        _enough("/dev/shm", f"{shared / GB:.2f} GB", shared >= _LOADERS_SHARED_BYTES, too_little),
    ]


def _enough(about: str, text: str, is_enough: bool, otherwise: str) -> Finding:
    return Finding(Level.OK, about, text) if is_enough else Finding(Level.WARNING, about, f"{text}: {otherwise}")


def _judge_mount(mount: Mount, *, alone: bool) -> list[Finding]:
    where = mount.path
    if not mount.is_writable:
        return [Finding(Level.PROBLEM, mount.purpose, f"{where} cannot be written to: choose another --{mount.purpose}")]
    if mount.fsync_s is None:
        return [Finding(Level.PROBLEM, mount.purpose, f"{where} does not answer: mount it again, or choose --{mount.purpose}")]
    least = _MIN_FREE_BYTES[mount.purpose]
    text = f"{where}: {mount.free_bytes / GB:.1f} GB free, a synced write takes {1000 * mount.fsync_s:.0f} ms"
    lacks = [what for what, there in (("rename", mount.renames), ("locks", mount.locks)) if not there]
    if lacks:
        text += f"; no {' or '.join(lacks)}"
    is_weak = bool(lacks) or mount.fsync_s > _SLOW_FSYNC_S
    if is_weak and mount.purpose == "scratch":
        return [Finding(Level.PROBLEM, mount.purpose, f"{text}: give --scratch a folder on a local disk")]
    if is_weak and alone:
        return [Finding(Level.WARNING, mount.purpose, f"{text}: a slow or remote mount; add --scratch with a local folder")]
    if mount.free_bytes < least:
        return [Finding(Level.WARNING, mount.purpose, f"{text}: {least / GB:.0f} GB are better for three large models")]
    return [Finding(Level.OK, mount.purpose, text)]


def judge_object_store(address: str) -> Finding:
    """Nothing is written there to find out."""
    return Finding(Level.OK, "results", f"{address}: object storage, not looked at; a sweep runs in --scratch, a local folder")


def _judge_leftovers(facts: Facts) -> list[Finding]:
    if not facts.leftovers:
        return []
    found = ", ".join(f"{path} ({num_bytes / GB:.2f} GB)" for path, num_bytes in facts.leftovers.items())
    text = f"left by sweeps that nothing runs here now: {found}; --results has what it takes to go on, so they may be removed"
    return [Finding(Level.OK, "scratch", text)]


def _judge_packages(facts: Facts) -> list[Finding]:
    there = ", ".join(f"{name} {found}" for name, found in facts.packages.items() if found is not None)
    missing = [name for name, found in facts.packages.items() if found is None]
    findings = [Finding(Level.OK, "versions", f"Python {facts.python}, {there}")]
    if missing:
        install = module_command("pip", "install", "-e", ".")
        findings.append(Finding(Level.PROBLEM, "versions", f"missing: {', '.join(missing)}; {install}"))
    return findings
