"""The data that a sweep is about: found, indexed, looked over, and compared with what it was."""

import logging
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import open_clip

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.batches import copy_first_shards
from fashionclip_tune.data.dataset import RunShards, cached_index, leaking_products, run_shards, storage_of
from fashionclip_tune.data.index import ShardIndex, count_kinds, gaps_in_captions
from fashionclip_tune.data.tokens import occurring_tokens
from fashionclip_tune.errors import UserError
from fashionclip_tune.files import cache_dir
from fashionclip_tune.models.token_rows import FIRST_EDITION, USUAL_ROWS
from fashionclip_tune.progress import progress_bar
from fashionclip_tune.storage.urls import scheme_of
from fashionclip_tune.synthetic import GarmentRecipe, cached_dataset

_log = logging.getLogger(__name__)

_SHOWN = 4


def describe_data(train: ShardIndex, valid: ShardIndex) -> dict[str, Any]:
    """What ``data_changes`` compares: photos, products and each shard's checksum, for each split."""
    return {
        split: {
            "photos": len(index),
            "products": len(set(index.product_ids.tolist())),
            "shards": {shard.name: content.checksum for shard, content in zip(index.shards, index.contents, strict=True)},
        }
        for split, index in (("train", train), ("valid", valid))
    }


def check_batches(configs: Sequence[ProjectConfig], largest: int, train: ShardIndex) -> None:
    """
    Args:
        configs: draws of the space.
        largest: the largest batch that it may draw.

    Raises:
        UserError: there are not as many photos to train on, or, for batches of unique products, not as many products.
    """
    where = f"to train on in {configs[0].dataset_dir}"
    if largest > len(train):
        raise UserError(f"training.batch_size = {largest} is more than the {len(train)} photos {where}")
    largest = max((config.training.batch_size for config in configs if config.training.unique_products), default=0)
    if largest > (products := len(set(train.product_ids.tolist()))):
        raise UserError(
            f"training.batch_size = {largest} with training.unique_products is more than the {products} products {where}: "
            "smaller batches, or --set training.unique_products=false"
        )


def data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """``train: 200 photos, were 160; clip_dataset_train.000001.tar is new``."""
    changes = []
    for split, old in before.items():
        new = now[split]
        counts = [f"{new[what]:,} {what}, were {old[what]:,}" for what in ("photos", "products") if new[what] != old[what]]
        shards = [
            f"{name} is {'new' if name not in old['shards'] else 'gone' if name not in new['shards'] else 'another'}"
            for name in sorted({*old["shards"], *new["shards"]})
            if old["shards"].get(name) != new["shards"].get(name)
        ]
        changes += [f"{split}: {change}" for change in counts + shards]
    return _shortened(changes)


def text_changes(before: str, now: str) -> str:
    """``line 3: "epochs": 3 -> "epochs": 4``."""
    old, new = before.splitlines(), now.splitlines()
    changes = []
    for kind, start, end, new_start, new_end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind != "equal":
            was, is_now = (" ".join(line.strip() for line in lines) for lines in (old[start:end], new[new_start:new_end]))
            changes.append(f"line {start + 1}: {was or 'nothing'} -> {is_now or 'nothing'}")
    return _shortened(changes)


def _shortened(changes: list[str]) -> str:
    more = [f"and {len(changes) - _SHOWN} more"] if len(changes) > _SHOWN else []
    return "; ".join(changes[:_SHOWN] + more)


def data_location(data: str | None) -> Path | str:
    """The folder of shards or its URL; the embedded garments, rendered if need be, where nothing is given."""
    if data is None:
        return _embedded_data()
    return Path(data).absolute() if scheme_of(data) is None else data


def load_data(config: ProjectConfig, shards: RunShards) -> tuple[ShardIndex, ShardIndex]:
    """The indexes of the training and the evaluation shards, with a warning of what is wrong with the data."""
    storage = storage_of(config)
    with progress_bar("indexing shards, once") as on_progress:
        train, valid = (cached_index(some, storage, on_progress=on_progress) for some in (shards.train, shards.valid))
    if bad := (*train.bad, *valid.bad):
        _log.warning(f"warning: {len(bad)} samples cannot be used ({count_kinds(bad)}), such as {bad[0]}")
    if (gaps := gaps_in_captions(train, valid)) is not None:
        _log.warning(f"warning: {gaps}")
    if leaking := leaking_products(train, valid):
        _log.warning(
            f"warning: {len(leaking)} products are in both training and evaluation, such as {leaking[0]!r}: the metrics flatter"
        )
    return train, valid


def rows_of_captions(config: ProjectConfig, train: ShardIndex) -> int:
    """Rows of a token table that the training captions have by CLIP's tokenizer, which needs no hub."""
    if config.training.edition < FIRST_EDITION:
        return USUAL_ROWS  # nobody goes by it
    with progress_bar("finding the tokens of all captions, once") as on_progress:
        tokenizer = open_clip.get_tokenizer("ViT-B-32")
        return len(occurring_tokens(train, tokenizer, storage_of(config), on_progress=on_progress))


def copy_data(config: ProjectConfig) -> None:
    """What trials read first, where shards are copied: once, before they would wait for it side by side, and with a bar."""
    shards, storage = run_shards(config), storage_of(config)
    train, valid = (cached_index(some, storage) for some in (shards.train, shards.valid))
    with progress_bar("copying shards") as on_progress:
        copy_first_shards(config, train, valid, on_progress)


def _embedded_data() -> Path:
    with progress_bar("rendering synthetic garments, once") as on_progress:
        return cached_dataset(GarmentRecipe(), cache_dir(), on_progress=on_progress)
