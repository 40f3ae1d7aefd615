"""Weights of CLIPModel and SiglipModel by the names and in the shapes that OpenCLIP gives them, and back; no number changes.

Names are those of transformers' ``modeling_clip`` and ``modeling_siglip``, of OpenCLIP's ``transformer`` and of timm's
``vision_transformer``, looked up there.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fashionclip_tune.errors import UserError
from fashionclip_tune.models.weights import read_weights

INDEX_SUFFIX = ".index.json"
# By how an OpenCLIP name begins: how the one in transformers does.
_OUTSIDE_OF_BLOCKS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "visual.trunk.pos_embed": "vision_model.embeddings.position_embedding.weight",
    "visual.trunk.patch_embed.proj.": "vision_model.embeddings.patch_embedding.",
    "visual.trunk.norm.": "vision_model.post_layernorm.",
    "visual.trunk.attn_pool.latent": "vision_model.head.probe",
    "visual.trunk.attn_pool.q.": "vision_model.head.attention.in_proj_",
    "visual.trunk.attn_pool.kv.": "vision_model.head.attention.in_proj_",
    "visual.trunk.attn_pool.proj.": "vision_model.head.attention.out_proj.",
    "visual.trunk.attn_pool.norm.": "vision_model.head.layernorm.",
    "visual.trunk.attn_pool.mlp.": "vision_model.head.mlp.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text.token_embedding.": "text_model.embeddings.token_embedding.",
    "text.ln_final.": "text_model.final_layer_norm.",
    "text.text_projection.": "text_model.head.",
    "logit_": "logit_",
}
_BLOCKS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.trunk.blocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "text.transformer.resblocks.": "text_model.encoder.layers.",
}
_IN_A_BLOCK = {
    "ln_1.": "layer_norm1.",
    "norm1.": "layer_norm1.",
    "attn.in_proj_": "self_attn.{}_proj.",
    "attn.qkv.": "self_attn.{}_proj.",
    "attn.out_proj.": "self_attn.out_proj.",
    "attn.proj.": "self_attn.out_proj.",
    "ln_2.": "layer_norm2.",
    "norm2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "mlp.fc2.": "mlp.fc2.",
}
_TRANSPOSED = ("visual.proj", "text_projection")
# Numbers of positions, which older versions saved.
_NO_WEIGHTS = {f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")}
_MOST_NAMES = 5


def read_transformers_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of ``model.safetensors`` or ``pytorch_model.bin``, or of all files that an index of them names.

    Raises:
        UserError: a file is missing, holds code, or no weights.
    """
    if not file.name.endswith(INDEX_SUFFIX):
        return read_weights(file)
    try:
        names = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
        parts = [file.parent / name for name in names]
        lacking = [part.name for part in parts if not part.is_file()]
        elsewhere = [name for name, part in zip(names, parts, strict=True) if part.name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {error!r}") from error
    if lacking or elsewhere:
        raise UserError(f"{file} names files that are not beside it: {', '.join(lacking or elsewhere)}")
    return {name: tensor for part in parts for name, tensor in read_weights(part).items()}


def to_openclip(
    weights: Mapping[str, Tensor], network: nn.Module, where: object = "a folder of transformers"
) -> dict[str, Tensor]:
    """Weights of a CLIPModel or SiglipModel as the state dict of OpenCLIP's network of the same shape.

    Args:
        where: what they are said to come from.

    Raises:
        UserError: tensors are missing, of another shape, or left over; names them.
    """
    wanted, found = network.state_dict(), dict[str, Tensor]()
    missing, misshapen, used = list[str](), list[str](), set[str]()
    for theirs, ours in _pairs(list(wanted)):
        used.update(theirs)
        if lacking := [name for name in theirs if name not in weights]:
            missing += lacking
            continue
        tensors = [weights[name] for name in theirs]
        joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        shapes = [wanted[name].shape for name in ours]
        target = shapes[0] if len(ours) == 1 else torch.Size([sum(shape[0] for shape in shapes), *shapes[0][1:]])
        if ours[0] in _TRANSPOSED and joined.ndim == 2:
            joined = joined.T
        if _without_ones(joined.shape) != _without_ones(target) or len({tensor.shape for tensor in tensors}) > 1:
            misshapen.append(f"{theirs[0]} {list(tensors[0].shape)}")
            continue
        rows = [shape[0] for shape in shapes] if len(ours) > 1 else []
        parts = joined.split(rows) if rows else [joined]
        for name, part in zip(ours, parts, strict=True):
            found[name] = part.reshape(wanted[name].shape).contiguous()
    left_over = sorted(weights.keys() - used - _NO_WEIGHTS)
    _refuse({"missing": missing, "of another shape": misshapen, "left over": left_over}, f"{where}: its weights")
    return found


def to_transformers(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of OpenCLIP's network as that of the CLIPModel or SiglipModel of the same shape.

    Args:
        wanted: the latter's own state dict, for its shapes; it may have no storage.

    Raises:
        UserError: not all of it comes from the network, or not all of the network has a place there; names what does not.
    """
    unknown = [name for name in weights if not _their_names(name)]
    found = dict[str, Tensor]()
    for theirs, ours in _pairs([name for name in weights if name not in unknown]):
        joined = torch.cat([weights[name] for name in ours]) if len(ours) > 1 else weights[ours[0]]
        joined = joined.T if ours[0] in _TRANSPOSED else joined
        for name, part in zip(theirs, joined.chunk(len(theirs)) if len(theirs) > 1 else [joined], strict=True):
            if name in wanted and _without_ones(part.shape) == _without_ones(wanted[name].shape):
                part = part.reshape(wanted[name].shape)
            found[name] = part.clone(memory_format=torch.contiguous_format)  # a file's tensors share no memory
    shared = found.keys() & wanted.keys()
    misshapen = [f"{name} {list(found[name].shape)}" for name in sorted(shared) if found[name].shape != wanted[name].shape]
    missing, left_over = sorted(wanted.keys() - shared), unknown + sorted(found.keys() - shared)
    _refuse({"missing": missing, "of another shape": misshapen, "left over": left_over}, "the network's weights")
    return found


def _pairs(names: Sequence[str]) -> list[tuple[tuple[str, ...], list[str]]]:
    """Names in transformers and in OpenCLIP whose tensors, one below the other, are the same."""
    pairs = dict[tuple[str, ...], list[str]]()
    for name in names:
        pairs.setdefault(_their_names(name) or (name,), []).append(name)
    return list(pairs.items())


def _their_names(name: str) -> tuple[str, ...]:
    """Of an OpenCLIP name; three of a joined projection, none where there is no counterpart."""
    for prefix, theirs in _BLOCKS.items():
        if name.startswith(prefix):
            number, _, inside = name.removeprefix(prefix).partition(".")
            renamed = _renamed(inside, _IN_A_BLOCK)
            each = dict.fromkeys(renamed.format(letter) for letter in "qkv") if renamed else ()
            return tuple(f"{theirs}{number}.{one}" for one in each)
    renamed = _renamed(name, _OUTSIDE_OF_BLOCKS)
    return (renamed,) if renamed else ()


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    return next((new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)), "")


def _without_ones(shape: torch.Size) -> list[int]:
    """Positions, scale and bias have a dimension more in one of the two."""
    return [size for size in shape if size != 1]


def _refuse(faults: Mapping[str, Sequence[str]], what: str) -> None:
    named = list[str]()
    for fault, names in faults.items():
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        named += [f"{len(names)} {fault} ({', '.join(names[:_MOST_NAMES])}{more})"] if names else []
    if named:
        raise UserError(f"{what} do not fit: {'; '.join(named)}")
