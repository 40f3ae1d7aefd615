"""Training batches: which photos make up step k, and how they are read.

What step k sees is a pure function of (configuration, seed, k). Workers read, decode, pick the caption and bring photos
to one canvas as uint8; everything else happens in a batch on the training device.
"""

import io
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg

from fashionclip_tune.config import CaptionChoice, ProjectConfig
from fashionclip_tune.errors import BadDataError, UserError
from fashionclip_tune.index import BadSample, ShardIndex, load_index
from fashionclip_tune.model import LoadedModel, Preprocessing, Tokenizer
from fashionclip_tune.photos import DECODED_FORMATS
from fashionclip_tune.seeds import Stream, numpy_generator
from fashionclip_tune.shards import expand_pattern, find_dataset

# A random resized crop of a canvas a little larger than the model's input stays sharp.
_CANVAS_FACTOR = 1.25
_REPLACEMENT_ATTEMPTS = 20
_KEPT_CAPTIONS = 100_000  # 60 MB at 77 tokens
_JPEG_START = b"\xff\xd8\xff"


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
    keys: tuple[str, ...]
    bad: tuple[BadSample, ...]  # met while this batch was read, and replaced

    def pin_memory(self) -> "TrainBatch":
        return replace(self, images_BCHW=self.images_BCHW.pin_memory(), tokens_BL=self.tokens_BL.pin_memory())


def epoch_order(
    shard_sizes: npt.NDArray[np.int64], *, seed: int, epoch: int, shuffle_shards: bool, shuffle_buffer: int
) -> npt.NDArray[np.int64]:
    """The samples of one epoch, each exactly once, as positions in the concatenation of the shards.

    Shards in random order (or as they are), cut into windows of ``shuffle_buffer`` samples that are permuted (0: not).
    Reads stay within a window, so a spinning or mounted disk is read nearly in sequence.
    """
    starts = np.concatenate([[0], np.cumsum(shard_sizes)])
    shards = np.arange(len(shard_sizes))
    if shuffle_shards:
        numpy_generator(seed, Stream.SHARD_ORDER, epoch).shuffle(shards)
    order = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shards])
    if shuffle_buffer:
        generator = numpy_generator(seed, Stream.SAMPLE_ORDER, epoch)
        for start in range(0, len(order), shuffle_buffer):
            generator.shuffle(order[start : start + shuffle_buffer])
    return order.astype(np.int64)


class ShardReader:
    """Reads members by offset; one open file a shard, opened when first needed, in each process anew."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._descriptors: dict[int, int] = {}

    def image(self, sample: int) -> bytes:
        return self._read(sample, self.index.image_spans[sample])

    def captions(self, sample: int) -> list[str]:
        """All captions of a sample, the original one first."""
        return [self._read(sample, span).decode().strip() for span in self.index.caption_spans[sample] if span[1]]

    def _read(self, sample: int, span: npt.NDArray[np.int64]) -> bytes:
        shard = int(self.index.shard_of[sample])
        if shard not in self._descriptors:
            self._descriptors[shard] = os.open(self.index.shards[shard], os.O_RDONLY)
        return os.pread(self._descriptors[shard], int(span[1]), int(span[0]))

    def bad(self, sample: int, reason: str) -> BadSample:
        return BadSample(self.index.shards[self.index.shard_of[sample]].name, str(self.index.keys[sample]), reason)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "_descriptors": {}}


def decode_photo(data: bytes) -> Tensor:
    """[3, H, W] uint8, upright.

    Raises:
        ValueError: the bytes are no image that can be decoded.
    """
    # JPEGs only: torchvision's PNG decoder crashes the process on damaged data and gives 16 bits a channel as they are.
    if data.startswith(_JPEG_START):
        try:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            photo: Tensor = decode_jpeg(buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True)
            return photo
        except RuntimeError:
            pass
    return torch.from_numpy(np.array(decode_pil(data))).permute(2, 0, 1)


def decode_pil(data: bytes) -> Image.Image:
    """An upright RGB image; slower than ``decode_photo`` but knows every format that is safe to open."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=DECODED_FORMATS))
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
            image = image.point(lambda value: value * (1 / 256)).convert("L")
        return image.convert("RGB")
    except UnidentifiedImageError as error:  # its message holds a memory address
        raise ValueError(f"not a decodable image (none of {', '.join(DECODED_FORMATS)})") from error
    except Exception as error:  # Pillow raises nearly anything for a broken file
        raise ValueError(f"not a decodable image ({error})") from error


