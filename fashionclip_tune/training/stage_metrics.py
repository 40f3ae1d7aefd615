"""What is summed over a stage's steps, on the device: reading it at each step would make the GPU wait for the CPU."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fashionclip_tune.errors import DivergedError

# From its first scale of 2**16, GradScaler is down to 1 after 16 skipped steps: more in a row are no matter of scale.
_MAX_SKIPPED_IN_A_ROW = 20
_KEYS_SHOWN = 64


@dataclass(frozen=True)
class StageSums:
    """Scalars on the training device, of the steps since the last evaluation."""

    num_steps: int
    loss_sum: Tensor
    skipped: Tensor
    """Steps whose gradients were not finite: their update was left out."""
    skipped_in_a_row: Tensor
    """Up to now, stages before this one included."""
    bad_3: Tensor
    """Of the first step whose loss was not finite: its number, the loss and the logit scale; number 0: there was none."""

    @classmethod
    def zero(cls, device: torch.device) -> "StageSums":
        def scalar() -> Tensor:
            return torch.zeros((), device=device)

        return cls(0, scalar(), scalar(), scalar(), torch.zeros(3, device=device))

    def plus(self, step: int, loss: Tensor, grad_norm: Tensor, logit_scale: Tensor) -> tuple["StageSums", Tensor]:
        """With one more step, and whether its update is to be skipped: 1 or 0, float32, on the device."""
        loss_is_bad = ~loss.isfinite()
        skips = (loss_is_bad | ~grad_norm.isfinite()).float()
        # In float32 exact up to 2**24 steps.
        this_3 = torch.stack([torch.full_like(loss, float(step)), loss, logit_scale])
        sums = StageSums(
            num_steps=self.num_steps + 1,
            loss_sum=self.loss_sum + loss,
            skipped=self.skipped + skips,
            skipped_in_a_row=(self.skipped_in_a_row + skips) * skips,
            bad_3=torch.where(loss_is_bad & (self.bad_3[0] == 0), this_3, self.bad_3),
        )
        return sums, skips

    def check(self, step: int, keys_of_step: dict[int, tuple[str, ...]]) -> None:
        """Waits for the device.

        Raises:
            DivergedError: a loss was not finite, or no update was possible for long.
        """
        bad_step, bad_loss, logit_scale = self.bad_3.tolist()
        if bad_step:
            keys = keys_of_step.get(int(bad_step), ())
            shown = ", ".join(keys[:_KEYS_SHOWN]) + (f" and {len(keys) - _KEYS_SHOWN} more" if len(keys) > _KEYS_SHOWN else "")
            raise DivergedError(
                f"the loss is {bad_loss} at step {int(bad_step)}, logit scale {logit_scale:.4g}; its batch: {shown}"
            )
        if (in_a_row := int(self.skipped_in_a_row)) >= _MAX_SKIPPED_IN_A_ROW:
            raise DivergedError(
                f"the gradients of the last {in_a_row} steps up to step {step} are not finite, whatever the loss scale: "
                f"nothing is learnt any more (loss {self.mean_loss:.4g})"
            )

    @property
    def mean_loss(self) -> float:
        return float(self.loss_sum) / self.num_steps if self.num_steps else math.nan

    def next_stage(self) -> "StageSums":
        return replace(self.zero(self.loss_sum.device), skipped_in_a_row=self.skipped_in_a_row)

    def state_dict(self) -> dict[str, Any]:
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in vars(self).items()}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> "StageSums":
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in state.items()
        }
        return cls(**moved)
