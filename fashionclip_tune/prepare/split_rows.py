"""Which rows of a table go to which split, and what might leak between splits."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fashionclip_tune.prepare.columns import NOT_THERE, ColumnChoice, usual_columns
from fashionclip_tune.prepare.item_rows import ItemRow
from fashionclip_tune.prepare.options import PrepareOptions
from fashionclip_tune.prepare.splits import drawn_splits, given_splits, refuse_if_empty
from fashionclip_tune.prepare.tables.tables import Tables

_FEWEST_GROUPS = 10


def without_useless_group(choice: ColumnChoice, rows: Sequence[ItemRow]) -> tuple[ColumnChoice, list[ItemRow], list[str]]:
    """Without a guessed group of which there are too few, or one of which is too large, to be spread over splits."""
    sizes = Counter(row.group for row in rows if row.group)
    if not choice.guessed or not sizes or (len(sizes) >= _FEWEST_GROUPS and max(sizes.values()) <= len(rows) / 2):
        return choice, list(rows), []
    why = f"it has {len(sizes):,} values, and one of them {max(sizes.values()):,} photos"
    note = f"column {choice.name} is not kept in one split: {why} (guessed: --group-column)"
    return NOT_THERE, [replace(row, group="") for row in rows], [note]


def splits_of(
    options: PrepareOptions, columns: Mapping[str, ColumnChoice], by_file: Mapping[Path, str], rows: Sequence[ItemRow]
) -> tuple[list[str], str | None, str]:
    """The split of each row, what said so (None: drawn), and what to try where a split is empty."""
    column = columns["split"].name
    if column is not None or by_file:
        splits_from = "the names of the files" if column is None else f"the column {column}"
        splits = given_splits([(row.number, row.split) for row in rows], column=str(columns["split"]))
        advice = "give a file of that split with another --table" if column is None else "check --split-column"
    else:
        splits_from = None
        shares = {"valid_share": options.valid_share, "test_share": options.test_share}
        splits = drawn_splits([row.all_ties() for row in rows], **shares, seed=options.seed)
        advice = "rows of one product, group or caption stay together: try other --valid-share, --test-share or --seed"
    refuse_if_empty(splits, advice)
    return splits, splits_from, advice


def other_products(
    columns: Mapping[str, ColumnChoice], tables: Tables, rows: Sequence[ItemRow], splits: Sequence[str]
) -> list[str]:
    """Warns of columns that may be the product's and by which products would lie in several splits."""
    taken = {name for purpose in ("id", "group") for name in columns[purpose].names}
    notes = []
    for name in usual_columns("id", tables):
        homes: dict[str, set[str]] = {}
        for row, split in zip(rows, splits, strict=True):
            if value := row.sample.attributes.get(name):
                homes.setdefault(value, set()).add(split)
        leaking = sum(len(of_value) > 1 for of_value in homes.values())
        if name not in taken and leaking:
            notes.append(
                f"warning: if {name} is the product, {leaking:,} of its {len(homes):,} products are in several splits, and "
                f"scores will flatter: --id-column {name}, or --group-column {name}"
            )
    return notes
