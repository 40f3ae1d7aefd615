"""A training device's ways: copies without waiting, deterministic kernels, running out of memory."""

import gc
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import deterministic

from fashionclip_tune.errors import OutOfMemoryError

# Below torch's allocator it shows as an error with a text: a RuntimeError, or torch.AcceleratorError, which is one too and
# which older versions of torch do not have.
_TEXTS = (
    "can't allocate memory",  # the CPU's allocator
    "DefaultCPUAllocator: not enough memory",  # the same on Windows
    "std::bad_alloc",
    "CUDA out of memory",  # torch's own error within another one, as torch.compile raises it
    "CUDA error: out of memory",  # the runtime: a context, a kernel that is loaded, pinned memory
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # no memory for cuBLAS's handle; torch calls nothing of cuBLAS without one
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",  # before cuDNN 9
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
)


def ran_out_of_memory(error: BaseException) -> bool:
    """Of a GPU or of the CPU's allocator; not the error with which a run says that nothing more can be done."""
    if isinstance(error, torch.cuda.OutOfMemoryError | OutOfMemoryError):
        return not isinstance(error, OutOfMemoryError)
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


def free_memory() -> None:
    """To be called when the error's traceback, which holds the tensors of its frames, is gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def onto(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor of the CPU on the device. On a GPU nothing waits for the copy: only pinned memory without gaps is copied so."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


_LACKS = re.compile(r"(.+?) (?:does not have a deterministic implementation|defaults to a non-deterministic algorithm)")
# What torch says where it is told to raise: the two above, cuBLAS's, and memory-efficient attention's.
_REFUSAL = re.compile(r"use_deterministic_algorithms|deterministic mode is enabled")
_CUBLAS, _REPEATABLE_CUBLAS = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


@contextmanager
def repeatable(is_wanted: bool, device: torch.device | None = None) -> Iterator[None]:
    """Within, operations take their deterministic kernels; those that have none are named in one warning at the end.

    Args:
        device: on which matrices are multiplied; None: on the CPU.
    """
    if not is_wanted:
        yield
        return
    if device is not None and device.type == "cuda":
        _show_torch_that_cublas_is_repeatable(device)
    lacking: dict[str, None] = {}
    mode, fills = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads such memory
    try:
        with warnings.catch_warnings():
            show = warnings.showwarning

            def note(message: Warning | str, *where: Any, **how: Any) -> None:
                if (found := _LACKS.match(str(message))) is not None:
                    lacking[found[1]] = None
                else:
                    show(message, *where, **how)

            warnings.showwarning = note
            yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        if lacking:
            warnings.warn(f"not repeatable bit for bit, for want of a deterministic kernel: {', '.join(lacking)}", stacklevel=3)


def _show_torch_that_cublas_is_repeatable(device: torch.device) -> None:
    """torch looks for this variable once a process, at its first matrix product, and refuses to be strict without it.

    It gives cuBLAS a workspace for each stream, with which sums have one order (cuBLAS, "Results reproducibility"). Left where
    it is, the variable is parsed at each product by torch 2.11: 50 to 170 microseconds, a third of a step of ViT-B-32.
    """
    given = os.environ.get(_CUBLAS)
    os.environ[_CUBLAS] = given or _REPEATABLE_CUBLAS
    try:
        one_11 = torch.ones(1, 1, device=device)
        torch.mm(one_11, one_11)
    finally:
        if given is None:
            del os.environ[_CUBLAS]


class StrictPasses:
    """Forward and backward passes that raise where an operation has no deterministic kernel, until one does.

    Told only to warn, attention takes its non-deterministic backward pass though it has another one.
    """

    def __init__(self) -> None:
        self._are_strict = True

    @contextmanager
    def strictly(self) -> Iterator[None]:
        """Only within ``repeatable``."""
        if not self._are_strict or not torch.are_deterministic_algorithms_enabled():
            yield
            return
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(True, warn_only=True)

    def give_way(self, error: RuntimeError) -> bool:
        """Whether this is such an error: from now on passes are not strict, and this one is to be done again."""
        if not self._are_strict or _REFUSAL.search(str(error)) is None:
            return False
        self._are_strict = False
        found = _LACKS.match(str(error))
        operation = found[1] if found is not None else str(error).splitlines()[0]
        warnings.warn(f"{operation} does not have a deterministic implementation", stacklevel=2)
        warnings.warn("attention beside it defaults to a non-deterministic algorithm", stacklevel=2)
        return True
