"""A user's image files: found, given keys and turned into the JPEGs of a shard."""

import fnmatch
import io
import os
import re
from bisect import bisect_left
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from fashionclip_tune.data.reader import of_8_bits
from fashionclip_tune.data.shards import DECODED_FORMATS

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_GLOB_SUFFIXES = (*_SUFFIXES, ".gif", ".bmp", ".tif", ".tiff")
SHORT_SIDE = 288  # a little more than the 256 pixels of the largest model, to leave room for random crops
_QUALITY = 90
_MAX_KEY_LENGTH = 80  # USTAR names have 100 characters, and a member adds its extension
_EXIF_ORIENTATION = 0x0112


def find_photo(folder: Path, name: str) -> Path | None:
    """The file of this name below ``folder``; a name without a suffix may leave out the file's."""
    suffixes = ("",) if Path(name).suffix else ("", *_SUFFIXES)
    # os.path.isfile is False, where Path.is_file raises, for a name that is too long for the file system.
    return next((path for suffix in suffixes if os.path.isfile(path := folder / (name + suffix))), None)


def outside(name: str) -> bool:
    """Whether a name leads out of the folder of photos."""
    return Path(name).is_absolute() or ".." in Path(name).parts


class PhotoFolder:
    """Finds what a table's cell means: one name, several separated by ``|`` or ``;``, or a glob such as ``1163_*.jpg``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names_in = cache(self._sorted_names)  # one listing serves every row

    def find(self, cell: str) -> list[tuple[str, Path | None]]:
        """Names relative to the folder with their files, None where there is none; a glob's in their order by name.

        Raises:
            ValueError: the cell leads out of the folder.
        """
        if outside(cell):
            raise ValueError(cell)
        if (path := find_photo(self._folder, cell)) is not None:
            return [(cell, path)]
        found: list[tuple[str, Path | None]] = []
        for part in filter(None, (part.strip() for part in re.split(r"[|;]", cell))):
            if outside(part):
                raise ValueError(part)
            matches = self._matching(part) if re.search(r"[*?\[]", part) else []
            found += [(name, self._folder / name) for name in matches] or [(part, find_photo(self._folder, part))]
        return found or [(cell, None)]

    def _matching(self, pattern: str) -> list[str]:
        parent, _, last = pattern.rpartition("/")
        if re.search(r"[*?\[]", parent):
            paths = (path for path in self._folder.glob(pattern) if path.is_file())
            names = sorted(path.relative_to(self._folder).as_posix() for path in paths)
        else:
            all_names, start = self._names_in(parent), re.split(r"[*?\[]", last)[0]
            first, past = bisect_left(all_names, start), bisect_left(all_names, start + "\U0010ffff")
            matches = fnmatch.filter(all_names[first:past], last)
            names = [f"{parent}/{name}" if parent else name for name in matches]
        return [name for name in names if name.lower().endswith(_GLOB_SUFFIXES)]

    def _sorted_names(self, parent: str) -> list[str]:
        try:
            with os.scandir(self._folder / parent) as entries:
                return sorted(entry.name for entry in entries if entry.is_file())
        except OSError:  # no such folder, or no folder
            return []


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


def photo_as_jpeg(path: Path, short_side: int = SHORT_SIDE) -> bytes:
    """The image as a JPEG: the file's own bytes where any decoder shows them as we would, else encoded anew.

    Its short side has at most ``short_side`` pixels; it is never enlarged.
    Raises nearly anything for a broken file, as Pillow does: OSError, SyntaxError, struct.error.
    """
    data = path.read_bytes()
    with Image.open(io.BytesIO(data), formats=DECODED_FORMATS) as opened:
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
