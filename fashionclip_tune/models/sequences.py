"""Sequences of patches and tokens within the towers, as they are computed in training: attention, how long, and which patches.

Patch dropout and other chance in a model do not depend on how a batch is cut into micro-batches.

Shape legend: B photos or captions, L patches or tokens, K patches that are kept, D width; H heads of J numbers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import PatchDropout as OpenClipPatchDropout
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from timm.layers.patch_dropout import PatchDropout as TimmPatchDropout
from torch import Tensor, nn
from torch.func import functional_call


class SelfAttention(nn.MultiheadAttention):
    """In training what OpenCLIP's own ``Attention`` (its ``block_type="custom"``) computes, to the bit.

    torch's class puts tokens before sequences, and copies queries, keys and values into one tensor each. The output is the
    same to the bit without; sums over all tokens, in the gradients of weights, have another order. Evaluation stays torch's,
    which has a shorter path there with bits of its own. OpenCLIP's custom blocks would draw other random weights, and in
    open_clip 3.3.0 they do not run with gradient checkpointing.
    """

    def forward(  # type: ignore[override]  # as OpenCLIP's blocks call it
        self, query: Tensor, key: Tensor, value: Tensor, *, need_weights: bool, attn_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if not self.training:
            return super().forward(query, key, value, need_weights=need_weights, attn_mask=attn_mask)
        qkv_BL3HJ = F.linear(query, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, -1))
        query_BHLJ, key_BHLJ, value_BHLJ = (part_BLHJ.transpose(1, 2) for part_BLHJ in qkv_BL3HJ.unbind(2))
        if attn_mask is not None and attn_mask.ndim == 3:  # one for each head of each sequence
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        found_BHLJ = F.scaled_dot_product_attention(query_BHLJ, key_BHLJ, value_BHLJ, attn_mask=attn_mask)
        return self.out_proj(found_BHLJ.transpose(1, 2).flatten(2)), None


def use_own_attention(network: nn.Module) -> None:
    """In place, in the blocks of OpenCLIP's own towers; parameters, their names and their order stay."""
    for block in network.modules():
        if isinstance(block, ResidualAttentionBlock) and not hasattr(block, "ln_1_kv"):  # it would attend to other sequences
            block.attn.__class__ = SelfAttention  # as torch's own parametrizations change a module's class


_LENGTHS = 8  # captions are cut to its multiples: few shapes, and those that matrix products on a GPU like


