"""How much GPU memory a training step needs, estimated without a GPU.

A forward pass is run on tensors that have shapes, types and a device but no storage (``FakeTensorMode``), under autocast as
on a GPU, and what it keeps for the backward pass is counted, each storage once. The rest follows from the weights' sizes;
what neither shows is in the margins below.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

# CUDA's context and the workspaces of cuBLAS and cuDNN, which are outside of PyTorch's allocator.
CONTEXT_BYTES = 600 * 2**20
# Freed blocks that fit nothing else, of all that comes and goes within a step.
FRAGMENTATION = 0.10
# The backward pass holds gradients of an activation or two beside the activations.
_GRADIENTS_ON_THE_WAY = 2
_CANVAS_AREA = 1.25**2  # of the photos before augmentation crops them
# Of each tower: embeddings in parts and as one, scaled, and their gradients. fp32.
_EMBEDDINGS = 4
# [B, B] in fp32 at the peak of a loss, most of them where the first bias of the sigmoid loss is fitted, in doubles.
_LOSS_MATRICES = 9


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the GPU at the peak of a training step; an upper bound, since gradients come as activations go."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    """Adam's two moments, of what is trained."""
    average_bytes: int
    """A moving average of what is trained, where there is one."""
    activations_bytes: int
    """What a micro-batch keeps for its backward pass, autocast's copies of the weights included."""
    batch_bytes: int
    """Photos as bytes, of this batch and of the next."""
    loss_bytes: int
    """Embeddings of the whole batch and the loss's matrices, which micro-batches do not divide; what of the latter has room
    where the activations were is left out, since a batch that is cut has none while its loss is computed."""
    margin_bytes: int
    """Context and workspaces; gradients on the way; a tenth of the activations for fragmentation."""

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
    trained_bytes = sum(_bytes(parameter) for parameter in network.parameters() if parameter.requires_grad)
    meta: Any = copy.deepcopy(network).to("meta").train()
    meta.set_grad_checkpointing(False)
    kept = _kept(meta, micro_batch_size, autocast_dtype)
    activations_bytes = kept.total_bytes
    if gradient_checkpointing:
        meta.set_grad_checkpointing(True)
        activations_bytes = _kept(meta, micro_batch_size, autocast_dtype).total_bytes + kept.largest_block_bytes
    matrices_bytes = 4 * _LOSS_MATRICES * batch_size**2
    if micro_batch_size < batch_size:
        matrices_bytes = max(0, matrices_bytes - activations_bytes)
    return MemoryEstimate(
        weights_bytes=weights_bytes,
        gradients_bytes=trained_bytes,
        optimizer_bytes=2 * trained_bytes,
        average_bytes=trained_bytes if averages_weights else 0,
        activations_bytes=activations_bytes,
        batch_bytes=round(2 * batch_size * 3 * _image_size(network) ** 2 * _CANVAS_AREA),
        loss_bytes=4 * 2 * _EMBEDDINGS * batch_size * kept.embedding_size + matrices_bytes,
        margin_bytes=CONTEXT_BYTES + _GRADIENTS_ON_THE_WAY * kept.largest_bytes + round(FRAGMENTATION * activations_bytes),
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _image_size(network: Any) -> int:
    size = network.visual.image_size
    return int(size if isinstance(size, int) else size[0])


class _Kept:
    """Storages that a forward pass saves, other than the weights: together, by block, and the largest; and what it returns."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.total_bytes = self.largest_bytes = self.largest_block_bytes = self.embedding_size = 0
        self._known = {tensor.untyped_storage() for tensor in weights}
        self._at_start: list[int] = []

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known.add(storage)
            self.total_bytes += storage.nbytes()
            self.largest_bytes = max(self.largest_bytes, storage.nbytes())
        return tensor

    def block_starts(self, *_: Any) -> None:
        self._at_start.append(self.total_bytes)

    def block_ends(self, *_: Any) -> None:
        self.largest_block_bytes = max(self.largest_block_bytes, self.total_bytes - self._at_start.pop())


def _kept(network: Any, num_photos: int, autocast_dtype: torch.dtype | None) -> _Kept:
    side, trained = _image_size(network), {name for name, p in network.named_parameters() if p.requires_grad}
    named = [*network.named_parameters(), *network.named_buffers()]
    with FakeTensorMode(), _fused_attention(), _cuda_autocast(autocast_dtype):
        tensors = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda", requires_grad=name in trained)
            for name, tensor in named
        }
        kept = _Kept(list(tensors.values()))
        images_BCHW = torch.empty(num_photos, 3, side, side, device="cuda")
        tokens_BL = torch.zeros(num_photos, network.context_length, dtype=torch.long, device="cuda")
        blocks = [block for name, parent in network.named_modules() if name.endswith("blocks") for block in parent.children()]
        hooks = [block.register_forward_pre_hook(kept.block_starts) for block in blocks]
        hooks += [block.register_forward_hook(kept.block_ends) for block in blocks]
        try:
            with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
                found = functional_call(network, tensors, (images_BCHW, tokens_BL))
            kept.embedding_size = (found["image_features"] if isinstance(found, dict) else found[0]).shape[-1]
        finally:
            for hook in hooks:
                hook.remove()
    return kept


@contextmanager
def _cuda_autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """``torch.autocast("cuda")``, which switches itself off where there is no GPU."""
    if dtype is None:
        yield
        return
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


class _FusedAttention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: its inputs, its output and a number a row, but no matrix of attention weights."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Without a GPU torch would choose its kernel of last resort, which keeps that matrix."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        output: Tensor = _FusedAttention.apply(query, key, value)
        return output

    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
