"""The same bits again on a GPU: deterministic kernels wherever torch has one, and the names of operations that have none.

https://docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html
"""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import deterministic

_LACKS = re.compile(r"(.+?) (?:does not have a deterministic implementation|defaults to a non-deterministic algorithm)")
# What torch says where it is told to raise: the two above, cuBLAS's, and memory-efficient attention's.
_REFUSAL = re.compile(r"use_deterministic_algorithms|deterministic mode is enabled")
_CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Without it cuBLAS may sum in another order whenever streams share its workspace."""


@contextmanager
def repeatable(is_wanted: bool) -> Iterator[None]:
    """Within, operations take their deterministic kernels; those that have none are named in one warning at the end."""
    if not is_wanted:
        yield
        return
    for name, value in _CUBLAS.items():
        os.environ.setdefault(name, value)  # cuBLAS reads it when it is first used
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
