"""Running out of memory: how it shows, and how everything that can be is given back."""

import gc

import torch

from fashionclip_tune.errors import OutOfMemoryError

# Libraries below torch have errors of their own for it.
_TEXTS = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory")


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
