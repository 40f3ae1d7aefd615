"""Which split each row of a table goes to: as a column says, or drawn so that nothing is in two splits.

What rows share that belong into one split is a ``Tie``: a kind and a value, such as ("product", "P17"). A row's first
tie is its product, which it always has.
"""

import hashlib
from collections.abc import Iterable, Sequence

from fashionclip_tune.errors import UserError

Tie = tuple[str, str]


class UselessDataError(UserError):
    """The photos themselves cannot make a data set: going on later would not help."""


SPLIT_WORDS = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("valid", "val", "validation", "dev"), "valid"
)


def seeded_fraction(seed: int, text: str) -> float:
    """A number in [0, 1) that looks random but depends on the seed and the text only, on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{text}".encode()).digest()[:6], "big") / 2**48


def given_splits(values: Iterable[tuple[int, str]], *, column: str) -> list[str]:
    """The splits that a column says, from the row numbers and values of the column.

    Raises:
        UserError: a value is not a split.
    """
    splits: list[str] = []
    for number, value in values:
        if value.casefold() not in SPLIT_WORDS:
            raise UserError(
                f"column {column}, row {number}: {value!r} is not a split; allowed are "
                f"{', '.join(SPLIT_WORDS)}. If it holds something else, rename it or choose --split-column"
            )
        splits.append(SPLIT_WORDS[value.casefold()])
    return splits


def drawn_splits(rows: Sequence[Sequence[Tie]], *, valid_share: float, test_share: float, seed: int) -> list[str]:
    """Draws a split for each component: rows, each given by its ties, that are joined by them, directly or not."""
    parents: dict[Tie, Tie] = {}

    def root(tie: Tie) -> Tie:
        parents.setdefault(tie, tie)
        while parents[tie] != tie:
            parents[tie] = parents[parents[tie]]
            tie = parents[tie]
        return tie

    for product, *others in rows:
        for other in (product, *others):
            # A component's root is its smallest product, whatever the order of the rows.
            first, second = sorted((root(product), root(other)), key=lambda tie: (tie[0] != product[0], tie))
            parents[second] = first
    fractions = [seeded_fraction(seed, root(product)[1]) for product, *_ in rows]
    held_out = ["valid" if each < valid_share else "test" for each in fractions]
    splits = [split if each < valid_share + test_share else "train" for each, split in zip(fractions, held_out, strict=True)]
    # Of few components none may be drawn for a split: those nearest to it go there.
    if fractions and min(fractions) < max(fractions):
        if "valid" not in splits:
            splits = ["valid" if each == min(fractions) else split for each, split in zip(fractions, splits, strict=True)]
        if "train" not in splits:
            splits = ["train" if each == max(fractions) else split for each, split in zip(fractions, splits, strict=True)]
    return splits


def count_leaking_products(rows: Sequence[Sequence[Tie]], splits: Sequence[str]) -> int:
    """How many products have a row with a tie that is in several splits."""
    homes: dict[Tie, set[str]] = {}
    for ties, split in zip(rows, splits, strict=True):
        for tie in ties:
            homes.setdefault(tie, set()).add(split)
    return len({ties[0] for ties in rows if any(len(homes[tie]) > 1 for tie in ties)})


def refuse_if_empty(splits: Sequence[str], advice: str) -> None:
    for split in ("train", "valid"):
        if split not in splits:
            raise UselessDataError(f"no usable row is in the {split} split, and a sweep needs both train and valid: {advice}")