class CausalText:
    """A text tower in which a caption's embedding depends on nothing behind its end token: CLIP's.

    Each token attends to itself and to those before it, and the end token's output is the embedding. So the columns that
    only padding is in can be left out; embeddings and gradients are the same but for rounding.
    """

    def __init__(self, network: Any, tower: Any, pool_type: str, eos_id: int) -> None:
        self._network, self._tower = network, tower
        self._prefix = "" if tower is network else "text."
        self._pool_type, self._eos_id = pool_type, eos_id

    def cut(self, tokens_BL: Tensor) -> Tensor:
        """The columns up to the end of the longest caption of a batch, a multiple of 8 or all; on the CPU."""
        is_end_BL = tokens_BL == (self._eos_id if self._pool_type == "eos" else tokens_BL.amax(dim=1, keepdim=True))
        if not is_end_BL.any(dim=1).all():
            return tokens_BL
        last = int(is_end_BL.int().argmax(dim=1).max())  # of each caption the first one counts, as in OpenCLIP's pooling
        return tokens_BL[:, : (last // _LENGTHS + 1) * _LENGTHS].contiguous()

    def encode(self, tokens_BL: Tensor, *, normalize: bool) -> Tensor:
        """``encode_text``, which in OpenCLIP takes captions of full length only: positions and mask are cut for the call."""
        length = tokens_BL.shape[1]
        assert normalize, "the forward pass, which is all that can be called so, does"
        shorter = {
            f"{self._prefix}positional_embedding": self._tower.positional_embedding[:length],
            f"{self._prefix}attn_mask": self._tower.attn_mask[:length, :length],
        }
        found = functional_call(self._network, shorter, (None, tokens_BL), tie_weights=False)
        text_BD: Tensor = found["text_features"] if isinstance(found, dict) else found[1]
        return text_BD


def causal_text(network: Any) -> CausalText | None:
    """None: the tower looks ahead or pools elsewhere (SigLIP), appends a token (CoCa), or is not OpenCLIP's own."""
    if isinstance(network, CLIP):
        tower, pool_type, eos_id = network, network.text_pool_type, network.text_eos_id
    elif isinstance(network, CustomTextCLIP) and isinstance(network.text, TextTransformer):
        tower, pool_type, eos_id = network.text, network.text.pool_type, network.text.eos_id
    else:
        return None
    if tower.attn_mask is None or pool_type not in ("argmax", "eos") or len(tower.attn_mask) != network.context_length:
        return None
    return CausalText(network, tower, pool_type, eos_id)


class PatchDraws:
    """Which patches each photo of the effective batch keeps: drawn on the CPU for all of them, then cut."""

    def __init__(self) -> None:
        self._seed, self._batch_size, self._rows = 0, 0, slice(None)
        self._kept: dict[int, Tensor] = {}

    def begin_step(self, seed: int, batch_size: int) -> None:
        """Draws that were made in another attempt at the same step are made again."""
        self._seed, self._batch_size = seed, batch_size
        self._kept.clear()

    def choose(self, rows: slice) -> None:
        """The micro-batch that is encoded next."""
        self._rows = rows

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def kept(self, layer: int, num_prefix: int, num_patches: int, num_kept: int, device: torch.device) -> Tensor:
        """[B of the micro-batch, prefix + K] places in a photo's sequence: those of the prefix, then of the patches."""
        if layer not in self._kept:
            generator = torch.Generator().manual_seed(self._seed + layer)
            patches_BK = torch.rand(self._batch_size, num_patches, generator=generator).topk(num_kept, dim=1).indices
            prefix_BP = torch.arange(num_prefix).expand(self._batch_size, -1)
            kept_BK = torch.cat([prefix_BP, num_prefix + patches_BK], dim=1)
            if device.type == "cuda":  # from pinned memory, so that nothing waits for the copy
                kept_BK = kept_BK.pin_memory().to(device, non_blocking=True)
            self._kept[layer] = kept_BK
        return self._kept[layer][self._rows]


class SharedPatchDropout(nn.Module):
    """Patch dropout (Li et al. 2023, FLIP) as OpenCLIP's and timm's, but for where its draws come from."""

    def __init__(self, prob: float, num_prefix_tokens: int, draws: PatchDraws, layer: int) -> None:
        super().__init__()
        self.prob = prob
        self._num_prefix_tokens = num_prefix_tokens
        self._draws = draws
        self._layer = layer

    def forward(self, x_BLD: Tensor) -> Tensor:
        if not self.training or self.prob == 0:
            return x_BLD
        num_patches = x_BLD.shape[1] - self._num_prefix_tokens
        num_kept = max(1, int(num_patches * (1 - self.prob)))
        kept_BK = self._draws.kept(self._layer, self._num_prefix_tokens, num_patches, num_kept, x_BLD.device)
        # Not by gather, whose deterministic backward pass on a GPU has an index of 8 bytes for each number.
        return x_BLD[torch.arange(len(x_BLD), device=x_BLD.device)[:, None], kept_BK]


def share_patch_draws(network: nn.Module) -> PatchDraws:
    """Replaces a network's patch dropout in place; it has no weights, so nothing else notices."""
    draws, layer = PatchDraws(), 0
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, OpenClipPatchDropout):
                num_prefix_tokens = int(child.exclude_first_token)
            elif isinstance(child, TimmPatchDropout):
                num_prefix_tokens = child.num_prefix_tokens
            else:
                continue
            setattr(parent, name, SharedPatchDropout(child.prob, num_prefix_tokens, draws, layer).train(child.training))
            layer += 1
    return draws


_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def tied_to_micro_batch(network: nn.Module) -> list[str]:
    """Modules of other dropout, whose numbers depend on how a batch is cut.

    The three published models and the tiny ones have none.
    """
    names = []
    for name, module in network.named_modules():
        probability = 0.0
        if isinstance(module, _DROPOUT):
            probability = module.p
        elif isinstance(module, nn.MultiheadAttention):
            probability = module.dropout
        elif type(module).__name__ == "DropPath":
            probability = module.drop_prob or 0.0
        elif type(module).__name__ == "PatchDropoutWithIndices":
            probability = module.prob
        if probability > 0:
            names.append(name)
    return names
