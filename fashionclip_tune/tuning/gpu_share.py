"""A trial keeps to its share of the card: Ray's fractions are bookkeeping, this is what holds."""

import time
from collections.abc import Callable

import torch

from fashionclip_tune.errors import UnavailableError
from fashionclip_tune.memory import CONTEXT_BYTES
from fashionclip_tune.oom import free_memory, ran_out_of_memory

_WAIT_S = 120.0
_POLL_S = 2.0


def claim_gpu_share(
    share_bytes: int, needed_bytes: int, *, wait_s: float = _WAIT_S, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Caps this process's allocator to its share, less CUDA's context, and waits until the card has what it needs.

    Ray's ``wait_for_gpu`` waits for a card that nobody uses, which one that is shared never is.

    Raises:
        UnavailableError: another program holds the memory and does not give it back in ``wait_s``.
    """
    free_memory()  # of the actor's last trial
    total = int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    allowed = max(0, min(share_bytes, total) - CONTEXT_BYTES)
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    # Asking makes this process's context; what the allocator still holds is ours already.
    needed, waited = min(allowed, needed_bytes - CONTEXT_BYTES), 0.0
    while (free := _free_bytes()) < needed:
        if waited >= wait_s:
            raise UnavailableError(
                f"the card has {free / 2**30:.1f} GiB free after {wait_s:.0f} s, this trial needs {needed / 2**30:.1f}: "
                "another program holds the rest (nvidia-smi names it): end it, or leave it its part with --gpu-memory-gb"
            )
        sleep(_POLL_S)
        waited += _POLL_S


def _free_bytes() -> int:
    try:
        return int(torch.cuda.mem_get_info()[0]) + int(torch.cuda.memory_reserved())
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        return 0  # not even a context fits
