"""Which tower and depth each parameter has, and what follows: its learning rate, whether it is frozen, compilation."""

import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from open_clip.transformer import PatchDropout, VisionTransformer
from timm.models import group_parameters
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from fashionclip_tune.config.options import OptimizerConfig, TrainingConfig
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.batch_norms import keep_statistics
from fashionclip_tune.models.sequences import CausalText, use_own_attention

Encode = Callable[..., Tensor]


def encoders(network: Any, device: torch.device, *, compiled: bool, text: CausalText | None = None) -> tuple[Encode, Encode]:
    """``encode_image`` and ``encode_text`` of a model; the latter of captions of any length where ``text`` cuts them.

    The functions are compiled and not the modules: names in the state dict stay what they are, and evaluation, which calls
    the modules, stays as exact as it is without.

    Raises:
        UserError: this machine has no compiler.
    """
    encode_text = network.encode_text if text is None else text.encode
    if not compiled:
        return network.encode_image, encode_text
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"hardware.compile = True is not possible here: there is no C++ compiler {compiler!r} (install g++, or name one "
            "in CXX); allowed is false"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("hardware.compile = True is not possible here: Triton is not installed; allowed is false")
    return torch.compile(network.encode_image), torch.compile(encode_text)


Tower = Literal["image", "text", "logits"]

_BLOCK = re.compile(r"(?:visual\.|text\.)?(?:transformer\.resblocks|trunk\.blocks)\.([0-9]+)\.")
_EMBEDDINGS = re.compile(
    r"visual\.(class_embedding|positional_embedding|conv1\.|ln_pre\.)"
    r"|visual\.trunk\.(patch_embed\.|pos_embed|cls_token|reg_token|norm_pre\.)"
    r"|(text\.)?(token_embedding\.|positional_embedding|cls_emb)"
)
_HEADS = re.compile(
    r"visual\.(ln_post\.|proj|attn_pool\.)"
    r"|visual\.trunk\.(norm\.|fc_norm\.|attn_pool\.|head\.)|visual\.head\."
    r"|(text\.)?(ln_final\.|text_projection)"
)


@dataclass(frozen=True)
class Place:
    """Of one parameter. ``depth`` is None in scale and bias, and in towers whose layers nobody knows."""

    tower: Tower
    depth: int | None
    num_blocks: int
    """Of its tower."""

    @property
    def layers_above(self) -> int | None:
        return None if self.depth is None else self.num_blocks + 1 - self.depth


def parameter_places(network: nn.Module) -> dict[str, Place]:
    """The place of every parameter, by name."""
    names = [name for name, _ in network.named_parameters()]
    blocks = {tower: 0 for tower in ("image", "text", "logits")}
    for name in names:
        if match := _BLOCK.match(name):
            blocks[_tower(name)] = max(blocks[_tower(name)], 1 + int(match[1]))
    places = {name: Place(_tower(name), _depth(name, blocks[_tower(name)]), blocks[_tower(name)]) for name in names}
    is_plain = all(place.depth is not None for place in places.values() if place.tower == "image")
    return places if is_plain else {**places, **_places_by_timm(network)}


def _places_by_timm(network: Any) -> dict[str, Place]:
    """Of the image tower's parameters, as timm groups those of its trunk for layer decay; empty: it is none of timm's.

    The grouping is timm's finest, a residual block each most often: so many are as much as in a transformer. Its first
    group is the stem. What its patterns leave out, a classifier or the norm before it, is a head.
    """
    trunk: Any = getattr(network.visual, "trunk", None)
    if not hasattr(trunk, "group_matcher"):
        return {}
    matcher = trunk.group_matcher(coarse=False)
    specs = [".*"]  # of a function, which places all
    if isinstance(matcher, Mapping):
        specs = [spec for each in matcher.values() for spec in (each if isinstance(each, list | tuple) else [each])]
    patterns = [re.compile(spec if isinstance(spec, str) else spec[0]) for spec in specs if spec is not None]
    groups = group_parameters(trunk, matcher, reverse=True)
    known = {name: group for name, group in groups.items() if any(pattern.match(name) for pattern in patterns)}
    num_blocks = max(known.values())
    names = [name for name, _ in network.named_parameters() if _tower(name) == "image"]
    depths = {name: known.get(name.removeprefix("visual.trunk."), num_blocks + 1) for name in names}
    return {name: Place("image", depth, num_blocks) for name, depth in depths.items()}


def _tower(name: str) -> Tower:
    if name in ("logit_scale", "logit_bias"):
        return "logits"
    return "image" if name.startswith("visual.") else "text"


