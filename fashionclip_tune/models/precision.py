"""On which device, and in which floating-point type, a run computes."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from fashionclip_tune.config.choices import Precision
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UnavailableError


@dataclass(frozen=True)
class PrecisionPlan:
    device: torch.device
    """A GPU has its number here."""
    autocast_dtype: torch.dtype | None
    """None: plain fp32."""

    @property
    def needs_grad_scaler(self) -> bool:
        """fp16 gradients underflow without loss scaling; bf16 has the range of fp32."""
        return self.autocast_dtype is torch.float16

    def autocast(self) -> AbstractContextManager[None]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)


def plan_precision(config: ProjectConfig) -> PrecisionPlan:
    """Resolves ``device`` and ``hardware.precision`` on this machine.

    Raises:
        UserError: a GPU is asked for and torch sees none.
    """
    device = choose_device(config.device)
    precision = config.hardware.precision
    if precision is Precision.AUTO:
        if device.type != "cuda":
            precision = Precision.FP32
        else:
            # Before Ampere torch emulates bf16, slower than fp32: ask for hardware.
            in_hardware = torch.cuda.is_bf16_supported(including_emulation=False)
            precision = Precision.BF16 if in_hardware else Precision.FP16
    dtypes = {Precision.FP32: None, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
    return PrecisionPlan(device, dtypes[precision])


def choose_device(name: str) -> torch.device:
    """A GPU always with its number: without one some of torch's functions refuse it. ``cuda`` is torch's current GPU.

    Raises:
        UserError: a GPU is asked for and torch sees none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not torch.cuda.is_available():
        raise UnavailableError(f"device = {name!r}: torch sees no GPU here; use --device cpu, or a torch build for your driver")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)
