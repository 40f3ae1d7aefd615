"""The optimizer over a model's parameter groups."""

from functools import cache

import torch
from torch import nn

from fashionclip_tune.config import TrainingConfig
from fashionclip_tune.oom import ran_out_of_memory
from fashionclip_tune.recipe import OptimizerConfig
from fashionclip_tune.towers import parameter_groups


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
