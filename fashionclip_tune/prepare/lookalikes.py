"""Photos that are the same, or nearly, and stand in different splits; found without comparing each with each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fashionclip_tune.prepare.photo_encoding import ImageHashes

MAX_DIFFERENT_BITS = 4
"""Of the 64 bits of dHash."""
MAX_COLOUR_DIFFERENCE = 0.1
"""Mean difference of the 8 x 8 thumbnails, as a share of the lesser one's contrast: its mean difference from its own
median colour, the background. Catalogue photos have like outlines: dHash alone takes one shirt for another."""
_NUM_BANDS = MAX_DIFFERENT_BITS + 1  # two hashes that differ in 4 bits are equal in at least one of 5 bands
_BITS_SET = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)
_PAIRS_AT_ONCE = 1 << 18

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pairs:
    """Photos, by their number, that look like one of an earlier split; examples are (earlier, later)."""

    photos: int
    examples: tuple[tuple[int, int], ...]


def count_same(hashes: Sequence[ImageHashes]) -> int:
    """How many photos have the pixels of one before, in whatever split."""
    return len(hashes) - len({photo.pixels for photo in hashes})


def same_across_splits(hashes: Sequence[ImageHashes], splits: Sequence[int]) -> Pairs:
    """Photos with exactly the pixels of one in an earlier split (splits count 0, 1, 2)."""
    first_of: dict[int, int] = {}
    for photo in sorted(range(len(hashes)), key=lambda photo: splits[photo]):
        first_of.setdefault(hashes[photo].pixels, photo)
    pairs = [(first_of[each.pixels], photo) for photo, each in enumerate(hashes)]
    found = [(first, photo) for first, photo in pairs if splits[first] != splits[photo]]
    return Pairs(len(found), tuple(found[:3]))


def similar_across_splits(hashes: Sequence[ImageHashes], splits: Sequence[int]) -> Pairs:
    """Photos that are not the same as, but nearly, one in an earlier split, by both measures above."""
    gradients = np.array([photo.gradients for photo in hashes], dtype=np.uint64)
    pixels = np.array([photo.pixels for photo in hashes], dtype=np.uint64)
    thumbnails = np.frombuffer(b"".join(photo.thumbnail for photo in hashes), dtype=np.uint8).reshape(len(hashes), -1)
    contrasts = _contrasts(thumbnails.reshape(len(hashes), -1, 3))
    split_of = np.array(splits, dtype=np.int8)
    earlier_of: dict[int, int] = {}
    for left, right in _candidates(gradients, thumbnails.mean(axis=1), contrasts, split_of):
        near = _different_bits(gradients[left], gradients[right]) <= MAX_DIFFERENT_BITS
        near &= pixels[left] != pixels[right]
        left, right = left[near], right[near]
        difference = np.abs(thumbnails[left].astype(np.int16) - thumbnails[right]).mean(axis=1)
        near = difference <= MAX_COLOUR_DIFFERENCE * np.minimum(contrasts[left], contrasts[right])
        for first, second in zip(left[near].tolist(), right[near].tolist(), strict=True):
            earlier_of[second] = min(first, earlier_of.get(second, first))
    examples = sorted((first, second) for second, first in earlier_of.items())
    return Pairs(len(earlier_of), tuple(examples[:3]))


def _contrasts(thumbnails_NPC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """[N], from thumbnails [N, pixels, 3]; some at a time, to keep memory small."""
    parts = [thumbnails_NPC[start : start + 4_096] for start in range(0, len(thumbnails_NPC), 4_096)]
    return np.concatenate([np.abs(part - np.median(part, axis=1, keepdims=True)).mean(axis=(1, 2)) for part in parts])


def _different_bits(left: npt.NDArray[np.uint64], right: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    counts: npt.NDArray[np.int64] = _BITS_SET[(left ^ right).view(np.uint8).reshape(-1, 8)].sum(axis=1, dtype=np.int64)
    return counts


def _candidates(
    gradients: npt.NDArray[np.uint64],
    brightness: npt.NDArray[np.float64],
    contrasts: npt.NDArray[np.float64],
    split_of: npt.NDArray[np.int8],
) -> Iterator[tuple[Numbers, Numbers]]:
    """Photos of different splits whose dHashes are equal in one band, as (in the earlier split, in the later one).

    Photos on white fill some bands' buckets; thumbnails cannot be alike where their means differ more than allowed.
    """
    allowed = MAX_COLOUR_DIFFERENCE * contrasts + 1e-6
    for band in range(_NUM_BANDS):
        first_bit, past_bit = (64 * band) // _NUM_BANDS, (64 * (band + 1)) // _NUM_BANDS
        values = (gradients >> np.uint64(first_bit)) & np.uint64((1 << (past_bit - first_bit)) - 1)
        order = np.lexsort((brightness, values))
        for photos in np.split(order, np.flatnonzero(np.diff(values[order])) + 1):
            for later in (1, 2):
                lefts, rights = photos[split_of[photos] < later], photos[split_of[photos] == later]
                if len(lefts) and len(rights):
                    starts = np.searchsorted(brightness[lefts], brightness[rights] - allowed[rights])
                    ends = np.searchsorted(brightness[lefts], brightness[rights] + allowed[rights], side="right")
                    yield from _pairs_within(lefts, rights, starts, ends)


def _pairs_within(lefts: Numbers, rights: Numbers, starts: Numbers, ends: Numbers) -> Iterator[tuple[Numbers, Numbers]]:
    """Pairs of lefts[starts[i] : ends[i]] with rights[i], so many at a time that memory stays small."""
    step = max(1, _PAIRS_AT_ONCE // len(lefts))
    for first in range(0, len(rights), step):
        start, counts = starts[first : first + step], (ends - starts)[first : first + step]
        positions = np.arange(counts.sum()) + np.repeat(start - (np.cumsum(counts) - counts), counts)
        yield lefts[positions], np.repeat(rights[first : first + step], counts)
