"""The optimizer over a model's parameters: which decay, and which move how fast."""

from functools import cache

import torch
from torch import nn

from fashionclip_tune.config import TrainingConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.oom import ran_out_of_memory
from fashionclip_tune.recipe import OptimizerConfig
from fashionclip_tune.towers import Place, parameter_places


def build_optimizer(network: nn.Module, training: TrainingConfig, rates: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) over what is not frozen.

    Matrices decay, vectors and scalars (biases, norms, logit scale) do not. Each group has its own ``peak_rate``, to be
    multiplied by the schedule's factor.

    Raises:
        UserError: a layer decay for a model whose layers cannot be told.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    places = parameter_places(network)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            decay = training.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((_peak_rate(name, places[name], training, rates), decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "peak_rate": peak_rate, "weight_decay": decay}
            for (peak_rate, decay), parameters in groups.items()
        ],
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.epsilon,
        fused=has_fused_adamw(next(network.parameters()).device.type),
    )


def _peak_rate(name: str, place: Place, training: TrainingConfig, rates: OptimizerConfig) -> float:
    if place.tower == "logits":
        return training.learning_rate if rates.logit_learning_rate is None else rates.logit_learning_rate
    rate = training.learning_rate * (rates.image_rate if place.tower == "image" else rates.text_rate)
    if rates.layer_decay == 1:
        return rate
    if place.layers_above is None:
        raise UserError(
            f"optimizer.layer_decay = {rates.layer_decay} is not possible: the {place.tower} tower is no plain transformer, "
            f"the layer of {name} is not known; allowed is 1"
        )
    return rate * rates.layer_decay**place.layers_above


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
