"""A set of photos to evaluate on: which captions they have, and their pixels in blocks of one fixed size."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fashionclip_tune.data.dataset import cached_index
from fashionclip_tune.data.preprocessing import Preprocessing
from fashionclip_tune.data.reader import ShardReader, decode_pil
from fashionclip_tune.data.shard_cache import ShardStorage
from fashionclip_tune.data.shards import Shard
from fashionclip_tune.errors import BadDataError

# A validation set whose pixels fit is decoded once a process; a larger one is read again at each evaluation.
_KEPT_PIXELS_BYTES = 1 << 28


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
    kept_blocks: dict[int, PixelBlock] = field(default_factory=dict)

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
    )


def pixel_blocks(photos: EvaluationSet, batch_size: int) -> Generator[tuple[int, PixelBlock], None, None]:
    """Blocks of photos in their order. Threads decode ahead while the device encodes (Pillow lets go of Python's lock)."""
    num_threads = torch.get_num_threads()  # what this run may use of the machine
    keep = len(photos) * 3 * photos.preprocessing.size**2 <= _KEPT_PIXELS_BYTES
    starts = range(0, len(photos), batch_size)
    with ThreadPoolExecutor(num_threads) as pool:

        def begun(start: int) -> Future[PixelBlock] | PixelBlock:
            kept = photos.kept_blocks.get(start)
            if kept is not None and len(kept.pixels_BCHW) == batch_size:
                return kept
            samples = range(start, min(start + batch_size, len(photos)))
            return pool.submit(_decoded_block, [read(sample) for sample in samples], photos.preprocessing, batch_size)

        def read(sample: int) -> bytes | OSError:
            try:
                return photos.reader.image(sample)
            except OSError as error:
                return error

        coming = iter(starts)
        ahead = deque((start, begun(start)) for start in islice(coming, num_threads + 1))
        while ahead:
            start, pending = ahead.popleft()
            block = pending.result() if isinstance(pending, Future) else pending
            ahead.extend((start, begun(start)) for start in islice(coming, 1))
            if keep:
                photos.kept_blocks[start] = block
            yield start, block


def _decoded_block(data: list[bytes | OSError], preprocessing: Preprocessing, batch_size: int) -> PixelBlock:
    pixels_BCHW = torch.zeros(batch_size, 3, preprocessing.size, preprocessing.size, dtype=torch.uint8)
    good, bad = [], []
    for slot, encoded in enumerate(data):
        try:
            if isinstance(encoded, OSError):
                raise encoded
            pixels_BCHW[slot] = preprocessing.resize(decode_pil(encoded))
            good.append(slot)
        except (ValueError, OSError) as error:
            bad.append((slot, str(error)))
    return PixelBlock(pixels_BCHW, good, bad)
