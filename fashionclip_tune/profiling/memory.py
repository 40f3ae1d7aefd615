"""How much GPU memory a training step needs, estimated without a GPU.

Of a forward pass (``forward_pass``) it is known what is alive as it goes and what is kept for the backward pass. The rest
follows from the weights' sizes and from the order in which gradients come and activations go; what none of these shows is in
the margins below.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fashionclip_tune.profiling.forward_pass import ForwardPass, forward_pass, image_size

# CUDA's context, and what its libraries take outside of PyTorch's allocator.
CONTEXT_BYTES = 600 * 2**20
# cuBLAS's workspaces, one for the thread of the forward pass and one for that of the backward pass, are inside of it: 32 MiB
# each on Hopper, and anywhere as CUBLAS_WORKSPACE_CONFIG=:4096:8 asks for.
_WORKSPACES_BYTES = 2 * 32 * 2**20
# What the allocator holds and cannot use: it rounds blocks up and cuts them from segments of 20 MiB, and freed ones may fit
# nothing else. Shares of weights, gradients and moments, and of what comes and goes; with them no step of the published models
# on a made-up T4 (tests/test_gpu.py) reserved more than is estimated.
_UNUSED_OF_STATE = 0.12
_UNUSED_OF_ACTIVATIONS = 0.27
_CANVAS_AREA = 1.25**2  # of the photos before augmentation crops them
# Of each tower: embeddings in parts and as one, scaled, and their gradients. fp32.
_EMBEDDINGS = 4
# [B, B] in fp32 at the peak of a loss, most of them where the first bias of the sigmoid loss is fitted, in doubles.
_LOSS_MATRICES = 9


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the GPU at the peak of a training step; meant never to be less, and little more."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    """Adam's two moments, of what is trained."""
    average_bytes: int
    """A moving average of what is trained, where there is one."""
    activations_bytes: int
    """What a micro-batch keeps for its backward pass, autocast's copies of the weights included."""
    passing_bytes: int
    """What else there is at the peak of a pass: activations computed again, gradients on the way, a table's gradient that is
    to be added to those of earlier micro-batches. Below 0 where gradients come only after most activations have gone."""
    batch_bytes: int
    """Photos as bytes, of this batch and of the next."""
    loss_bytes: int
    """Embeddings of the whole batch and the loss's matrices, which micro-batches do not divide; what of the latter has room
    where the activations were is left out, since a batch that is cut has none while its loss is computed."""
    margin_bytes: int
    """Context and workspaces; what the allocator rounds up and cannot use."""

    @property
    def total_bytes(self) -> int:
        return sum(vars(self).values())


def estimate_memory(
    network: nn.Module,
    *,
    batch_size: int,
    micro_batch_size: int,
    autocast_dtype: torch.dtype | None,
    gradient_checkpointing: bool = False,
    averages_weights: bool = False,
) -> MemoryEstimate:
    """Peak of a step of AdamW on an OpenCLIP network in training mode.

    Args:
        network: on any device, neither read nor changed; parameters that need no gradient are frozen.
        autocast_dtype: None: fp32.
        gradient_checkpointing: each block keeps its input only, and is computed again in the backward pass.
        averages_weights: a moving average of what is trained is kept beside it.
    """
    weights_bytes = sum(_bytes(tensor) for tensor in (*network.parameters(), *network.buffers()))
    trained_bytes = _trained_bytes(network)
    noted = forward_pass(network, micro_batch_size, autocast_dtype, gradient_checkpointing=gradient_checkpointing)
    activations_bytes, is_cut = noted.text.kept_bytes, micro_batch_size < batch_size
    passing_bytes = _pass_bytes(noted, network, is_cut=is_cut) - trained_bytes - activations_bytes
    matrices_bytes = 4 * _LOSS_MATRICES * batch_size**2
    if is_cut:
        matrices_bytes = max(0, matrices_bytes - activations_bytes)
    average_bytes = trained_bytes if averages_weights else 0
    unused_bytes = _UNUSED_OF_STATE * (weights_bytes + 3 * trained_bytes + average_bytes)
    unused_bytes += _UNUSED_OF_ACTIVATIONS * noted.peak_bytes
    return MemoryEstimate(
        weights_bytes=weights_bytes,
        gradients_bytes=trained_bytes,
        optimizer_bytes=2 * trained_bytes,
        average_bytes=average_bytes,
        activations_bytes=activations_bytes,
        passing_bytes=passing_bytes,
        batch_bytes=round(2 * batch_size * 3 * image_size(network) ** 2 * _CANVAS_AREA),
        loss_bytes=4 * 2 * _EMBEDDINGS * batch_size * noted.embedding_size + matrices_bytes,
        margin_bytes=CONTEXT_BYTES + _WORKSPACES_BYTES + round(unused_bytes),
    )


def _pass_bytes(noted: ForwardPass, network: Any, *, is_cut: bool) -> int:
    """Gradients and activations at the peak of a pass: within it; or where the image tower's backward pass begins, with the
    text tower's gradients and the image tower's activations; or where it ends. In between the ones grow as the others shrink.

    Args:
        is_cut: into micro-batches: gradients of earlier ones are there all the time, and a new one is made beside them before
            it is added.
    """
    all_bytes, image_bytes = _trained_bytes(network), noted.image.kept_bytes + noted.image.backward_bytes
    if is_cut:
        largest_bytes = max((_bytes(parameter) for parameter in network.parameters() if parameter.requires_grad), default=0)
        return all_bytes + max(noted.peak_bytes, image_bytes + largest_bytes)
    text_bytes = all_bytes - _trained_bytes(network.visual)
    return max(noted.peak_bytes, image_bytes + text_bytes, noted.image.backward_bytes + all_bytes)


def _trained_bytes(network: nn.Module) -> int:
    return sum(_bytes(parameter) for parameter in network.parameters() if parameter.requires_grad)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
