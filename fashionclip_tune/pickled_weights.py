"""Weights in the ``.pt`` files of PyTorch, as the published runs saved them; nothing that such a file holds is executed."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fashionclip_tune.errors import UserError

PICKLED_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# Published runs wrote the first; OpenCLIP's and Lightning's the second.
_WEIGHTS_KEYS = ("model_state_dict", "state_dict")
_PARALLEL_PREFIX = "module."


def read_pickled_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file: the whole of it, or one of its entries; of a network wrapped in DataParallel, too.

    Raises:
        UserError: the file holds code, or no weights.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} was not loaded: it is cut short, or holds more than tensors and plain values, which could run code "
            f"({reason}). Where you trust it, save its weights alone: torch.save(network.state_dict(), FILE)"
        ) from error
    for key in _WEIGHTS_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        found = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{path} holds no weights: a state dict is expected, or one under {' or '.join(_WEIGHTS_KEYS)}, not {found}"
        )
    if all(key.startswith(_PARALLEL_PREFIX) for key in content):
        return {key.removeprefix(_PARALLEL_PREFIX): value for key, value in content.items()}
    return dict(content)
