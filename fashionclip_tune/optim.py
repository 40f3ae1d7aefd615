"""The optimizer over a model's parameters."""

import torch
from torch import nn

from fashionclip_tune.config import TrainingConfig


def build_optimizer(network: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019); matrices decay, vectors and scalars (biases, norms, logit scale) do not."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=training.learning_rate, betas=(training.beta1, training.beta2), eps=training.epsilon, fused=True
    )
