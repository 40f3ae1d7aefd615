"""How much GPU memory a training step needs, estimated without a GPU.

A forward pass is run on tensors that have shapes, types and a device but no storage (``FakeTensorMode``), under autocast as
on a GPU, and the storages that are alive are counted as they come and go. What is alive at its end is kept for the backward
pass. The rest follows from the weights' sizes and from the order in which gradients come and activations go; what none of
these shows is in the margins below.
"""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# CUDA's context, and what its libraries take outside of PyTorch's allocator.
CONTEXT_BYTES = 600 * 2**20
# cuBLAS's workspaces, one for the thread of the forward pass and one for that of the backward pass, are inside of it: 32 MiB
# each on Hopper, and anywhere as CUBLAS_WORKSPACE_CONFIG=:4096:8 asks for.
_WORKSPACES_BYTES = 2 * 32 * 2**20
# What the allocator holds and cannot use: it rounds blocks up and cuts them from segments of 20 MiB, and freed ones may fit
# nothing else. Shares of weights, gradients and moments, and of what comes and goes; with them no step of the published models
# on a made-up T4 (tests/test_gpu.py) reserved more than is estimated.
_UNUSED_OF_STATE = 0.12
_UNUSED_OF_ACTIVATIONS = 0.19
# The backward pass holds gradients of an activation or two beside the activations.
_GRADIENTS_ON_THE_WAY = 2
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
    meta = _without_storage(network).train()
    meta.set_grad_checkpointing(False)
    noted = _forward(meta, micro_batch_size, autocast_dtype)
    if gradient_checkpointing:
        meta.set_grad_checkpointing(True)
        blocks, noted = noted, _forward(meta, micro_batch_size, autocast_dtype)
        for tower, whole in ((noted.image, blocks.image), (noted.text, blocks.text)):
            tower.again_bytes = whole.largest_block_bytes
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
        batch_bytes=round(2 * batch_size * 3 * _image_size(network) ** 2 * _CANVAS_AREA),
        loss_bytes=4 * 2 * _EMBEDDINGS * batch_size * noted.embedding_size + matrices_bytes,
        margin_bytes=CONTEXT_BYTES + _WORKSPACES_BYTES + round(unused_bytes),
    )


def _without_storage(network: nn.Module) -> Any:
    """A copy on the meta device, for which no weights are copied."""
    copies: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in network.buffers()}
    for parameter in network.parameters():
        copies[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    return copy.deepcopy(network, copies)


def _pass_bytes(noted: "_Forward", network: Any, *, is_cut: bool) -> int:
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


def _image_size(network: Any) -> int:
    size = network.visual.image_size
    return int(size if isinstance(size, int) else size[0])


@dataclass
class _Tower:
    """Bytes of storages other than the weights, in and after a tower's forward pass."""

    kept_bytes: int = 0
    """Saved for the backward pass when it has ended, by the tower before it, too."""
    peak_bytes: int = 0
    """Alive at its most."""
    largest_bytes: int = 0
    """Of one that is saved."""
    largest_block_bytes: int = 0
    """Of what one block saves."""
    again_bytes: int = 0
    """Of what a block is computed again for in the backward pass."""

    @property
    def backward_bytes(self) -> int:
        """On top of what is kept, while the backward pass is in this tower."""
        return self.again_bytes + _GRADIENTS_ON_THE_WAY * self.largest_bytes


class _Forward(TorchDispatchMode):
    """Notes the storages that operations make for as long as somebody holds them, and those that autograd saves."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.image, self.text = _Tower(), _Tower()  # in this order
        self.embedding_size = 0
        self._tower = self.image
        self._made = weakref.WeakSet[Any](tensor.untyped_storage() for tensor in weights)
        self._saved = weakref.WeakSet[Any](self._made)
        self._alive_bytes = self._saved_bytes = 0
        self._at_start: list[int] = []

    @property
    def peak_bytes(self) -> int:
        """Of activations, in the forward pass or as the backward pass begins in either tower."""
        towers = (self.image, self.text)
        return max(max(tower.peak_bytes, tower.kept_bytes + tower.backward_bytes) for tower in towers)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._made:
            self._made.add(storage)
            self._alive_bytes += storage.nbytes()
            self._tower.peak_bytes = max(self._tower.peak_bytes, self._alive_bytes)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, num_bytes: int) -> None:
        self._alive_bytes -= num_bytes

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._saved:
            self._saved.add(storage)
            self._saved_bytes += storage.nbytes()
            self._tower.largest_bytes = max(self._tower.largest_bytes, storage.nbytes())
        return tensor

    def block_starts(self, *_: Any) -> None:
        self._at_start.append(self._saved_bytes)

    def block_ends(self, *_: Any) -> None:
        block_bytes = self._saved_bytes - self._at_start.pop()
        self._tower.largest_block_bytes = max(self._tower.largest_block_bytes, block_bytes)

    def tower_ends(self, *_: Any) -> None:
        self._tower.kept_bytes = self._saved_bytes
        self._tower = self.text


def _forward(network: Any, num_photos: int, autocast_dtype: torch.dtype | None) -> _Forward:
    """A pass over photos and as many captions as long as they come."""
    side, trained = _image_size(network), {name for name, p in network.named_parameters() if p.requires_grad}
    named = [*network.named_parameters(), *network.named_buffers()]
    with FakeTensorMode(), _fused_attention(), _cuda_autocast(autocast_dtype):
        tensors = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda", requires_grad=name in trained)
            for name, tensor in named
        }
        blocks = [block for name, parent in network.named_modules() if name.endswith("blocks") for block in parent.children()]
        noted = _Forward(list(tensors.values()))
        hooks = [block.register_forward_pre_hook(noted.block_starts) for block in blocks]
        hooks += [block.register_forward_hook(noted.block_ends) for block in blocks]
        hooks += [network.visual.register_forward_hook(noted.tower_ends)]
        try:
            with noted, torch.autograd.graph.saved_tensors_hooks(noted.pack, lambda tensor: tensor):
                images_BCHW = torch.empty(num_photos, 3, side, side, device="cuda")
                tokens_BL = torch.zeros(num_photos, network.context_length, dtype=torch.long, device="cuda")
                found = functional_call(network, tensors, (images_BCHW, tokens_BL))
            noted.tower_ends()
            noted.embedding_size = (found["image_features"] if isinstance(found, dict) else found[0]).shape[-1]
        finally:
            for hook in hooks:
                hook.remove()
    return noted


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
