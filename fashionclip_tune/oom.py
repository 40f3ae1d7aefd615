"""Running out of memory: how it shows, and how everything that can be is given back."""

import gc

import torch

from fashionclip_tune.errors import OutOfMemoryError

# Below torch's allocator it shows as an error with a text: a RuntimeError, or torch.AcceleratorError, which is one too and
# which older versions of torch do not have.
_TEXTS = (
    "can't allocate memory",  # the CPU's allocator
    "CUDA error: out of memory",  # the runtime: a context, a kernel that is loaded, pinned memory
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # no memory for cuBLAS's handle; torch calls nothing of cuBLAS without one
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
