"""AdamW over a model's parameter groups, the learning-rate schedule, the average of the weights."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fashionclip_tune.config.choices import LearningRateSchedule
from fashionclip_tune.config.options import OptimizerConfig, ScheduleConfig, TrainingConfig
from fashionclip_tune.models.towers import parameter_groups
from fashionclip_tune.training.device import ran_out_of_memory


def build_optimizer(network: nn.Module, training: TrainingConfig, rates: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) over what is not frozen, in the groups of ``parameter_groups``.

    Raises:
        UserError: a layer decay for a model whose layers cannot be told.
    """
    return torch.optim.AdamW(
        parameter_groups(network, training, rates),
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.epsilon,
        fused=has_fused_adamw(next(network.parameters()).device.type),
    )


@cache
def has_fused_adamw(device: str) -> bool:
    """Whether this torch has the fused kernel for a kind of device: found out by one step of one number."""
    probe = torch.zeros(1, device=device, requires_grad=True)
    probe.grad = torch.zeros_like(probe)
    try:
        torch.optim.AdamW([probe], fused=True).step()
    except RuntimeError as error:  # NotImplementedError is one
        if ran_out_of_memory(error):
            raise
        return False
    return True


def learning_rate_factor(step: int, total_steps: int, schedule: ScheduleConfig) -> float:
    """The factor on the peak learning rate at ``step`` (from 0) of ``total_steps``.

    Linear warm-up over the first ``warmup_ratio`` of the steps, reaching 1 at the first step after it; then constant, or
    a half cosine that reaches 0 after the last step (Loshchilov and Hutter 2017, SGDR, equation 5, a single period).
    """
    warmup_steps = round(total_steps * schedule.warmup_ratio)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule.name is LearningRateSchedule.CONSTANT:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))


class WeightAverage:
    """Exponential moving average of what training moves: average = decay * average + (1 - decay) * weights.

    It starts at the first weights, so nothing needs to be corrected for. What is frozen has no average of its own.

    Args:
        statistics: buffers that are averaged as well, by name.

    References:
        Tarvainen and Valpola 2017, Mean teachers are better role models, section 2.
    """

    def __init__(self, network: nn.Module, decay: float, statistics: Mapping[str, Tensor] | None = None) -> None:
        # AveragedModel would copy frozen parameters too.
        self._move = get_ema_multi_avg_fn(decay)
        trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        self._trained: dict[str, Tensor] = {**trained, **(statistics or {})}
        self.start()

    def start(self) -> None:
        """Once more from the weights as they are."""
        self._averaged = {name: parameter.detach().clone() for name, parameter in self._trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        self._move(list(self._averaged.values()), list(self._trained.values()), 0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the network's parameters are the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._trained.items():
            parameter.data, self._averaged[name] = self._averaged[name], parameter.data

    def raw_weights(self) -> dict[str, Tensor]:
        """What the optimizer works on: a checkpoint keeps it beside the average, which is the model's weights there."""
        return {name: parameter.detach() for name, parameter in self._trained.items()}

    @torch.no_grad()
    def restore(self, raw_weights: Mapping[str, Tensor]) -> None:
        """From a network that was loaded with the average."""
        for name, parameter in self._trained.items():
            self._averaged[name].copy_(parameter)
            parameter.copy_(raw_weights[name])
