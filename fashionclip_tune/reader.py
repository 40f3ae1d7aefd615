"""From a shard's bytes to pixels and captions."""

import io
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from fashionclip_tune.index import BadSample, ShardIndex
from fashionclip_tune.shards import DECODED_FORMATS

_JPEG_START = b"\xff\xd8\xff"
# A photo of more pixels is refused before it is decoded: a few bytes can claim gigabytes.
MAX_PIXELS = 100_000_000


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
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
            image = image.point(lambda value: value * (1 / 256)).convert("L")
        return image.convert("RGB")
    except UnidentifiedImageError as error:  # its message holds a memory address
        raise ValueError(f"not a decodable image (none of {', '.join(DECODED_FORMATS)})") from error
    except Exception as error:  # Pillow raises nearly anything for a broken file
        raise ValueError(f"not a decodable image ({error})") from error


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height from the frame header (ITU-T T.81, B.2.2); (0, 0) if there is none."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = data[place + 5] << 8 | data[place + 6], data[place + 7] << 8 | data[place + 8]
            return width, height
        has_length = not (marker == 0xFF or 0xD0 <= marker <= 0xD8 or marker == 0x01)
        place += 2 + (data[place + 2] << 8 | data[place + 3]) if has_length else 1 if marker == 0xFF else 2
    return 0, 0


def _refuse_huge(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(
            f"not a decodable image: {size[0]} x {size[1]} pixels are more than the {MAX_PIXELS:,} that are decoded"
        )
