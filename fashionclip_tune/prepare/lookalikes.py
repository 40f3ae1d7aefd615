"""Photos that are the same, or nearly, and stand in different splits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fashionclip_tune.prepare.photo_encoding import ImageHashes

MAX_DIFFERENT_BITS = 4
"""Of the 64 bits of dHash."""
MAX_COLOUR_DIFFERENCE = 0.1
"""Mean difference of the 8 x 8 thumbnails, as a share of the lesser one's contrast: its mean difference from its own
median colour, the background. Catalogue photos have like outlines: dHash alone takes one shirt for another."""
_RIGHTS_AT_ONCE, _PAIRS_AT_ONCE = 128, 1 << 18


@dataclass(frozen=True)
class Pairs:
    """How many photos look like one of an earlier split; examples, by their names, are (earlier, later)."""

    photos: int
    examples: tuple[tuple[str, str], ...]


def count_same(hashes: Sequence[ImageHashes]) -> int:
    """How many photos have the pixels of one before, in whatever split."""
    return len(hashes) - len({photo.pixels for photo in hashes})


def same_across_splits(hashes: Sequence[ImageHashes], splits: Sequence[int], names: Sequence[str]) -> Pairs:
    """Photos with exactly the pixels of one in an earlier split (splits count 0, 1, 2)."""
    first_of: dict[int, int] = {}
    for photo in sorted(range(len(hashes)), key=lambda photo: splits[photo]):
        first_of.setdefault(hashes[photo].pixels, photo)
    pairs = [(first_of[each.pixels], photo) for photo, each in enumerate(hashes)]
    found = [(first, photo) for first, photo in pairs if splits[first] != splits[photo]]
    return Pairs(len(found), tuple((names[first], names[photo]) for first, photo in found[:3]))


def similar_across_splits(hashes: Sequence[ImageHashes], splits: Sequence[int], names: Sequence[str]) -> Pairs:
    """Photos that are not the same as, but nearly, one in an earlier split, by both measures above."""
    gradients = np.array([photo.gradients for photo in hashes], dtype=np.uint64)
    bits = np.unpackbits(gradients.view(np.uint8).reshape(-1, 8), axis=1)
    signs = bits.astype(np.float32) * 2 - 1  # of two photos, (64 - their product) / 2 bits differ
    pixels = np.array([photo.pixels for photo in hashes], dtype=np.uint64)
    thumbnails = np.frombuffer(b"".join(photo.thumbnail for photo in hashes), dtype=np.uint8).reshape(len(hashes), -1)
    brightness, contrasts = thumbnails.mean(axis=1), _contrasts(thumbnails.reshape(len(hashes), -1, 3))
    allowed = MAX_COLOUR_DIFFERENCE * contrasts + 1e-6
    split_of = np.array(splits, dtype=np.int8)
    earlier_of: dict[int, int] = {}
    by_brightness = np.argsort(brightness)  # thumbnails cannot be alike where their means differ more than allowed
    for later in (1, 2):
        all_lefts = by_brightness[split_of[by_brightness] < later]
        all_rights = by_brightness[split_of[by_brightness] == later]
        for start in range(0, len(all_rights), _RIGHTS_AT_ONCE):
            rights = all_rights[start : start + _RIGHTS_AT_ONCE]
            borders = (brightness[rights] - allowed[rights]).min(), (brightness[rights] + allowed[rights]).max()
            first, past = np.searchsorted(brightness[all_lefts], borders)
            lefts = all_lefts[first:past]
            pairs = np.argwhere(signs[lefts] @ signs[rights].T >= 64 - 2 * MAX_DIFFERENT_BITS)
            for some in np.split(pairs, range(_PAIRS_AT_ONCE, len(pairs), _PAIRS_AT_ONCE)):
                left, right = lefts[some[:, 0]], rights[some[:, 1]]
                difference = np.abs(thumbnails[left].astype(np.int16) - thumbnails[right]).mean(axis=1)
                near = difference <= MAX_COLOUR_DIFFERENCE * np.minimum(contrasts[left], contrasts[right])
                near &= pixels[left] != pixels[right]
                for earlier, photo in zip(left[near].tolist(), right[near].tolist(), strict=True):
                    earlier_of[photo] = min(earlier, earlier_of.get(photo, earlier))
    examples = sorted((first, second) for second, first in earlier_of.items())
    return Pairs(len(earlier_of), tuple((names[first], names[second]) for first, second in examples[:3]))


def _contrasts(thumbnails_NPC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """[N], from thumbnails [N, pixels, 3]; some at a time, to keep memory small."""
    parts = [thumbnails_NPC[start : start + 4_096] for start in range(0, len(thumbnails_NPC), 4_096)]
    return np.concatenate([np.abs(part - np.median(part, axis=1, keepdims=True)).mean(axis=(1, 2)) for part in parts])
