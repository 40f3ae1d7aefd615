"""A set of photos to evaluate on: which captions they have, and their pixels in blocks of one fixed size."""

import warnings
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fashionclip_tune.data.dataset import cached_index
from fashionclip_tune.data.kept_pixels import KeptPixels
from fashionclip_tune.data.preprocessing import Preprocessing
from fashionclip_tune.data.reader import ShardReader, decode_pil
from fashionclip_tune.data.shard_cache import ShardStorage
from fashionclip_tune.data.shards import Shard
from fashionclip_tune.errors import BadDataError


class PixelBlock(NamedTuple):
    """Photos of one block: uint8, zeros behind the last one; the slots that hold one; why the others could not be read."""

    pixels_BCHW: Tensor
    good: list[int]
    bad: list[tuple[int, str]]


@dataclass(frozen=True)
class EvaluationSet:
    """Photos with their captions; rows say which of the distinct captions a photo has."""

    reader: ShardReader
    captions: tuple[str, ...]
    """Distinct; the first ``num_first_captions`` are first captions of a photo."""
    num_first_captions: int
    first_rows_N: Tensor
    """Of each photo's first caption."""
    further_F2: Tensor
    """Photo and row of each further caption, photo by photo."""
    products_N: Tensor
    categories_N: Tensor
    num_query_photos: int
    """The first of the photos; those behind them are in the gallery only."""
    preprocessing: Preprocessing
    num_decoders: int
    """Threads that decode photos, if torch has not more."""

    def __len__(self) -> int:
        return len(self.first_rows_N)

    @property
    def fingerprint(self) -> str:
        gallery = f":{self.num_query_photos}" if self.num_query_photos < len(self) else ""
        return self.reader.index.fingerprint + gallery


@lru_cache(maxsize=4)
def evaluation_set(
    shards: tuple[Shard, ...],
    preprocessing: Preprocessing,
    storage: ShardStorage | None = None,
    *,
    gallery: tuple[Shard, ...] = (),
    num_decoders: int = 1,
) -> EvaluationSet:
    """Reads the captions; photos are read when they are encoded.

    Args:
        storage: how shards are reached; None: local files as they are.
        gallery: shards searched, but not searched for.

    Raises:
        BadDataError: a shard cannot be read.
    """
    reader = ShardReader(cached_index(shards + gallery, storage), storage)
    index = reader.index
    captions_of = []
    for sample in range(len(index)):
        try:
            captions_of.append(reader.captions(sample))
        except OSError as error:
            raise BadDataError(f"captions to evaluate on are lost: {reader.bad(sample, str(error))}") from error
    reader.close()
    first = dict.fromkeys(captions[0] for captions in captions_of)
    number_of = {caption: number for number, caption in enumerate(dict.fromkeys(chain(first, *captions_of)))}
    further = [(sample, number_of[caption]) for sample, captions in enumerate(captions_of) for caption in captions[1:]]
    return EvaluationSet(
        reader=reader,
        captions=tuple(number_of),
        num_first_captions=len(first),
        first_rows_N=torch.tensor([number_of[captions[0]] for captions in captions_of]),
        further_F2=torch.tensor(further, dtype=torch.long).reshape(-1, 2),
        products_N=torch.from_numpy(np.unique(index.product_ids, return_inverse=True)[1]),
        categories_N=torch.from_numpy(np.unique(index.categories, return_inverse=True)[1]).where(
            torch.from_numpy(index.categories != ""), -1
        ),
        num_query_photos=int(index.shard_sizes[: len(shards)].sum()),
        preprocessing=preprocessing,
        num_decoders=num_decoders,
    )


def pixel_blocks(
    photos: EvaluationSet, batch_size: int, *, pin_memory: bool = False
) -> Generator[tuple[int, PixelBlock], None, None]:
    """Blocks of photos in their order, each decoded once a sweep where there is room to keep it."""
    kept, reading = KeptPixels(photos.reader, photos.preprocessing), Lock()

    def fill(sample: int, pixels_CHW: Tensor) -> None:
        if not kept.read(sample, pixels_CHW):
            with reading:
                encoded = photos.reader.image(sample)
            pixels_CHW[:] = photos.preprocessing.resize(decode_pil(encoded))
            kept.write(sample, pixels_CHW)

    size, at_least = photos.preprocessing.size, photos.num_decoders
    yield from decoded_blocks(len(photos), size, batch_size, fill, at_least, pin_memory=pin_memory)
    if kept.why_not:
        warnings.warn(f"photos to evaluate on are decoded at each evaluation: {kept.why_not}", stacklevel=2)


def decoded_blocks(
    num_photos: int,
    size: int,
    batch_size: int,
    fill: Callable[[int, Tensor], None],
    num_decoders: int = 1,
    *,
    pin_memory: bool = False,
) -> Generator[tuple[int, PixelBlock], None, None]:
    """Blocks in order. Threads read or decode ahead while the device encodes (both let go of Python's lock).

    Args:
        fill: writes a photo's pixels [3, size, size]; ValueError or OSError where it cannot be read.
        num_decoders: threads, if torch has not more.
    """
    num_threads = max(num_decoders, torch.get_num_threads())  # what this run may use of the machine

    def block(start: int) -> PixelBlock:
        pixels_BCHW = torch.zeros(batch_size, 3, size, size, dtype=torch.uint8, pin_memory=pin_memory)
        good, bad = [], []
        for slot, number in enumerate(range(start, min(start + batch_size, num_photos))):
            try:
                fill(number, pixels_BCHW[slot])
            except (ValueError, OSError) as error:
                bad.append((slot, str(error)))
            else:
                good.append(slot)
        return PixelBlock(pixels_BCHW, good, bad)

    with ThreadPoolExecutor(num_threads) as pool:
        coming = ((start, pool.submit(block, start)) for start in range(0, num_photos, batch_size))
        ahead = deque(islice(coming, num_threads + 1))
        while ahead:
            start, pending = ahead.popleft()
            done = pending.result()
            ahead.extend(islice(coming, 1))
            yield start, done
