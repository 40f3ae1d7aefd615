"""What ``torch.save`` wrote, read as tensors and plain values: nothing in it is executed, whatever torch's version."""

import pickle
import tarfile
from pathlib import Path
from typing import Any

import torch


def load_pickled(path: Path, *, mmap: bool = False) -> Any:
    """On the CPU; ``mmap``: the tensors' bytes are read when they are wanted.

    Raises:
        ValueError: the file is cut short, or holds anything else; says what, in a line.
        OSError: it cannot be read.
    """
    try:
        if _is_code(path):
            raise ValueError("it is a TorchScript or tar archive")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError) as error:
        raise ValueError((str(error).strip().splitlines() or [type(error).__name__])[0]) from error


def _is_code(path: Path) -> bool:
    """Whether torch before 2.6 would run what is in it in spite of ``weights_only`` (CVE-2025-32434)."""
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if not is_zip:
        return tarfile.is_tarfile(path)
    # Another reader may find other entries in the same file.
    return "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records()
