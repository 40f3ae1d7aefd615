"""A user's image files: found, given keys and turned into the JPEGs of a shard."""

import io
import os
import re
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageOps

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Only these are decoded: Pillow would hand an EPS file to Ghostscript, which runs what is written in it.
DECODED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_MAX_SHORT_SIDE = 288  # a little more than the 256 pixels of the largest model, to leave room for random crops
_MAX_KEY_LENGTH = 80  # USTAR names have 100 characters, and a member adds its extension
_EXIF_ORIENTATION = 0x0112


def find_photo(folder: Path, name: str) -> Path | None:
    """The file of this name below ``folder``; a name without a suffix may leave out the file's."""
    suffixes = ("",) if Path(name).suffix else ("", *_SUFFIXES)
    # os.path.isfile is False, where Path.is_file raises, for a name that is too long for the file system.
    return next((path for suffix in suffixes if os.path.isfile(path := folder / (name + suffix))), None)


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


def photo_as_jpeg(path: Path) -> bytes:
    """The image as a JPEG: the file's own bytes where any decoder shows them as we would, else encoded anew.

    Raises nearly anything for a broken file, as Pillow does: OSError, SyntaxError, struct.error.
    """
    data = path.read_bytes()
    with Image.open(io.BytesIO(data), formats=DECODED_FORMATS) as opened:
        rotated = opened.getexif().get(_EXIF_ORIENTATION, 1) != 1
        plain = opened.format == "JPEG" and opened.mode in ("RGB", "L") and "progressive" not in opened.info
        if plain and not rotated and min(opened.size) <= _MAX_SHORT_SIDE:
            opened.load()  # fails where the file is cut short
            return data
        opened.draft(None, (2 * _MAX_SHORT_SIDE, 2 * _MAX_SHORT_SIDE))  # decodes a large JPEG no larger than needed
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
            image = image.point(lambda value: value * (1 / 256)).convert("L")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image.convert("RGBA"))
            image = white
        image = image.convert("RGB")
        if (reduction := _MAX_SHORT_SIDE / min(image.size)) < 1:
            size = (round(image.width * reduction), round(image.height * reduction))
            image = image.resize(size, Image.Resampling.LANCZOS)
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=90)
        return encoded.getvalue()