def _depth(name: str, num_blocks: int) -> int | None:
    if match := _BLOCK.match(name):
        return 1 + int(match[1])
    if num_blocks and _EMBEDDINGS.match(name):
        return 0
    return num_blocks + 1 if num_blocks and _HEADS.match(name) else None


def is_vision_transformer(network: Any) -> bool:
    """Whether the image tower is one of OpenCLIP's own or timm's: its one convolution cuts the photo into patches."""
    return isinstance(getattr(network.visual, "trunk", network.visual), VisionTransformer | TimmVisionTransformer)


def parameter_groups(network: nn.Module, training: TrainingConfig, rates: OptimizerConfig) -> list[dict[str, Any]]:
    """An optimizer's groups of what is not frozen: equal learning rate, equal decay.

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
    return [
        {"params": parameters, "peak_rate": peak_rate, "weight_decay": decay}
        for (peak_rate, decay), parameters in groups.items()
    ]


def _peak_rate(name: str, place: Place, training: TrainingConfig, rates: OptimizerConfig) -> float:
    if place.tower == "logits":
        return training.learning_rate if rates.logit_learning_rate is None else rates.logit_learning_rate
    rate = training.learning_rate * (rates.image_rate if place.tower == "image" else rates.text_rate)
    if rates.layer_decay == 1:
        return rate
    if place.layers_above is None:
        raise UserError(
            f"optimizer.layer_decay = {rates.layer_decay} is not possible: the {place.tower} tower is no plain transformer "
            f"and none that timm groups, the layer of {name} is not known; allowed is 1"
        )
    return rate * rates.layer_decay**place.layers_above


def prepare_towers(network: Any, config: ProjectConfig) -> None:
    """Freezes, drops patches, keeps statistics, saves time and memory as the configuration says; ``network``, in training mode,
    is ready for an optimizer then.

    Raises:
        UserError: the model does not have what is to be frozen or dropped.
    """
    _freeze(network, config)
    keep_statistics(network, config)
    if config.training.edition >= 2:
        use_own_attention(network)
    if config.model.patch_dropout > 0:
        _drop_patches(network, config)
    if config.hardware.gradient_checkpointing:
        network.set_grad_checkpointing(True)


def _freeze(network: nn.Module, config: ProjectConfig) -> None:
    places = parameter_places(network)
    freeze = config.freeze
    _check_blocks(places, "image", freeze.image_blocks, config.model_name)
    _check_blocks(places, "text", freeze.text_blocks, config.model_name)
    whole: dict[str, bool] = {"image": freeze.image_tower, "text": freeze.text_tower, "logits": False}
    blocks: dict[str, int] = {"image": freeze.image_blocks, "text": freeze.text_blocks, "logits": 0}
    if freeze.token_embedding and not any("token_embedding." in name for name in places):
        raise UserError(f"freeze.token_embedding = True is not possible: {config.model_name} has no such parameter")
    for name, parameter in network.named_parameters():
        tower, depth = places[name].tower, places[name].depth
        is_low = blocks[tower] > 0 and depth is not None and depth <= blocks[tower]
        is_token_embedding = freeze.token_embedding and "token_embedding." in name
        if whole[tower] or is_low or is_token_embedding:
            parameter.requires_grad_(False)


def _check_blocks(places: Mapping[str, Place], tower: Tower, wanted: int, model_name: str) -> None:
    there = max((place.num_blocks for place in places.values() if place.tower == tower), default=0)
    unknown = [name for name, place in places.items() if place.tower == tower and place.depth is None]
    if wanted and unknown:
        raise UserError(
            f"freeze.{tower}_blocks = {wanted} is not possible: the {tower} tower of {model_name} is no plain transformer "
            f"and none that timm groups ({unknown[0]}); allowed is 0"
        )
    if wanted > there:
        raise UserError(
            f"freeze.{tower}_blocks = {wanted} is not possible: {model_name} has {there} there; allowed are 0 to {there}"
        )


def _drop_patches(network: Any, config: ProjectConfig) -> None:
    """OpenCLIP's module in both kinds of tower: it draws from torch's global generator on the CPU, tied to the step."""
    share, visual = config.model.patch_dropout, network.visual
    trunk: Any = getattr(visual, "trunk", None)
    if isinstance(visual, VisionTransformer):
        visual.patch_dropout = PatchDropout(share).train(network.training)
    elif hasattr(trunk, "patch_drop") and trunk.num_prefix_tokens <= 1:
        dropout = PatchDropout(share, exclude_first_token=trunk.num_prefix_tokens == 1)
        trunk.patch_drop = dropout.train(network.training)
    else:
        raise UserError(
            f"model.patch_dropout = {share} is not possible: the image tower of {config.model_name} is no vision transformer "
            "of a known kind; allowed is 0"
        )
