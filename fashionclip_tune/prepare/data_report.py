"""What a data set's owner should know before training on it. Warnings only: nothing is dropped here."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from ftfy.badness import is_bad

from fashionclip_tune.data.shards import SPLITS
from fashionclip_tune.prepare.languages import RULE, foreign_captions
from fashionclip_tune.prepare.lookalikes import (
    MAX_COLOUR_DIFFERENCE,
    MAX_DIFFERENT_BITS,
    Pairs,
    count_same,
    same_across_splits,
    similar_across_splits,
)
from fashionclip_tune.prepare.photo_encoding import ImageHashes
from fashionclip_tune.prepare.validation_facts import ValidationFacts, validation_facts

CLIP_CONTEXT = 77
"""Tokens that CLIP's text towers read, the two that mark start and end included."""
SEVERAL_PHOTOS = 0.5
"""Share of the products that have several photos, from which on recall is counted by product."""
_NUM_EXAMPLES = 3
_SHOWN_LETTERS = 60


@dataclass(frozen=True)
class ReportedPhoto:
    """A photo as it was written."""

    file: str
    split: str
    product_id: str
    captions: tuple[str, ...]
    hashes: ImageHashes


@dataclass(frozen=True)
class PhotosPerProduct:
    fewest: int
    median: float
    most: int
    share_with_several: float


@dataclass(frozen=True)
class CaptionWarning:
    """How many distinct captions, with some of them."""

    captions: int
    examples: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """``lines()`` is for people, ``as_json()`` for programs."""

    num_photos: int
    num_captions: int  # distinct
    photos_per_product: PhotosPerProduct
    protocol: str | None  # that the data want; it is noted in dataset.json
    validation: ValidationFacts | None
    without_letters: CaptionWarning
    broken_encoding: CaptionWarning
    too_long_of_template: dict[str, float]  # share of its captions, where there are several templates
    too_long: CaptionWarning
    longest_tokens: int | None  # of the captions that may be too long; None where there is none
    same_photos: int
    most_frequent_photo: tuple[str, int]  # an example, and how often it is there
    same_across_splits: Pairs
    similar_across_splits: Pairs
    foreign: dict[str, CaptionWarning]  # by language, the most frequent first

    def as_json(self) -> dict[str, Any]:
        rules = {
            "too_long": f"more than {CLIP_CONTEXT - 2} tokens of CLIP's tokenizer",
            "similar": f"at most {MAX_DIFFERENT_BITS} of 64 bits of dHash differ, and 8x8 thumbnails by at most "
            f"{MAX_COLOUR_DIFFERENCE:.0%} of their contrast; another colour of a small product can pass",
            "foreign": RULE,
            "broken_encoding": "text that ftfy takes for UTF-8 read as another encoding, or a replacement character",
        }
        return {**asdict(self), "rules": rules}

    def lines(self) -> list[str]:
        each = self.photos_per_product
        lines = [
            f"photos a product: {each.fewest} to {each.most}, median {each.median:g}; "
            f"{each.share_with_several:.0%} of the products have several"
        ]
        if each.share_with_several > SEVERAL_PHOTOS:
            recommended = (
                "a sweep takes the protocol that counts them together, product, unless told --set evaluation.protocol=instance"
                if self.protocol
                else "recommended is the protocol that counts them together: --set evaluation.protocol=product"
            )
            lines.append(
                f"  most products have several photos: at instance level a product's other photos count as wrong; {recommended}"
            )
        lines += self.validation.lines() if self.validation else []
        lines += self._caption_lines()
        if self.same_photos:
            often = "most often {}, {:,} times".format(*self.most_frequent_photo)
            lines.append(f"the same photo again: {self.same_photos:,} of {self.num_photos:,} photos ({often})")
        across = "warning: photos that are {} one of an earlier split, so that scores will flatter: {:,} ({})"
        if self.same_across_splits.photos:
            shown = "; ".join(" = ".join(pair) for pair in self.same_across_splits.examples)
            lines.append(across.format("the same as", self.same_across_splits.photos, shown))
        if self.similar_across_splits.photos:
            shown = "; ".join(" ~ ".join(pair) for pair in self.similar_across_splits.examples)
            lines.append(across.format("nearly the same as", self.similar_across_splits.photos, shown))
            lines.append(f"  judged by: {self.as_json()['rules']['similar']}")
        if not self.same_across_splits.photos and not self.similar_across_splits.photos:
            lines.append("photos that are the same or nearly the same in several splits: none found")
        return lines

    def _caption_lines(self) -> list[str]:
        lines: list[str] = []
        of = f"of {self.num_captions:,} distinct captions"
        if self.too_long.captions:
            lines.append(
                f"warning: {of}, longer than CLIP reads ({CLIP_CONTEXT} tokens; the longest has {self.longest_tokens}) "
                f"and so cut off: {self.too_long.captions:,} ({_shown(self.too_long.examples)})"
            )
        else:
            lines.append(f"captions: {self.num_captions:,} distinct, all within CLIP's {CLIP_CONTEXT} tokens")
        for template, share in self.too_long_of_template.items():
            lines.append(f"  of {template!r}: {share:.0%}")
        if self.without_letters.captions:
            lines.append(
                f"warning: {of}, without a letter, such as numbers of classes: {self.without_letters.captions:,} "
                f"({_shown(self.without_letters.examples)}): is --caption-column right?"
            )
        if self.broken_encoding.captions:
            lines.append(
                f"warning: {of}, in a broken encoding: {self.broken_encoding.captions:,} "
                f"({_shown(self.broken_encoding.examples)}): export the table anew, in UTF-8"
            )
        if self.foreign:
            count = sum(found.captions for found in self.foreign.values())
            lines.append(
                f"warning: {of}, looking non-English, which the LAION models hardly know and SigLIP2 does: {count:,}. "
                + "; ".join(
                    f"{language} {found.captions:,} ({_shown(found.examples)})" for language, found in self.foreign.items()
                )
            )
            lines.append(f"  judged by: {RULE}")
        else:
            lines.append("captions that look non-English: none found")
        return lines


