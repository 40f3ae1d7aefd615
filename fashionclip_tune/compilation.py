"""``torch.compile`` for the two encoders, as an option."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fashionclip_tune.errors import UserError

Encode = Callable[..., Tensor]


def encoders(network: Any, device: torch.device, *, compiled: bool) -> tuple[Encode, Encode]:
    """``encode_image`` and ``encode_text`` of a model.

    The functions are compiled and not the modules: names in the state dict stay what they are, and evaluation, which calls
    the modules, stays as exact as it is without.

    Raises:
        UserError: this machine has no compiler.
    """
    if not compiled:
        return network.encode_image, network.encode_text
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"hardware.compile = True is not possible here: there is no C++ compiler {compiler!r} (install g++, or name one "
            "in CXX); allowed is false"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("hardware.compile = True is not possible here: Triton is not installed; allowed is false")
    return torch.compile(network.encode_image), torch.compile(network.encode_text)
