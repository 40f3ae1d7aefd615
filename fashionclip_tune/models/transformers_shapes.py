"""Which of OpenCLIP's architectures a ``config.json`` of transformers describes, and the other way round.

``transformers_config`` is the one place that says what is equal in both: a folder is matched against what it makes of each of
OpenCLIP's architectures.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import open_clip
import timm
import torch
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fashionclip_tune.errors import UserError
from fashionclip_tune.models.description import DEFAULT_TAGS
from fashionclip_tune.models.tiny import TINY_MODELS, register_tiny_models

CLIP, SIGLIP = "clip", "siglip"
"""The two values of ``model_type`` that are read and written."""
_TANH = {"approximate": "tanh"}
_QUICK, _EXACT, _APPROXIMATE = "quick_gelu", "gelu", "gelu_pytorch_tanh"
_ACTIVATIONS = {CLIP: (_QUICK, _EXACT, _APPROXIMATE), SIGLIP: (_EXACT, _APPROXIMATE)}
# What is said of the network elsewhere, or changes no embedding.
_TOP = {"embed_dim", "vision_cfg", "text_cfg", "custom_text", "quick_gelu"}
_TOP |= {"init_logit_bias", "init_logit_scale", "nonscalar_logit_scale"}
_SIZES = {"image_size", "patch_size", "width", "layers", "head_width", "heads", "mlp_ratio", "context_length", "vocab_size"}
_NEUTRAL = {"patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "pad_id", "eos_id", "act_kwargs", "norm_kwargs"}
_TOKENIZER = {"hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"}
# Of a tower's part: the first is set; CLIPModel takes the second from above; the others are the reader's to check.
_NOT_COMPARED = {"hidden_act", "projection_dim", "bos_token_id", "eos_token_id"}
_OF_TIMM = {"timm_model_name": None, "timm_pool": "map", "timm_proj": "none"}


def transformers_config(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of a CLIPModel or SiglipModel that computes the same, all that decides its embeddings said.

    Args:
        model_config: OpenCLIP's ``model_cfg``.

    Raises:
        UserError: there is none; names the settings for which transformers has no counterpart.
    """
    is_siglip = bool(model_config.get("vision_cfg", {}).get("timm_model_name"))
    text, odd = _text_config(model_config, is_siglip)
    vision, odd_vision = (_trunk_config if is_siglip else _vision_config)(model_config)
    odd = {**{key: model_config[key] for key in model_config if key not in _TOP}, **odd, **odd_vision}
    if bool(model_config.get("custom_text")) != is_siglip:
        odd["custom_text"] = model_config.get("custom_text", False)
    if is_siglip and model_config.get("init_logit_bias") is None:
        odd["init_logit_bias"] = None
    if odd:
        named = ", ".join(f"{key} = {value!r}" for key, value in odd.items())
        raise UserError(f"CLIPModel and SiglipModel of transformers have no counterpart of this architecture: {named}")
    if is_siglip:
        return {"architectures": ["SiglipModel"], "model_type": SIGLIP, "text_config": text, "vision_config": vision}
    config = {"architectures": ["CLIPModel"], "model_type": CLIP, "text_config": text, "vision_config": vision}
    return {**config, "projection_dim": model_config["embed_dim"]}


def _text_config(model_config: Mapping[str, Any], is_siglip: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tower's part, and the settings that have no counterpart."""
    said = {**asdict(open_clip.CLIPTextCfg()), **model_config.get("text_cfg", {})}
    fixed = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True} if is_siglip else {}
    odd = _odd("text_cfg", said, {**asdict(open_clip.CLIPTextCfg()), **fixed}, _TOKENIZER if is_siglip else set())
    text = {
        "model_type": "siglip_text_model" if is_siglip else "clip_text_model",
        "vocab_size": said["vocab_size"],
        "hidden_size": said["width"],
        "intermediate_size": int(said["width"] * said["mlp_ratio"]),
        "num_hidden_layers": said["layers"],
        "num_attention_heads": said["heads"],
        "max_position_embeddings": said["context_length"],
        **_layers("text_cfg", model_config, said, odd),
    }
    if is_siglip:
        return {**text, "projection_size": model_config["embed_dim"], "bos_token_id": None, "eos_token_id": None}, odd
    last = said["vocab_size"] - 1
    return {**text, "projection_dim": model_config["embed_dim"], "bos_token_id": last - 1, "eos_token_id": last}, odd


