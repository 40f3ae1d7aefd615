"""Builds the made-up card of gpu_standin.c and says why, where that is not possible."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_suffix(".c")
_CUDA = "13.0"
"""Of the torch that it was written beside. Another one may call other functions: there it is tried."""
_TRIAL = """
import os, torch
numbers = torch.ones(8, 8, device="cuda", requires_grad=True)
(numbers @ numbers).sum().backward()
assert torch.cuda.get_device_name() == "Tesla T4" and numbers.grad.cpu().sum() == 0
os._exit(0)
"""
"""Ends at once: the thread of a backward pass just made may want the interpreter's lock while Python ends, and aborts then."""


class NoStandinError(Exception):
    """This machine lacks what the made-up card is built from; the message says what."""


def build_standin(folder: Path) -> Mapping[str, str]:
    """Builds it into a folder; returns the environment of a process that is to have it.

    Raises:
        NoStandinError: no gcc, no CUDA build of torch, no CUDA headers, or another CUDA version with which it does not load.
    """
    if torch.version.cuda is None:
        raise NoStandinError(f"torch {torch.__version__} is no CUDA build")
    if shutil.which("gcc") is None:
        raise NoStandinError("there is no gcc")
    # The soname under which the driver is looked for: a preloaded library with this name is what is found.
    library = folder / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Wno-unused-parameter", f"-Wl,-soname,{library.name}"]
    subprocess.run(["gcc", *options, f"-I{_headers()}", "-o", library, _SOURCE, "-lpthread"], check=True)
    preloaded = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), str(library)]))
    environment = {**os.environ, "LD_PRELOAD": preloaded, "OMP_NUM_THREADS": "1"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    tried = subprocess.run(
        [sys.executable, "-c", _TRIAL], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    if tried.returncode:
        last_line = (tried.stderr.strip().splitlines() or [f"status {tried.returncode}"])[-1]
        reason = f"the made-up card, written for CUDA {_CUDA}, does not load with {torch.version.cuda}: {last_line}"
        raise NoStandinError(reason) if torch.version.cuda != _CUDA else RuntimeError(reason)
    return environment


def _headers() -> str:
    """Those that the Triton wheel brings, which torch's CUDA wheels for Linux need; NVIDIA's own wheel has a part of them."""
    folder = Path(sysconfig.get_path("platlib"), "triton", "backends", "nvidia", "include")
    if not (folder / "cuda_runtime_api.h").is_file():
        raise NoStandinError(f"there are no CUDA headers in {folder}")
    return str(folder)
