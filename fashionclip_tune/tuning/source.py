"""The data that a sweep is about: found, indexed and looked over before anything is started."""

import time
from collections.abc import Callable
from pathlib import Path

from fashionclip_tune.cache import cache_dir
from fashionclip_tune.config import ProjectConfig
from fashionclip_tune.dataset import RunShards, cached_index, leaking_products, storage_of
from fashionclip_tune.index import ShardIndex, count_kinds
from fashionclip_tune.remote import scheme_of
from fashionclip_tune.synthetic import GarmentRecipe, cached_dataset

_SAID_AFTER_S = 2.0


def data_location(data: str | None, say: Callable[[str], None]) -> Path | str:
    """The folder of shards or its URL; the embedded garments, rendered if need be, where nothing is given."""
    if data is None:
        return _embedded_data(say)
    return Path(data).absolute() if scheme_of(data) is None else data


def load_data(config: ProjectConfig, shards: RunShards, say: Callable[[str], None]) -> tuple[ShardIndex, ShardIndex]:
    """The indexes of the training and the evaluation shards, with a warning of what is wrong with the data."""
    progress, storage = _IndexingProgress(say), storage_of(config)
    train, valid = (cached_index(some, storage, on_progress=progress) for some in (shards.train, shards.valid))
    if bad := (*train.bad, *valid.bad):
        say(f"warning: {len(bad)} samples cannot be used ({count_kinds(bad)}), such as {bad[0]}")
    if leaking := leaking_products(train, valid):
        say(
            f"warning: {len(leaking)} products are in both training and evaluation, such as {leaking[0]!r}: the metrics flatter"
        )
    return train, valid


class _IndexingProgress:
    """Says what is going on where it takes longer than a moment."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._next_word = time.monotonic() + _SAID_AFTER_S

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() > self._next_word and done < total:
            self._say(f"indexing shards, once: {done} of {total}")
            self._next_word = time.monotonic() + 10 * _SAID_AFTER_S


def _embedded_data(say: Callable[[str], None]) -> Path:
    recipe = GarmentRecipe()
    said = False

    def on_progress(done: int, total: int) -> None:
        nonlocal said
        if not said:
            say(f"rendering {total:,} synthetic garments: once, some seconds")
            said = True

    return cached_dataset(recipe, cache_dir(), on_progress=on_progress)
