"""What an architecture has and takes, found out without its weights: options, computing, its large table."""

import copy
import math
from collections.abc import Mapping
from dataclasses import fields
from functools import cache, lru_cache
from typing import Any

import open_clip
import torch
from torch.utils.flop_counter import FlopCounterMode

from fashionclip_tune.config.choices import BatchNorms
from fashionclip_tune.config.options import FreezeConfig
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.config.section import value_at
from fashionclip_tune.errors import UnavailableError, UserError
from fashionclip_tune.models.batch_norms import batch_norms, check_one_pass
from fashionclip_tune.models.foreign_code import no_foreign_code
from fashionclip_tune.models.hub import text_tower_here
from fashionclip_tune.models.openclip import openclip_is_quiet, reason_of
from fashionclip_tune.models.starts import check_architecture, find_start
from fashionclip_tune.models.token_rows import FIRST_EDITION, USUAL_ROWS, use_token_rows
from fashionclip_tune.models.towers import parameter_groups, prepare_towers


def check_model_options(config: ProjectConfig) -> None:
    """Refuses what a ``Trainer`` would refuse of ``freeze``, patch dropout, layer decay and batch norms that are updated.

    Nothing is built where they have their defaults, which every model can take.

    Raises:
        UserError: no such architecture, or it lacks what an option needs.
    """
    model_config = check_architecture(config.model_name)
    plain = ProjectConfig(clip_model=config.clip_model)
    paths = (*_CHECKED, *_ONE_PASS) if config.model.batch_norm is BatchNorms.UPDATE else _CHECKED
    asked = plain.with_overrides({path: value_at(config, path) for path in paths})
    if asked != plain and has_known_text_tower(model_config):
        _try(asked)


_CHECKED = (
    *(f"freeze.{field.name}" for field in fields(FreezeConfig)),
    *("model.patch_dropout", "optimizer.layer_decay", "model.batch_norm"),
)
# Where batch norms are updated, a step is one pass of the whole batch.
_ONE_PASS = ("training.batch_size", "training.micro_batch_size", "hardware.gradient_checkpointing")


@lru_cache(maxsize=256)  # the draws of a space have few combinations of these
def _try(config: ProjectConfig) -> None:
    network = meta_model(config.model_name)
    prepare_towers(network, config)
    check_one_pass(network, config)
    parameter_groups(network, config.training, config.optimizer)


def has_known_text_tower(model_config: Mapping[str, Any]) -> bool:
    """Whether it is described here; text towers of the hub's ``transformers`` are described there only."""
    return "hf_model_name" not in model_config.get("text_cfg", {})


def may_have_batch_norms(name: str) -> bool:
    """Whether an architecture has batch norms, or is not known here well enough to tell."""
    return not has_known_text_tower(check_architecture(name)) or bool(batch_norms(meta_model(name)))


def meta_model(name: str) -> Any:
    """An architecture on the meta device, the caller's own."""
    return copy.deepcopy(_built(name))  # else what one freezes or drops, others would find frozen and dropped


def planned_network(config: ProjectConfig, clip_rows: int = USUAL_ROWS) -> Any:
    """An architecture on the meta device with what a run trains of it.

    Args:
        clip_rows: of the token table, that the captions have by CLIP's tokenizer. Others cut texts otherwise, and need not be
            here: twice as many are taken for granted.
    """
    network = meta_model(config.model_name)
    is_clips = "hf_tokenizer_name" not in check_architecture(config.model_name)["text_cfg"]
    use_token_rows(network, config, clip_rows if is_clips else 2 * clip_rows)
    prepare_towers(network, config)
    return network


@lru_cache(maxsize=8)
def _built(name: str) -> Any:
    start = find_start(name, None)
    tower = text_tower_here(start.model_config)
    try:
        with openclip_is_quiet(), no_foreign_code(name), torch.device("meta"):
            return open_clip.create_model(
                start.openclip_name, load_weights=False, pretrained_text=False, device="meta", **tower
            )
    except UserError:
        raise
    except Exception as error:  # open_clip, timm and the hub's client raise many types
        kind = UnavailableError if isinstance(error, OSError) else UserError
        raise kind(f"clip_model = {name!r} cannot be built as it is described: {reason_of(error)}") from error


@cache
def forward_flops(model_name: str) -> float:
    """Floating-point operations of both towers for one photo and one caption; a training step takes about three times that.

    Counted on the meta device. Parameters would mislead: ViT-B-16 has fewer than ViT-B-32 and
    takes four times as long. Infinite for text towers that are described on the hub only.

    Raises:
        UserError: no such architecture.
    """
    if not has_known_text_tower(check_architecture(model_name)):
        return math.inf
    network = meta_model(model_name)
    size = network.visual.image_size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    photo = torch.empty(1, 3, *sides, device="meta")
    tokens = torch.zeros(1, network.context_length, dtype=torch.long, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.requires_grad_(False)
        network.eval()(photo, tokens)
    return float(counter.get_total_flops())


# An embedding table takes 16 bytes a number while it is trained: weight, gradient and Adam's two moments.
_TRAINED_BYTES = 16
_LARGE_TABLE_BYTES = 10**9
_SMALL_CARD_BYTES = 20 * 10**9
_TABLE = "freeze.token_embedding"


def with_default_freeze(config: ProjectConfig, card_bytes: int | None, given: Mapping[str, object]) -> ProjectConfig:
    """In the first edition a large token embedding is frozen on a small card, unless a space or ``--set`` speaks of it.

    Args:
        card_bytes: None: no card, or none that is known.
        given: settings by path that somebody has decided on.
    """
    if config.training.edition >= FIRST_EDITION or card_bytes is None or card_bytes >= _SMALL_CARD_BYTES:
        return config
    if _TABLE in given or not has_large_token_table(config):
        return config
    return config.with_overrides({_TABLE: True})


def has_large_token_table(config: ProjectConfig) -> bool:
    """Whether training the token embedding takes a GB or more: SigLIP2's, half of all its parameters, takes 3.1."""
    if not has_known_text_tower(check_architecture(config.model_name)):
        return False
    return _token_table_numbers(config.model_name) * _TRAINED_BYTES >= _LARGE_TABLE_BYTES


@cache
def _token_table_numbers(name: str) -> int:
    named = meta_model(name).named_parameters()
    return sum(parameter.numel() for path, parameter in named if "token_embedding." in path)
