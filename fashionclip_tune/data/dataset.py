"""The data of a run: which shards, how they are reached, their index, and what of them cannot be read."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.index import BadSample, ShardIndex, count_kinds, load_index
from fashionclip_tune.data.shard_cache import ShardStorage
from fashionclip_tune.data.shards import DatasetShards, Shard, expand_pattern, find_dataset
from fashionclip_tune.errors import BadDataError
from fashionclip_tune.progress import OnProgress, no_progress

_KEPT_INDEXES = 8


@dataclass(frozen=True)
class RunShards:
    """The shards of a run: to train on, to evaluate on, and optionally a part of the training set to evaluate too."""

    train: tuple[Shard, ...]
    valid: tuple[Shard, ...]
    train_eval: tuple[Shard, ...]
    protocol: str | None = None
    """By which the data set wants to be measured; None: it does not say, or its shards are named by patterns."""


def run_shards(config: ProjectConfig) -> RunShards:
    """The files behind a configuration's shard patterns, found in ``dataset_root`` where no pattern is given."""
    found = dataset_shards(config)
    return RunShards(found.train, found.valid, _expanded(config, config.train_eval_shards_pattern), found.protocol)


def dataset_shards(config: ProjectConfig) -> DatasetShards:
    """The splits of a data set; where a pattern names the shards of one, in place of what the folder says."""
    root, allow_remote = config.dataset_dir, config.reading.allow_remote
    train = _expanded(config, config.train_shards_pattern)
    valid = _expanded(config, config.valid_eval_shards_pattern or config.valid_shards_pattern)
    if train and valid:
        return DatasetShards(root, train, valid, ())
    found = find_dataset(root, allow_remote=allow_remote)
    return replace(found, train=train or found.train, valid=valid or found.valid, protocol=None if valid else found.protocol)


def _expanded(config: ProjectConfig, pattern: str | None) -> tuple[Shard, ...]:
    return expand_pattern(config.dataset_dir, pattern, allow_remote=config.reading.allow_remote) if pattern else ()


def storage_of(config: ProjectConfig) -> ShardStorage:
    reading = config.reading
    scratch = reading.scratch.absolute() if reading.scratch else None
    return ShardStorage(scratch, max_bytes=int(reading.scratch_gb * 1e9), stall_s=reading.stall_s / 2)


def leaking_products(train: ShardIndex, valid: ShardIndex) -> list[str]:
    """Products with photos in both: what is measured on them is memory."""
    return sorted(set(train.product_ids.tolist()) & set(valid.product_ids.tolist()))


class BadSamples:
    """Counts distinct bad samples of a run, and ends it when they are more than the allowed share."""

    def __init__(self, index: ShardIndex, max_share: float) -> None:
        self.found: dict[tuple[str, str], BadSample] = {}
        self._num_samples = len(index) + len(index.bad)
        self._max_share = max_share
        self.add(index.bad)

    def add(self, bad: tuple[BadSample, ...]) -> None:
        for sample in bad:
            self.found.setdefault((sample.shard, sample.key), sample)
        if bad and len(self.found) > self._max_share * self._num_samples:
            listed = "\n".join(f"  {sample}" for sample in list(self.found.values())[:20])
            raise BadDataError(
                f"{len(self.found)} of {self._num_samples} samples cannot be read, more than training.max_bad_share = "
                f"{self._max_share:g} allows ({count_kinds(tuple(self.found.values()))}):\n{listed}"
            )


def write_bad_samples(path: Path, bad: Sequence[BadSample]) -> None:
    """Lists as CSV what could not be read, if there is anything."""
    if bad:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(BadSample._fields)
            writer.writerows(bad)


_indexes: dict[tuple[tuple[Shard, ...], ShardStorage | None], ShardIndex] = {}


def cached_index(
    shards: tuple[Shard, ...], storage: ShardStorage | None = None, *, on_progress: OnProgress = no_progress
) -> ShardIndex:
    """``load_index``, kept in memory: the trials of one process share their data."""
    if (shards, storage) not in _indexes:
        _indexes[shards, storage] = load_index(shards, storage, on_progress=on_progress)
        while len(_indexes) > _KEPT_INDEXES:
            del _indexes[next(iter(_indexes))]
    return _indexes[shards, storage]
