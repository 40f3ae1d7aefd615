"""From a shard's bytes to pixels and captions."""

import io
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from fashionclip_tune.data.index import BadSample, ShardIndex
from fashionclip_tune.data.shard_cache import CopyError, ShardStorage
from fashionclip_tune.data.shards import DECODED_FORMATS
from fashionclip_tune.data.tar_index import JPEG_START, jpeg_size

# A photo of more pixels is refused before it is decoded: a few bytes can claim gigabytes.
MAX_PIXELS = 100_000_000
_MAX_SIDE = 65_535  # what a JPEG can have; resizing takes memory by the longer side too
_MAX_OPEN = 128  # shards; an epoch's window reads from some twenty at a time


class ShardReader:
    """Reads members by offset; open files are few, and opened when first needed, in each process anew.

    Args:
        on_wait: called from time to time while a shard is being copied, as long as bytes come.

    Raises:
        OSError: from each method that reads, where the shard is gone, cut, or cannot be copied.
    """

    def __init__(
        self, index: ShardIndex, storage: ShardStorage | None = None, *, on_wait: Callable[[], None] | None = None
    ) -> None:
        self.index = index
        self._on_wait = on_wait
        self.storage = storage or ShardStorage()
        self._descriptors: OrderedDict[int, int] = OrderedDict()  # used last at the end
        self._lost: dict[int, OSError] = {}  # waiting for a shard once is enough

    def image(self, sample: int) -> bytes:
        return self._read(sample, self.index.image_spans[sample])

    def captions(self, sample: int) -> list[str]:
        """All captions of a sample, the original one first."""
        return [self._read(sample, span).decode().strip() for span in self.index.caption_spans_of(sample)]

    def _read(self, sample: int, span: npt.NDArray[np.int64]) -> bytes:
        data = os.pread(self._descriptor(int(self.index.shard_of[sample])), int(span[1]), int(span[0]))
        if len(data) < span[1]:
            raise OSError(f"shard cut off since it was indexed (at byte {span[0] + len(data):,})")
        return data

    def _descriptor(self, shard: int) -> int:
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
            return self._descriptors[shard]
        if shard in self._lost:
            raise self._lost[shard]
        try:
            path = self.storage.path(self.index.shards[shard], self.index.contents[shard], on_wait=self._on_wait)
            self._descriptors[shard] = os.open(path, os.O_RDONLY)
        except OSError as error:
            reason = str(error) if isinstance(error, CopyError) else error.strerror
            self._lost[shard] = OSError(f"shard cannot be read ({reason})")
            raise self._lost[shard] from error
        if len(self._descriptors) > _MAX_OPEN:
            os.close(self._descriptors.popitem(last=False)[1])
        return self._descriptors[shard]

    def bad(self, sample: int, reason: str) -> BadSample:
        return BadSample(self.index.shards[self.index.shard_of[sample]].name, str(self.index.keys[sample]), reason)

    def release_copies(self) -> None:
        """Closes copies, so that those which have made room for others leave the disk."""
        for shard in [shard for shard in self._descriptors if self.storage.copies(self.index.shards[shard])]:
            os.close(self._descriptors.pop(shard))

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._lost.clear()  # who reads again later waits again

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_descriptors": OrderedDict(), "_lost": {}}


def decode_photo(data: bytes) -> Tensor:
    """[3, H, W] uint8, upright.

    Raises:
        ValueError: the bytes are no image that can be decoded.
    """
    # JPEGs only: torchvision's PNG decoder crashes the process on damaged data and gives 16 bits a channel as they are.
    if data.startswith(JPEG_START):
        _refuse_huge(jpeg_size(data))
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
        opened = Image.open(io.BytesIO(data), formats=DECODED_FORMATS)
        _refuse_huge(opened.size)
        opened.load()
        # In place, and converted only where need be: each copy of a photo as large as is allowed takes 400 MB.
        ImageOps.exif_transpose(opened, in_place=True)
        image: Image.Image = opened
        image = of_8_bits(image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except _TooLargeError:
        raise
    except UnidentifiedImageError as error:  # its message holds a memory address
        raise ValueError(f"not a decodable image (none of {', '.join(DECODED_FORMATS)})") from error
    except Exception as error:  # Pillow raises nearly anything for a broken file
        raise ValueError(f"not a decodable image ({error})") from error


def of_8_bits(image: Image.Image) -> Image.Image:
    """16 bits of grey, which Pillow would cut off at 255, as 8; other images as they are."""
    return image.point(lambda value: value * (1 / 256)).convert("L") if image.mode.startswith("I") else image


class _TooLargeError(ValueError):
    pass


def _refuse_huge(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS or max(size) > _MAX_SIDE:
        allowed = f"{MAX_PIXELS:,}" if size[0] * size[1] > MAX_PIXELS else f"{_MAX_SIDE:,} a side"
        raise _TooLargeError(f"image too large ({size[0]} x {size[1]} pixels, more than the {allowed} that are decoded)")