def report_on(
    photos: Sequence[ReportedPhoto], *, template_of: Mapping[str, str] | None = None, notes_protocol: bool = True
) -> DataReport:
    """Looks at photos and captions as they were written.

    Args:
        template_of: the template that a caption was written by.
        notes_protocol: whether the data may choose the protocol that a sweep measures by.
    """
    captions = list(dict.fromkeys(caption for photo in photos for caption in photo.captions))
    lengths = token_counts(captions)
    too_long = sorted((c for c, tokens in lengths.items() if tokens > CLIP_CONTEXT), key=lambda c: -lengths[c])
    foreign: defaultdict[str, list[str]] = defaultdict(list)
    for caption, language in foreign_captions(captions).items():
        foreign[language].append(caption)
    hashes = [photo.hashes for photo in photos]
    splits = [SPLITS.index(photo.split) for photo in photos]
    names = [f"{photo.split}: {photo.file}" for photo in photos]
    per_product = list(Counter(photo.product_id for photo in photos).values())
    with_several = sum(count > 1 for count in per_product) / len(per_product)
    held_out = [photo for photo in photos if photo.split == "valid"]
    return DataReport(
        num_photos=len(photos),
        num_captions=len(captions),
        photos_per_product=PhotosPerProduct(
            fewest=min(per_product),
            median=median(per_product),
            most=max(per_product),
            share_with_several=with_several,
        ),
        protocol="product" if notes_protocol and with_several > SEVERAL_PHOTOS else None,
        validation=validation_facts([photo.captions[0] for photo in held_out], [photo.product_id for photo in held_out])
        if held_out
        else None,
        without_letters=_warning([caption for caption in captions if not any(map(str.isalpha, caption))]),
        broken_encoding=_warning([caption for caption in captions if _is_broken(caption)]),
        too_long_of_template=_shares(captions, set(too_long), template_of or {}),
        too_long=_warning(too_long),
        longest_tokens=max(lengths.values(), default=None),
        same_photos=count_same(hashes),
        most_frequent_photo=_most_frequent(photos),
        same_across_splits=same_across_splits(hashes, splits, names),
        similar_across_splits=similar_across_splits(hashes, splits, names),
        foreign={name: _warning(some) for name, some in sorted(foreign.items(), key=lambda item: (-len(item[1]), item[0]))},
    )


def token_counts(captions: Sequence[str]) -> dict[str, int]:
    """Tokens of CLIP's tokenizer, start and end included, of the captions that may have more than CLIP reads.

    A token stands for at least one byte. Lower case and mended text may have more bytes than the caption, not twice.
    """
    maybe = [caption for caption in captions if len(caption.encode()) > CLIP_CONTEXT // 2]
    if not maybe:
        return {}
    from open_clip.tokenizer import SimpleTokenizer  # imports torch

    tokenizer = SimpleTokenizer()
    return {caption: len(tokenizer.encode(caption)) + 2 for caption in maybe}


def _most_frequent(photos: Sequence[ReportedPhoto]) -> tuple[str, int]:
    ((pixels, count),) = Counter(photo.hashes.pixels for photo in photos).most_common(1)
    return next(photo.file for photo in photos if photo.hashes.pixels == pixels), count


def _is_broken(caption: str) -> bool:
    return not caption.isascii() and ("\ufffd" in caption or bool(is_bad(caption)))


def _shares(captions: Sequence[str], too_long: set[str], template_of: Mapping[str, str]) -> dict[str, float]:
    """By template, where there are several, the share of its captions that is too long, where there is any."""
    num = Counter(template_of[caption] for caption in captions if caption in template_of)
    long = Counter(template_of[caption] for caption in too_long if caption in template_of)
    return {template: long[template] / count for template, count in num.items() if long[template]} if len(num) > 1 else {}


def _warning(captions: Sequence[str]) -> CaptionWarning:
    return CaptionWarning(len(captions), tuple(captions[:_NUM_EXAMPLES]))


def _shown(captions: Sequence[str]) -> str:
    cut = (caption if len(caption) <= _SHOWN_LETTERS else caption[: _SHOWN_LETTERS - 3] + "..." for caption in captions[:2])
    return ", ".join(map(repr, cut))
