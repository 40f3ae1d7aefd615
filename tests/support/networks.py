"""Networks of tests: small ones, ones without numbers, ones as if trained."""

import copy
import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP, CustomTextCLIP

from fashionclip_tune.models.openclip import LoadedModel
from fashionclip_tune.models.tiny import register_tiny_models

SMALL: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
    "text_cfg": {"context_length": 12, "vocab_size": 100, "width": 64, "heads": 2, "layers": 2},
}


def lite(folder: Path, trunk: str = "tf_efficientnet_lite0") -> str:
    """A folder without weights: a convolutional image tower of timm's, small."""
    text = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    image = {"timm_model_name": trunk, "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    described = {"model_cfg": {"embed_dim": 32, "vision_cfg": image, "text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return f"local-dir:{folder}"


def built(model_config: dict[str, Any], **changes: Any) -> Any:
    """OpenCLIP's network of a configuration, with changes to both towers."""
    wanted = copy.deepcopy(model_config)
    for tower in ("vision_cfg", "text_cfg"):
        wanted[tower].update(changes)
    make = CustomTextCLIP if wanted.pop("custom_text", False) else CLIP
    torch.manual_seed(0)
    return make(**wanted).train()


@cache
def on_meta(name: str, **overrides: Any) -> Any:
    """The architecture without its numbers."""
    register_tiny_models()
    logging.disable(logging.WARNING)  # OpenCLIP warns that there are no weights
    try:
        with torch.device("meta"):
            return open_clip.create_model(name, pretrained_text=False, device="meta", **overrides)
    finally:
        logging.disable(logging.NOTSET)


def frozen(network: Any) -> set[str]:
    """Names of the parameters that are not trained."""
    return {name for name, parameter in network.named_parameters() if not parameter.requires_grad}


def scrambled(loaded: LoadedModel) -> LoadedModel:
    """As if trained: scale and bias are not what any constructor gives them."""
    with torch.no_grad():
        for parameter in loaded.network.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
        loaded.network.logit_scale.fill_(3.25)
    return loaded