class TrainBatches(Dataset[TrainBatch]):
    """Step number to batch. Batches run across epoch borders, so all have the full size."""

    def __init__(self, config: ProjectConfig, index: ShardIndex, preprocessing: Preprocessing, tokenizer: Tokenizer):
        if len(index) < config.training.batch_size:
            raise UserError(
                f"training.batch_size = {config.training.batch_size} is more than the {len(index)} photos of the training set"
            )
        self._training = config.training
        self._shuffle_shards = config.shardshuffle
        self._caption = config.augmentation.caption
        self._reader = ShardReader(index)
        self._preprocessing = preprocessing
        self._tokenizer = tokenizer
        self._known_tokens: dict[str, Tensor] = {}
        self._side = preprocessing.size
        if config.augmentation.image_strength > 0:
            self._side = round(preprocessing.size * _CANVAS_FACTOR)

    def __getitem__(self, step: int) -> TrainBatch:
        samples = self._samples_of(step)
        caption_draws = numpy_generator(self._training.seed, Stream.CAPTION, step).random(len(samples))
        # Pixel by pixel as the decoder writes them: to separate the colours is left to the device.
        images_BHWC = torch.empty(len(samples), self._side, self._side, 3, dtype=torch.uint8)
        captions, keys, bad = [], [], list[BadSample]()
        for slot, sample in enumerate(samples):
            image_CHW, sample = self._image_or_replacement(int(sample), step, slot, bad)
            images_BHWC[slot] = image_CHW.permute(1, 2, 0)
            choices = self._reader.captions(sample)
            wanted = 0 if self._caption is CaptionChoice.ORIGINAL else int(caption_draws[slot] * len(choices))
            captions.append(choices[wanted])
            keys.append(str(self._reader.index.keys[sample]))
        return TrainBatch(images_BHWC.permute(0, 3, 1, 2), self._tokens(captions), tuple(keys), tuple(bad))

    def _tokens(self, captions: list[str]) -> Tensor:
        """[B, L]; photos of a product share captions, and epochs repeat them, so tokens are kept for the next time."""
        unknown = [caption for caption in dict.fromkeys(captions) if caption not in self._known_tokens]
        if unknown:
            if len(self._known_tokens) + len(unknown) > _KEPT_CAPTIONS:
                self._known_tokens.clear()
                unknown = list(dict.fromkeys(captions))
            self._known_tokens.update(zip(unknown, self._tokenizer(unknown), strict=True))
        return torch.stack([self._known_tokens[caption] for caption in captions])

    def _samples_of(self, step: int) -> npt.NDArray[np.int64]:
        batch_size, num_samples = self._training.batch_size, len(self._reader.index)
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs = positions // num_samples
        return np.concatenate(
            [self._epoch(int(epoch))[positions[epochs == epoch] % num_samples] for epoch in np.unique(epochs)]
        )

    def _epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        return _epoch_order_cached(
            tuple(self._reader.index.shard_sizes.tolist()),
            self._training.seed,
            epoch,
            self._shuffle_shards,
            self._training.shuffle_buffer,
        )

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


@lru_cache(maxsize=4)
def _epoch_order_cached(
    shard_sizes: tuple[int, ...], seed: int, epoch: int, shuffle_shards: bool, shuffle_buffer: int
) -> npt.NDArray[np.int64]:
    return epoch_order(
        np.array(shard_sizes), seed=seed, epoch=epoch, shuffle_shards=shuffle_shards, shuffle_buffer=shuffle_buffer
    )


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
