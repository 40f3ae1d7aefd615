"""Training batches: which photos make up step k, and how they are read.

What step k sees is a pure function of (configuration, seed, k). Workers read, decode, pick the caption and bring photos
to one canvas as uint8; everything else happens in a batch on the training device.
"""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fashionclip_tune.config import AugmentationConfig, CaptionChoice, ProjectConfig
from fashionclip_tune.errors import BadDataError, UserError
from fashionclip_tune.index import BadSample, ShardIndex, load_index
from fashionclip_tune.model import LoadedModel, Preprocessing, Tokenizer
from fashionclip_tune.order import SampleOrder
from fashionclip_tune.reader import ShardReader, decode_photo
from fashionclip_tune.seeds import Stream, numpy_generator
from fashionclip_tune.shards import expand_pattern, find_dataset

# A random resized crop of a canvas a little larger than the model's input stays sharp.
_CANVAS_FACTOR = 1.25
_REPLACEMENT_ATTEMPTS = 20
_KEPT_CAPTIONS = 100_000  # 60 MB at 77 tokens


@dataclass(frozen=True)
class RunShards:
    """The shards of a run: to train on, to evaluate on, and optionally a part of the training set to evaluate too."""

    train: tuple[Path, ...]
    valid: tuple[Path, ...]
    train_eval: tuple[Path, ...]


def run_shards(config: ProjectConfig) -> RunShards:
    """The files behind a configuration's shard patterns, found in ``dataset_root`` where no pattern is given."""
    root = config.dataset_dir

    def expand(pattern: str | None) -> tuple[Path, ...]:
        return expand_pattern(root, pattern) if pattern else ()

    train = expand(config.train_shards_pattern)
    valid = expand(config.valid_eval_shards_pattern or config.valid_shards_pattern)
    if not train or not valid:
        found = find_dataset(root)
        train, valid = train or found.train, valid or found.valid
    return RunShards(train, valid, expand(config.train_eval_shards_pattern))


@dataclass(frozen=True)
class TrainBatch:
    """B photos with a caption each."""

    images_BCHW: Tensor  # uint8, canvas size
    tokens_BL: Tensor
    products_B: Tensor  # int64, equal for photos of one product
    keys: tuple[str, ...]
    bad: tuple[BadSample, ...]  # met while this batch was read, and replaced

    def pin_memory(self) -> "TrainBatch":
        return replace(self, images_BCHW=self.images_BCHW.pin_memory(), tokens_BL=self.tokens_BL.pin_memory())


class TrainBatches(Dataset[TrainBatch]):
    """Step number to batch. Batches run across epoch borders, so all have the full size."""

    def __init__(self, config: ProjectConfig, index: ShardIndex, preprocessing: Preprocessing, tokenizer: Tokenizer):
        if len(index) < config.training.batch_size:
            raise UserError(
                f"training.batch_size = {config.training.batch_size} is more than the {len(index)} photos of the training set"
            )
        self._training = config.training
        self._captions = config.augmentation
        self._reader = ShardReader(index)
        self._preprocessing = preprocessing
        self._tokenizer = tokenizer
        self._order = SampleOrder(config, index)
        self._products = np.unique(index.product_ids, return_inverse=True)[1]
        self._known_tokens: dict[str, Tensor] = {}
        self._side = preprocessing.size
        if config.augmentation.image_strength > 0:
            self._side = round(preprocessing.size * _CANVAS_FACTOR)

    def __getitem__(self, step: int) -> TrainBatch:
        samples = self._order.batch(step)
        caption_draws = numpy_generator(self._training.seed, Stream.CAPTION, step).random(len(samples))
        # Pixel by pixel as the decoder writes them: to separate the colours is left to the device.
        images_BHWC = torch.empty(len(samples), self._side, self._side, 3, dtype=torch.uint8)
        captions, products, keys, bad = [], [], [], list[BadSample]()
        for slot, sample in enumerate(samples):
            image_CHW, sample = self._image_or_replacement(int(sample), step, slot, bad)
            images_BHWC[slot] = image_CHW.permute(1, 2, 0)
            choices = self._reader.captions(sample)
            captions.append(choices[_chosen_caption(self._captions, float(caption_draws[slot]), len(choices))])
            products.append(int(self._products[sample]))
            keys.append(str(self._reader.index.keys[sample]))
        images_BCHW = images_BHWC.permute(0, 3, 1, 2)
        return TrainBatch(images_BCHW, self._tokens(captions), torch.tensor(products), tuple(keys), tuple(bad))

    def _tokens(self, captions: list[str]) -> Tensor:
        """[B, L]; photos of a product share captions, and epochs repeat them, so tokens are kept for the next time."""
        unknown = [caption for caption in dict.fromkeys(captions) if caption not in self._known_tokens]
        if unknown:
            if len(self._known_tokens) + len(unknown) > _KEPT_CAPTIONS:
                self._known_tokens.clear()
                unknown = list(dict.fromkeys(captions))
            self._known_tokens.update(zip(unknown, self._tokenizer(unknown), strict=True))
        return torch.stack([self._known_tokens[caption] for caption in captions])

    def _image_or_replacement(self, sample: int, step: int, slot: int, bad: list[BadSample]) -> tuple[Tensor, int]:
        """The sample's canvas; if it cannot be decoded, that of another sample, drawn as a function of (step, slot)."""
        draws: np.random.Generator | None = None
        for _ in range(_REPLACEMENT_ATTEMPTS):
            try:
                photo = decode_photo(self._reader.image(sample))
                return self._preprocessing.resize_to_canvas(photo, self._side), sample
            except ValueError as error:
                bad.append(self._reader.bad(sample, str(error)))
            draws = draws or numpy_generator(self._training.seed, Stream.REPLACEMENT, step, slot)
            sample = int(draws.integers(len(self._reader.index)))
        raise BadDataError(f"{_REPLACEMENT_ATTEMPTS} photos in a row cannot be read, such as {bad[-1]}")

    def close(self) -> None:
        self._reader.close()


def _chosen_caption(captions: AugmentationConfig, draw: float, count: int) -> int:
    """Which of ``count`` captions a draw from [0, 1) means; the original one is number 0."""
    if captions.caption is CaptionChoice.ORIGINAL or count == 1:
        return 0
    if captions.caption is CaptionChoice.UNIFORM:
        return int(draw * count)
    original = captions.original_caption_probability
    return 0 if draw < original else 1 + int((draw - original) / (1 - original) * (count - 1))


@contextmanager
def train_loader(
    config: ProjectConfig,
    index: ShardIndex,
    loaded: LoadedModel,
    *,
    first_step: int,
    total_steps: int,
    pin_memory: bool,
) -> Iterator[Iterator[TrainBatch]]:
    """Batches of steps ``first_step`` to ``total_steps`` - 1; workers and files are closed at the end of the block."""
    batches = TrainBatches(config, index, loaded.preprocessing, loaded.tokenizer)
    # Workers are forked from a server that has imported this module, instead of importing torch each for itself.
    multiprocessing.set_forkserver_preload([__name__])
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(first_step, total_steps),
        num_workers=config.training.num_workers,
        multiprocessing_context="forkserver" if config.training.num_workers else None,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )
    iterator = iter(loader)
    try:
        yield iterator
    finally:
        if config.training.num_workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]  # else they live until the collector runs
        batches.close()


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
                f"{self._max_share:g} allows:\n{listed}"
            )


@lru_cache(maxsize=8)
def cached_index(shards: tuple[Path, ...]) -> ShardIndex:
    """``load_index``, kept in memory: the trials of one process share their data."""
    return load_index(shards)
