"""A forward pass without a GPU, on the meta device: what of it is alive, what is kept, and what it computes.

It is run on tensors that have shapes, types and a device but no storage (``FakeTensorMode``), under autocast as on a GPU.
Storages are counted as they come and go, and each operation is noted with what it reads, writes and multiplies.
"""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# The backward pass holds gradients of an activation or two beside the activations.
_GRADIENTS_ON_THE_WAY = 2
_MOVE_NOTHING = ("aten::empty", "aten::new_empty", "aten::_unsafe_view")
# These read no more of what they look into than they find.
_LOOK_UPS = ("aten::embedding", "aten::index", "aten::gather")


@dataclass
class Operation:
    """On the device; views are none."""

    kind: Literal["matmul", "attention", "other"]
    flops: float
    num_bytes: int
    """Read and written."""
    is_trained: bool = True
    """Whether the backward pass comes back to it."""


@dataclass
class Tower:
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


class ForwardPass(TorchDispatchMode):
    """Notes operations, the storages that they make for as long as somebody holds them, and those that autograd saves."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.image, self.text = Tower(), Tower()  # in this order
        self.embedding_size = 0
        self.operations: list[Operation] = []
        self._tower = self.image
        self._made = weakref.WeakSet[Any](tensor.untyped_storage() for tensor in weights)
        self._saved = weakref.WeakSet[Any](self._made)
        self._alive_bytes = self._saved_bytes = 0
        self._at_start: list[tuple[int, int]] = []

    @property
    def peak_bytes(self) -> int:
        """Of activations, in the forward pass or as the backward pass begins in either tower."""
        towers = (self.image, self.text)
        return max(max(tower.peak_bytes, tower.kept_bytes + tower.backward_bytes) for tower in towers)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._note_operation(func, args, kwargs or {}, result)
        for tensor in _tensors(result):
            self._note_storage(tensor)
        return result

    def _note_operation(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = func.name()
        if func.is_view or not name.startswith("aten::") or name.startswith(_MOVE_NOTHING):
            return
        written_bytes = sum(_moved_bytes(tensor) for tensor in _tensors(result))
        read_bytes = sum(_moved_bytes(tensor) for tensor in _tensors((*args, *kwargs.values())))
        if name.startswith(_LOOK_UPS):
            read_bytes = written_bytes
        count = flop_registry.get(func.overloadpacket)
        flops = float(count(*args, **kwargs, out_val=result)) if count is not None else 0.0
        self.operations.append(Operation("matmul" if flops else "other", flops, read_bytes + written_bytes))

    def note_attention(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        """Of one kernel: two matrix products, without the matrix of weights between them."""
        flops = 2.0 * query.numel() * key.shape[-2] + 2.0 * output.numel() * value.shape[-2]
        num_bytes = sum(_moved_bytes(tensor) for tensor in (query, key, value, output))
        self.operations.append(Operation("attention", flops, num_bytes))

    def _note_storage(self, tensor: Tensor) -> None:
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

    def starts(self, *_: Any) -> None:
        """A block or a tower."""
        self._at_start.append((self._saved_bytes, len(self.operations)))

    def block_ends(self, module: Any, inputs: Any, output: Any) -> None:
        saved_bytes = self._saved_bytes - self._ends(output)
        self._tower.largest_block_bytes = max(self._tower.largest_block_bytes, saved_bytes)

    def image_ends(self, module: Any, inputs: Any, output: Any) -> None:
        self._ends(output)
        self._tower.kept_bytes = self._saved_bytes
        self._tower = self.text
        self.starts()

    def text_ends(self, output: Any) -> None:
        self._ends(output)
        self._tower.kept_bytes = self._saved_bytes

    def _ends(self, output: Any) -> int:
        saved_bytes, first = self._at_start.pop()
        if not any(tensor.requires_grad for tensor in _tensors(output)):
            for operation in self.operations[first:]:
                operation.is_trained = False
        return saved_bytes


def forward_pass(
    network: nn.Module, num_photos: int, autocast_dtype: torch.dtype | None, *, gradient_checkpointing: bool = False
) -> ForwardPass:
    """Of an OpenCLIP network in training mode, over photos and as many captions, as long as they come.

    Args:
        network: on any device, neither read nor changed; parameters that need no gradient are frozen.
        autocast_dtype: None: fp32.
    """
    meta = _without_storage(network).train()
    meta.set_grad_checkpointing(False)
    noted = _run(meta, num_photos, autocast_dtype)
    if gradient_checkpointing:
        meta.set_grad_checkpointing(True)
        blocks, noted = noted, _run(meta, num_photos, autocast_dtype)
        for tower, whole in ((noted.image, blocks.image), (noted.text, blocks.text)):
            tower.again_bytes = whole.largest_block_bytes
        noted.operations = blocks.operations
    return noted


def _without_storage(network: nn.Module) -> Any:
    """A copy on the meta device, for which no weights are copied."""
    copies: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in network.buffers()}
    for parameter in network.parameters():
        copies[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    return copy.deepcopy(network, copies)


def image_size(network: Any) -> int:
    """Side of the photos that a network sees."""
    size = network.visual.image_size
    return int(size if isinstance(size, int) else size[0])


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _moved_bytes(tensor: Tensor) -> int:
    """No more than there are: of what is expanded, each number once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _run(network: Any, num_photos: int, autocast_dtype: torch.dtype | None) -> ForwardPass:
    side, trained = image_size(network), {name for name, p in network.named_parameters() if p.requires_grad}
    named = [*network.named_parameters(), *network.named_buffers()]
    with FakeTensorMode(), _cuda_autocast(autocast_dtype):
        tensors = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda", requires_grad=name in trained)
            for name, tensor in named
        }
        blocks = [block for name, parent in network.named_modules() if name.endswith("blocks") for block in parent.children()]
        noted = ForwardPass(list(tensors.values()))
        hooks = [module.register_forward_pre_hook(noted.starts) for module in (network.visual, *blocks)]
        hooks += [block.register_forward_hook(noted.block_ends) for block in blocks]
        hooks += [network.visual.register_forward_hook(noted.image_ends)]
        try:
            with noted, _fused_attention(noted), torch.autograd.graph.saved_tensors_hooks(noted.pack, lambda tensor: tensor):
                images_BCHW = torch.empty(num_photos, 3, side, side, device="cuda")
                tokens_BL = torch.zeros(num_photos, network.context_length, dtype=torch.long, device="cuda")
                found = functional_call(network, tensors, (images_BCHW, tokens_BL))
            image_BD, text_BD = (
                (found[f"{name}_features"] for name in ("image", "text")) if isinstance(found, dict) else found[:2]
            )
            noted.text_ends(text_BD)
            noted.embedding_size = image_BD.shape[-1]
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
def _fused_attention(noted: ForwardPass) -> Iterator[None]:
    """Without a GPU torch would choose its kernel of last resort, which keeps that matrix."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        output: Tensor = _FusedAttention.apply(query, key, value)
        noted.note_attention(query, key, value, output)
        return output

    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
