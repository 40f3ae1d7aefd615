"""The data that a sweep is about: found, indexed and looked over before anything is started."""

from collections.abc import Callable
from pathlib import Path

from fashionclip_tune.cache import cache_dir
from fashionclip_tune.config import ProjectConfig
from fashionclip_tune.data import copy_first_shards
from fashionclip_tune.dataset import RunShards, cached_index, leaking_products, run_shards, storage_of
from fashionclip_tune.index import ShardIndex, count_kinds, gaps_in_captions
from fashionclip_tune.progress_bars import progress_bar
from fashionclip_tune.remote import scheme_of
from fashionclip_tune.synthetic import GarmentRecipe, cached_dataset


def data_location(data: str | None) -> Path | str:
    """The folder of shards or its URL; the embedded garments, rendered if need be, where nothing is given."""
    if data is None:
        return _embedded_data()
    return Path(data).absolute() if scheme_of(data) is None else data


def load_data(config: ProjectConfig, shards: RunShards, say: Callable[[str], None]) -> tuple[ShardIndex, ShardIndex]:
    """The indexes of the training and the evaluation shards, with a warning of what is wrong with the data."""
    storage = storage_of(config)
    with progress_bar("indexing shards, once") as on_progress:
        train, valid = (cached_index(some, storage, on_progress=on_progress) for some in (shards.train, shards.valid))
    if bad := (*train.bad, *valid.bad):
        say(f"warning: {len(bad)} samples cannot be used ({count_kinds(bad)}), such as {bad[0]}")
    if (gaps := gaps_in_captions(train, valid)) is not None:
        say(f"warning: {gaps}")
    if leaking := leaking_products(train, valid):
        say(
            f"warning: {len(leaking)} products are in both training and evaluation, such as {leaking[0]!r}: the metrics flatter"
        )
    return train, valid


def copy_data(config: ProjectConfig) -> None:
    """What trials read first, where shards are copied: once, before they would wait for it side by side, and with a bar."""
    shards, storage = run_shards(config), storage_of(config)
    train, valid = (cached_index(some, storage) for some in (shards.train, shards.valid))
    with progress_bar("copying shards") as on_progress:
        copy_first_shards(config, train, valid, on_progress)


def _embedded_data() -> Path:
    with progress_bar("rendering synthetic garments, once") as on_progress:
        return cached_dataset(GarmentRecipe(), cache_dir(), on_progress=on_progress)
