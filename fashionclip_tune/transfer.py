"""Copies from the CPU's memory to the training device."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Transfer:
    """Copies on a stream of their own: the CPU, a step ahead of the GPU, has the next batch copied while it computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """On a CPU the tensors themselves."""
        if self._stream is None:
            return [tensor.to(self._device) for tensor in tensors]
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            # Only pinned memory is copied without waiting; what the loader has pinned stays as it is.
            copies = [tensor.pin_memory().to(self._device, non_blocking=True) for tensor in tensors]
        computing.wait_stream(self._stream)
        for copy in copies:  # freed for the copying stream only when the computing one is done with it
            copy.record_stream(computing)
        return copies
