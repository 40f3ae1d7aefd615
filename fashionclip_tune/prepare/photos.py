"""A user's photos as the JPEGs of a shard, and their keys."""

import io
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, features

from fashionclip_tune.data.reader import of_8_bits
from fashionclip_tune.data.shards import DECODED_FORMATS
from fashionclip_tune.errors import module_command

_CAN_AVIF = bool(features.check("avif"))  # Pillow 11.3 and later, where it was built with it
_READ_FORMATS = (*DECODED_FORMATS, "AVIF") if _CAN_AVIF else DECODED_FORMATS
SHORT_SIDE = 288  # a little more than the 256 pixels of the largest model, to leave room for random crops
_QUALITY = 90
_MAX_KEY_LENGTH = 80  # USTAR names have 100 characters, and a member adds its extension
_EXIF_ORIENTATION = 0x0112


def unique_keys(names: Iterable[str]) -> list[str]:
    """One key for each image, from its file's name. No dots: WebDataset splits a member's name at the first one."""
    keys: dict[str, None] = {}  # ordered
    next_number: dict[str, int] = {}
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", Path(name).stem)[:_MAX_KEY_LENGTH]
        key = stem
        while key in keys:
            next_number[stem] = next_number.get(stem, 1) + 1
            suffix = f"_{next_number[stem]}"
            key = stem[: _MAX_KEY_LENGTH - len(suffix)] + suffix
        keys[key] = None
    return list(keys)


def photo_as_jpeg(data: bytes, short_side: int = SHORT_SIDE) -> bytes:
    """An encoded image as a JPEG: its own bytes where any decoder shows them as we would, else encoded anew.

    Its short side has at most ``short_side`` pixels; it is never enlarged.
    Raises nearly anything for a broken file, as Pillow does: OSError, SyntaxError, struct.error.
    """
    with Image.open(io.BytesIO(data), formats=_READ_FORMATS) as opened:
        rotated = opened.getexif().get(_EXIF_ORIENTATION, 1) != 1
        plain = opened.format == "JPEG" and opened.mode in ("RGB", "L") and "progressive" not in opened.info
        if plain and not rotated and min(opened.size) <= short_side:
            opened.load()  # fails where the file is cut short
            return data
        opened.draft(None, (2 * short_side, 2 * short_side))  # decodes a large JPEG no larger than needed
        image = of_8_bits(ImageOps.exif_transpose(opened))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image.convert("RGBA"))
            image = white
        return _encoded(image.convert("RGB"), short_side)


def why_unreadable(data: bytes) -> str:
    """What a file is that is no photo which can be decoded, from its first bytes."""
    head = data[:512]
    if not data:
        return "image file empty"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        install = module_command("pip", "install", "-U", "pillow")
        return "image cannot be decoded" if _CAN_AVIF else f"image is AVIF, which this Pillow cannot read: {install}"
    if head[4:8] == b"ftyp":
        return "image is HEIC or a film, which is not read: convert it to JPEG"
    if head.lstrip()[:1] == b"<":
        return "image file is a web page or a drawing (HTML, XML or SVG)"
    if head.startswith(b"version https://git-lfs"):
        return "image file is a pointer of Git LFS: fetch the photos with git lfs pull"
    return "image cannot be decoded"


def pixels_as_jpeg(pixels_HWC: npt.NDArray[np.uint8], short_side: int = SHORT_SIDE) -> bytes:
    """The same for decoded pixels, [height, width, 3]."""
    return _encoded(Image.fromarray(pixels_HWC), short_side)


def _encoded(image: Image.Image, short_side: int) -> bytes:
    if (reduction := short_side / min(image.size)) < 1:
        size = (round(image.width * reduction), round(image.height * reduction))
        image = image.resize(size, Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=_QUALITY)
    return encoded.getvalue()
