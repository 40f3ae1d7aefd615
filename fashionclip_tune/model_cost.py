"""How much computing an architecture takes, found out without its weights and without a GPU."""

import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from fashionclip_tune.architectures import check_architecture
from fashionclip_tune.model_check import has_known_text_tower, without_numbers


def forward_flops(model_name: str) -> float:
    """Floating-point operations of both towers for one photo and one caption; a training step takes about three times that.

    Counted on tensors without numbers (the meta device). Parameters would mislead: ViT-B-16 has fewer than ViT-B-32 and
    takes four times as long. Infinite for text towers that are described on the hub only.

    Raises:
        UserError: no such architecture.
    """
    if not has_known_text_tower(check_architecture(model_name)):
        return math.inf
    network = without_numbers(model_name)
    size = network.visual.image_size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    photo = torch.empty(1, 3, *sides, device="meta")
    tokens = torch.zeros(1, network.context_length, dtype=torch.long, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.requires_grad_(False)
        network.eval()(photo, tokens)
    return float(counter.get_total_flops())
