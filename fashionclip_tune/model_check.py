"""Whether a model has what a configuration freezes, drops or tells apart, found out without its weights."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import open_clip
import torch

from fashionclip_tune.architectures import check_architecture
from fashionclip_tune.config import ProjectConfig
from fashionclip_tune.foreign_code import no_foreign_code
from fashionclip_tune.model import openclip_is_quiet
from fashionclip_tune.recipe import FreezeConfig
from fashionclip_tune.towers import parameter_groups, prepare_towers


def check_model_options(config: ProjectConfig) -> None:
    """Refuses what a ``Trainer`` would refuse of ``freeze``, ``model.patch_dropout`` and ``optimizer.layer_decay``.

    Nothing is built where they have their defaults, which every model can take.

    Raises:
        UserError: no such architecture, or it lacks what an option needs.
    """
    model_config = check_architecture(config.model_name)
    if config.freeze == FreezeConfig() and config.model.patch_dropout == 0 and config.optimizer.layer_decay == 1:
        return
    if has_known_text_tower(model_config):
        _try(config.model_name, config.freeze, config.model.patch_dropout, config.optimizer.layer_decay)


@lru_cache(maxsize=256)  # the draws of a space have few combinations of these
def _try(name: str, freeze: FreezeConfig, patch_dropout: float, layer_decay: float) -> None:
    config = replace(ProjectConfig(clip_model=name), freeze=freeze).with_overrides(
        {"model.patch_dropout": patch_dropout, "optimizer.layer_decay": layer_decay}
    )
    network = without_numbers(name)
    prepare_towers(network, config)
    parameter_groups(network, config.training, config.optimizer)


def has_known_text_tower(model_config: Mapping[str, Any]) -> bool:
    """Whether it is described here; text towers of the hub's ``transformers`` are described there only."""
    return "hf_model_name" not in model_config.get("text_cfg", {})


def without_numbers(name: str) -> Any:
    """An architecture on the meta device, the caller's own."""
    return copy.deepcopy(_built(name))  # else what one freezes or drops, others would find frozen and dropped


@lru_cache(maxsize=8)
def _built(name: str) -> Any:
    check_architecture(name)  # which makes the tiny towers known
    with openclip_is_quiet(), no_foreign_code(name), torch.device("meta"):
        return open_clip.create_model(name, load_weights=False, pretrained_text=False, device="meta")