def _vision_config(model_config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of OpenCLIP's own vision transformer; otherwise as ``_text_config``."""
    said = {**asdict(open_clip.CLIPVisionCfg()), **model_config.get("vision_cfg", {})}
    odd = _odd("vision_cfg", said, asdict(open_clip.CLIPVisionCfg()), set())
    if not isinstance(said["layers"], int):  # a ResNet
        return {}, {**odd, "vision_cfg.layers": said["layers"]}
    return {
        "model_type": "clip_vision_model",
        "num_channels": 3,
        "image_size": said["image_size"],
        "patch_size": said["patch_size"],
        "hidden_size": said["width"],
        "intermediate_size": int(said["width"] * said["mlp_ratio"]),
        "num_hidden_layers": said["layers"],
        "num_attention_heads": said["width"] // said["head_width"],
        "projection_dim": model_config["embed_dim"],
        **_layers("vision_cfg", model_config, said, odd),
    }, odd


def _trunk_config(model_config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a timm trunk, whose name alone says its shape; otherwise as ``_text_config``."""
    said = {**asdict(open_clip.CLIPVisionCfg()), **model_config["vision_cfg"]}
    name = said["timm_model_name"]
    wanted = {**asdict(open_clip.CLIPVisionCfg()), **_OF_TIMM, "timm_model_name": name}
    # OpenCLIP sets it by itself; activations are compared by the caller.
    odd = _odd("vision_cfg", said, wanted, {"timm_model_pretrained"})
    trunk = None if odd else _trunk(name)
    if trunk is None:
        return {}, {"vision_cfg.timm_model_name": name, **odd}
    if [trunk["image_size"], trunk["hidden_size"]] != [said["image_size"], model_config["embed_dim"]]:
        odd |= {"vision_cfg.image_size": said["image_size"], "embed_dim": model_config["embed_dim"]}
    tanh = said["act_kwargs"] == _TANH
    if said["act_kwargs"] is not None and not tanh:
        odd["vision_cfg.act_kwargs"] = said["act_kwargs"]
    fixed = {"model_type": "siglip_vision_model", "num_channels": 3, "vision_use_head": True}
    return {**fixed, **trunk, "hidden_act": _APPROXIMATE if tanh else _EXACT}, odd


@lru_cache(maxsize=32)
def _trunk(name: str) -> dict[str, Any] | None:
    """A vision transformer of timm that pools as SigLIP does; None: it is another network."""
    if not timm.is_model(name):
        return None
    try:
        with torch.device("meta"):
            trunk = timm.create_model(name, num_classes=0, global_pool="map")
    except (TypeError, AssertionError, RuntimeError, ValueError):  # of networks that do not pool so
        return None
    activations = {module.approximate for module in trunk.modules() if isinstance(module, nn.GELU)}
    epsilons = {module.eps for module in trunk.modules() if isinstance(module, nn.LayerNorm)}
    is_plain = type(trunk) is VisionTransformer and isinstance(trunk.attn_pool, AttentionPoolLatent)
    if not is_plain or trunk.cls_token is not None or activations != {"none"} or len(epsilons) != 1:
        return None
    block = trunk.blocks[0]
    return {
        "image_size": trunk.patch_embed.img_size[0],
        "patch_size": trunk.patch_embed.patch_size[0],
        "hidden_size": trunk.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "layer_norm_eps": epsilons.pop(),
    }


def _odd(part: str, said: Mapping[str, Any], wanted: Mapping[str, Any], also_neutral: set[str]) -> dict[str, Any]:
    neutral = _SIZES | _NEUTRAL | also_neutral
    return {f"{part}.{key}": value for key, value in said.items() if key not in neutral and value != wanted.get(key)}


def _layers(part: str, model_config: Mapping[str, Any], said: Mapping[str, Any], odd: dict[str, Any]) -> dict[str, Any]:
    """Activation and epsilon of a tower's layers; what is none of transformers' goes to ``odd``."""
    norm, activation, quick = said["norm_kwargs"] or {}, said["act_kwargs"], model_config.get("quick_gelu", False)
    if set(norm) - {"eps"}:
        odd[f"{part}.norm_kwargs"] = norm
    if activation not in (None, _TANH) or (activation is not None and quick):
        odd[f"{part}.act_kwargs"] = activation
    hidden = _QUICK if quick else _EXACT if activation is None else _APPROXIMATE
    return {"hidden_act": hidden, "layer_norm_eps": norm.get("eps", nn.LayerNorm(1).eps)}


def find_architecture(config: Mapping[str, Any], where: object) -> tuple[str, dict[str, Any]]:
    """OpenCLIP's architecture of the same shape, and its ``model_cfg`` with the activations that ``config`` names.

    Args:
        config: as ``CLIPConfig`` or ``SiglipConfig`` of transformers gives it: all fields said.
        where: what it is read from, for messages.

    Raises:
        UserError: none has this shape; names what differs from the nearest one.
    """
    register_tiny_models()
    text_act, image_act = config["text_config"]["hidden_act"], config["vision_config"]["hidden_act"]
    allowed = _ACTIVATIONS[config["model_type"]]
    if not {text_act, image_act} <= set(allowed) or ((text_act == _QUICK) != (image_act == _QUICK)):
        raise UserError(
            f"{where}: hidden_act = {text_act!r} of the text tower and {image_act!r} of the image tower are not supported: "
            f"{', '.join(allowed)} are{', quick_gelu of both towers or of none' if _QUICK in allowed else ''}"
        )
    nearest = list[tuple[list[str], str, dict[str, Any]]]()
    for name, model_config in _candidates(config):
        try:
            ours = transformers_config(model_config)
        except UserError:
            continue
        differing = _differences(config, ours)
        nearest.append((differing, name, model_config))
    # Of those of the same shape, one with the same activations comes first.
    nearest.sort(key=lambda each: (len(each[0]), each[2] != _with_activations(each[2], text_act, image_act)))
    if not nearest or nearest[0][0]:
        differing, name = (nearest[0][0], nearest[0][1]) if nearest else ([], "")
        said = f"; the nearest one is {name}: {', '.join(differing)}" if nearest else ""
        raise UserError(f"{where} has a shape that no {config['model_type']} architecture of OpenCLIP has{said}")
    _, name, model_config = nearest[0]
    return name, _with_activations(model_config, text_act, image_act)


def _candidates(config: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Those of the same family whose text tower and photos' size are nearest; a trunk's shape takes longer to know."""
    found = list[tuple[int, str, dict[str, Any]]]()
    for name in dict.fromkeys([*DEFAULT_TAGS, *TINY_MODELS, *open_clip.list_models()]):
        model_config = open_clip.get_model_config(name)
        is_siglip = bool(model_config["vision_cfg"].get("timm_model_name"))
        if is_siglip != (config["model_type"] == SIGLIP):
            continue
        text, odd = _text_config(model_config, is_siglip)
        if not odd:
            image_size = model_config["vision_cfg"].get("image_size", open_clip.CLIPVisionCfg().image_size)
            ours = {"text_config": text, "vision_config": {"image_size": image_size}}
            found.append((len(_differences(config, ours)), name, model_config))
    fewest = min((count for count, *_ in found), default=0)
    return [(name, model_config) for count, name, model_config in found if count == fewest]


def _differences(config: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Fields that decide shapes and have another value in ``config``: activations can be set."""
    found = list[str]()
    if "projection_dim" in ours and config["projection_dim"] != ours["projection_dim"]:
        found.append(f"projection_dim = {config['projection_dim']!r}, not {ours['projection_dim']!r}")
    for part in ("text_config", "vision_config"):
        for key, value in ours[part].items():
            theirs = config[part].get(key, value)  # older versions have fewer fields
            if key not in _NOT_COMPARED and theirs != value:
                found.append(f"{part}.{key} = {theirs!r}, not {value!r}")
    return found


def _with_activations(model_config: Mapping[str, Any], text: str, image: str) -> dict[str, Any]:
    changed = {key: dict(value) if isinstance(value, dict) else value for key, value in model_config.items()}
    changed["quick_gelu"] = text == _QUICK
    changed["text_cfg"]["act_kwargs"] = _TANH if text == _APPROXIMATE else None
    changed["vision_cfg"]["act_kwargs"] = _TANH if image == _APPROXIMATE else None
    for part in (changed, changed["text_cfg"], changed["vision_cfg"]):
        for key in ("quick_gelu", "act_kwargs"):
            if not part.get(key, True):
                del part[key]
    return changed


def activation_notes(model_config: Mapping[str, Any]) -> list[str]:
    """What OpenCLIP reads past: it builds timm's towers with an activation of their own. A sentence, or none."""
    if not _trunks_activation(model_config):
        return []
    return [
        "the image tower approximates GELU by tanh, as it was trained; OpenCLIP itself computes GELU exactly there, which "
        "moves image embeddings of length 1 by some 2e-4; a folder for transformers keeps them"
    ]


def set_activation(network: nn.Module, model_config: Mapping[str, Any]) -> None:
    """Gives a timm trunk the activation that ``vision_cfg.act_kwargs`` says; nothing where it says none.

    SigLIP was trained with the approximation of GELU by tanh, which transformers computes. OpenCLIP's trunk has the exact one:
    on random weights, embeddings of length 1 are 2e-4 apart.
    """
    if activation := _trunks_activation(model_config):
        for module in network.visual.trunk.modules():  # type: ignore[union-attr]
            if isinstance(module, nn.GELU):
                module.approximate = activation["approximate"]


def _trunks_activation(model_config: Mapping[str, Any]) -> dict[str, Any] | None:
    vision = model_config["vision_cfg"]
    return vision.get("act_kwargs") if vision.get("timm_model_name") else None
