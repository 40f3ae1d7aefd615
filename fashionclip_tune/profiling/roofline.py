"""How fast a card trains and evaluates a model, by what is computed and moved; nothing is run.

The roofline of each operation of a pass (Williams et al. 2009, Roofline: an insightful visual performance model for multicore
architectures): it takes as long as its floating-point operations at a share of the card's peak, or its bytes at a share of the
bandwidth, whichever is more. So a step is matrix products, attention, and the memory traffic of all else: activations,
norms, casts, gradients and AdamW. No step takes less than the host needs to start its kernels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fashionclip_tune.machine.gpus import Gpu
from fashionclip_tune.profiling.forward_pass import Operation, forward_pass

# Of a card's peak: fused attention over 50 to 260 tokens in heads of 64 numbers, against large matrix products.
_ATTENTION_SHARE = 0.25
# Of the host, to start an operation from Python. Beside an H200 (torch 2.11, results/README.md) a step of ViT-B-32, which that
# card does in 23 ms, took 57 ms in open_clip_train and 70 to 78 ms here.
_LAUNCH_S = 38e-6
# The backward pass against the forward pass: two products for each, five for attention's two; traffic as counted on the meta
# device (1.97 for both CLIP models, 1.74 for SigLIP2's, frozen token table; 838 operations for 464).
_BACKWARD = {"matmul": 2.0, "attention": 2.5, "other": 2.0}
# A number of the weights, in bytes. Its gradient is written in half precision and cast; from the second micro-batch on it is
# added to what is there (two read, one written). Once a step: unscaling and clipping read and write it, after its norm has
# been read; AdamW reads weight, gradient and both moments and writes all but the gradient.
_CAST_BYTES, _ADDED_BYTES = 2 + 2 + 4, 4 + 4 + 4
_STEP_BYTES = (4 + 4) + 4 + (4 + 4) + (4 * 4 + 3 * 4)
_AVERAGE_BYTES = 4 + 4 + 4


@dataclass(frozen=True)
class Passes:
    """What a micro-batch of a model takes, on any card."""

    num_photos: int
    operations: Sequence[Operation]
    trained_numbers: int

    def forward_s(self, gpu: Gpu) -> float:
        return sum(_seconds(operation, gpu) for operation in self.operations)

    def backward_s(self, gpu: Gpu) -> float:
        trained = (operation for operation in self.operations if operation.is_trained)
        moved_s = _CAST_BYTES * self.trained_numbers / _bandwidth(gpu)
        return sum(_BACKWARD[operation.kind] * _seconds(operation, gpu) for operation in trained) + moved_s

    def launches(self, passes: float) -> float:
        return passes * len(self.operations)


def passes_of(network: nn.Module, num_photos: int, autocast_dtype: torch.dtype | None) -> Passes:
    """Of an OpenCLIP network, as ``forward_pass`` takes it."""
    noted = forward_pass(network, num_photos, autocast_dtype)
    trained_numbers = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    return Passes(num_photos, noted.operations, trained_numbers)


def training_rate(
    passes: Passes,
    gpu: Gpu,
    *,
    batch_size: int,
    gradient_checkpointing: bool = False,
    averages_weights: bool = False,
    side_by_side: int = 1,
) -> float:
    """Samples a second of each of ``side_by_side`` trials that share a card, in micro-batches as of ``passes``."""
    count = math.ceil(batch_size / passes.num_photos)
    is_cut = count > 1
    forwards = 1 + is_cut + gradient_checkpointing
    step_bytes = (_STEP_BYTES + averages_weights * _AVERAGE_BYTES + (count - 1) * _ADDED_BYTES) * passes.trained_numbers
    # A last micro-batch that is smaller takes less.
    share = batch_size / passes.num_photos
    device_s = share * (forwards * passes.forward_s(gpu) + passes.backward_s(gpu)) + step_bytes / _bandwidth(gpu)
    host_s = _LAUNCH_S * count * passes.launches(forwards + _BACKWARD["other"])
    return batch_size / max(side_by_side * device_s, host_s)


def evaluation_rate(passes: Passes, gpu: Gpu, *, side_by_side: int = 1) -> float:
    """Photos with their captions a second, as ``training_rate``."""
    return passes.num_photos / max(side_by_side * passes.forward_s(gpu), _LAUNCH_S * passes.launches(1))


def _bandwidth(gpu: Gpu) -> float:
    return gpu.bandwidth_share * 1e9 * gpu.gb_per_second


def _seconds(operation: Operation, gpu: Gpu) -> float:
    share = _ATTENTION_SHARE * gpu.matmul_share if operation.kind == "attention" else gpu.matmul_share
    return max(operation.flops / (share * 1e12 * gpu.tflops), operation.num_bytes / _bandwidth(gpu))
