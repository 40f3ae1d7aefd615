"""Turns a shop's table of items and a folder of images into shards (``shards`` says what they look like).

Rows that cannot be used are dropped, counted by reason and reported; when most of them cannot, that is an error. The
result depends on the rows, the options and the seed only: not on the order of the table, except where rows are equal.
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fashionclip_tune.errors import UserError
from fashionclip_tune.photos import find_photo, photo_as_jpeg, unique_keys
from fashionclip_tune.shards import (
    SPLITS,
    ShardSample,
    normalised_caption,
    product_id_from_caption,
    write_dataset_json,
    write_split,
)
from fashionclip_tune.splits import Tie, count_leaking_products, drawn_splits, given_splits, refuse_if_empty, seeded_fraction

# What a column is for, and the names by which it is guessed: the first that the table has, in any spelling.
_USUAL_NAMES = {
    "image": ("image", "image_path", "image_file", "image_name", "filename", "file", "photo", "picture", "path"),
    "caption": ("caption", "title", "name", "product_name", "product_display_name", "text", "description"),
    "id": ("product_id", "id", "item_id", "article_id", "sku"),
    "category": ("category", "article_type", "product_type", "type"),
    "split": ("split", "subset", "partition"),
    "group": ("group_id", "group", "family_id", "family"),
}
_MAX_ATTRIBUTE_LENGTH = 200


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Where the items are and where the shards go. A column that is None is guessed by its name.

    Without a split column, splits are drawn with these shares; rows of one product, group or caption stay together.
    """

    table: Path
    images: Path
    out: Path
    image_column: str | None = None
    caption_column: str | None = None
    id_column: str | None = None
    category_column: str | None = None
    split_column: str | None = None
    group_column: str | None = None
    valid_share: float = 0.1
    test_share: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class ColumnChoice:
    """The column that serves a purpose (None: the table has none), and whether its name was guessed."""

    name: str | None
    guessed: bool

    def __str__(self) -> str:
        return "none" if self.name is None else f"{self.name}{' (guessed)' if self.guessed else ''}"


@dataclass(frozen=True)
class SplitCounts:
    """What was written for one split."""

    samples: int
    products: int
    shards: int


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What was written, and what was not; ``str(report)`` is for people."""

    out: Path
    num_rows: int
    splits: Mapping[str, SplitCounts]
    columns: Mapping[str, ColumnChoice]  # by purpose: image, caption, id, category, split, group
    dropped: Mapping[str, tuple[tuple[int, str], ...]]  # by reason: row number (the header is row 1), file
    splits_drawn: bool
    leaking_products: int  # how many products, or products of a group, the split column puts into several splits

    def lines(self) -> list[str]:
        lines = [f"data set written to {self.out}"]
        for split, counts in self.splits.items():
            numbers = f"{counts.samples:,} samples, {counts.products:,} products, {counts.shards:,} shards"
            lines.append(f"  {split:5}  {numbers if counts.samples else 'none'}")
        lines.append("columns: " + ", ".join(f"{purpose}: {choice}" for purpose, choice in self.columns.items()))
        if self.columns["id"].name is None:
            lines.append("no product ids: photos with the same caption count as one product")
        lines.append("splits: " + ("drawn" if self.splits_drawn else f"from the column {self.columns['split'].name}"))
        lines.append(f"dropped: {sum(map(len, self.dropped.values())):,} of {self.num_rows:,} rows")
        for reason, rows in self.dropped.items():
            examples = ", ".join(f"row {number}: {file!r}" for number, file in rows[:3])
            lines.append(f"  {reason}: {len(rows):,} ({examples}{', ...' if len(rows) > 3 else ''})")
        if self.leaking_products:
            lines.append(f"warning: {self.leaking_products:,} products are in several splits: scores will flatter")
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass(frozen=True)
class _Row:
    number: int
    file: str  # the image as the table has it
    path: Path
    split: str
    group: str
    sample: ShardSample  # its key and jpeg come last

    def ties(self) -> list[Tie]:
        """What leaks when it is in several splits."""
        return [("product", self.sample.product_id), *([("group", self.group)] if self.group else [])]

    def identity(self) -> str:
        return f"{self.file}\n{self.sample.product_id}\n{self.sample.captions[0]}"

    def all_ties(self) -> list[Tie]:
        """What drawn splits keep together; a split column may cut through these without our calling it a leak."""
        return [*self.ties(), ("caption", normalised_caption(self.sample.captions[0])), ("image", str(self.path))]


@dataclass
class _Losses:
    """Counts the rows that are dropped and stops when they are more than half of the table."""

    options: PrepareOptions
    num_rows: int
    by_reason: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    def add(self, reason: str, number: int, file: str) -> None:
        self.by_reason.setdefault(reason, []).append((number, file))

    def refuse_if_most(self) -> None:
        lost = sum(map(len, self.by_reason.values()))
        if lost > self.num_rows / 2:
            reason, rows = max(self.by_reason.items(), key=lambda item: len(item[1]))
            raise UserError(
                f"{lost:,} of the {self.num_rows:,} rows of {self.options.table} cannot be used. Most frequent: "
                f"{reason} ({len(rows):,} rows, such as row {rows[0][0]}: {rows[0][1]!r}). "
                f"Is --images {self.options.images} the right folder? Are --image-column and --caption-column right?"
            )


def prepare(options: PrepareOptions, *, on_progress: Callable[[int, int], None] | None = None) -> PrepareReport:
    """Writes the shards and then ``dataset.json``; when that fails, it leaves no shards behind.

    ``on_progress(done, total)`` is called after each image; total leaves out the rows dropped before any is decoded.

    Raises:
        UserError: an option, the table or the folder of images is wrong, or most of the rows cannot be used.
    """
    _check(options)
    names, records = _read_table(options.table)
    columns = {purpose: _choose_column(purpose, options, names) for purpose in _USUAL_NAMES}
    losses = _Losses(options, len(records))
    rows = _usable_rows(records, columns, losses)
    losses.refuse_if_most()
    # A table sorted by category would make shards that are all alike, so rows are shuffled, alike for any order.
    rows.sort(key=lambda row: seeded_fraction(options.seed, row.identity()))
    keys = unique_keys(row.file for row in rows)
    drawn = columns["split"].name is None
    if drawn:
        shares = {"valid_share": options.valid_share, "test_share": options.test_share}
        splits = drawn_splits([row.all_ties() for row in rows], **shares, seed=options.seed)
        advice = "rows of one product, group or caption stay together: try other --valid-share, --test-share or --seed"
    else:
        splits = given_splits([(row.number, row.split) for row in rows], column=str(columns["split"]))
        advice = "check --split-column"
    refuse_if_empty(splits, advice)
    num_done = 0

    def samples(wanted: str) -> Iterator[ShardSample]:
        nonlocal num_done
        for row, key, split in zip(rows, keys, splits, strict=True):
            if split != wanted:
                continue
            try:
                jpeg = photo_as_jpeg(row.path)
            except Exception:  # on a broken file Pillow raises nearly anything: OSError, SyntaxError, struct.error
                losses.add("image cannot be decoded", row.number, row.file)
                losses.refuse_if_most()
            else:
                yield replace(row.sample, key=key, jpeg=jpeg)
            num_done += 1
            if on_progress is not None:
                on_progress(num_done, len(rows))

    try:
        written = {split: write_split(options.out, split, samples(split)) for split in SPLITS}
        refuse_if_empty([split for split in SPLITS if written[split]["samples"]], advice)
    except BaseException:
        for pattern in ("clip_dataset_*.tar", "clip_dataset_*.tar.tmp"):
            for shard in options.out.glob(pattern):  # ours: there were none when we began
                shard.unlink()
        raise
    source = ", ".join(f"{purpose}: {choice.name}" for purpose, choice in columns.items())
    if drawn:
        source += f", splits drawn: seed {options.seed}, valid {options.valid_share}, test {options.test_share}"
    found = {split: content for split, content in written.items() if content["samples"]}
    write_dataset_json(options.out, found, source=f"{options.table.name} ({source})")
    return PrepareReport(
        out=options.out,
        num_rows=len(records),
        splits={s: SplitCounts(w["samples"], w["products"], len(w["shards"])) for s, w in written.items()},
        columns=columns,
        dropped={reason: tuple(lost) for reason, lost in losses.by_reason.items()},
        splits_drawn=drawn,
        leaking_products=0 if drawn else count_leaking_products([row.ties() for row in rows], splits),
    )


def _check(options: PrepareOptions) -> None:
    valid, test = options.valid_share, options.test_share
    if not (valid > 0 and test >= 0 and valid + test < 1):
        raise UserError(
            f"--valid-share {valid} and --test-share {test} do not fit: valid must be above 0, test at least 0, "
            "and their sum below 1, since train gets the rest"
        )
    if not options.table.is_file():
        problem = "is a folder" if options.table.is_dir() else "does not exist"
        raise UserError(f"table {options.table} {problem}: give a CSV file with --table")
    if not options.images.is_dir():
        raise UserError(f"--images {options.images} is not a folder: give the folder that holds the table's images")
    if not any(options.images.iterdir()):
        raise UserError(f"--images {options.images} is empty: give the folder that holds the table's images")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is a file: choose another --out")
    if taken := sorted([*options.out.glob("dataset.json"), *options.out.glob("clip_dataset_*.tar")]):
        raise UserError(f"--out {options.out} holds a data set already ({taken[0].name}): choose another or remove it")


def _read_table(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The names of the columns, and for each row its number (the header is row 1) and its values by column."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header, *lines = list(csv.reader(file)) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"table {path} is not a CSV file in UTF-8 ({error}): export it as such") from error
    names = [name.strip() for name in header]
    if not any(names):
        raise UserError(f"table {path} has no header: its first line must name the columns")
    empty = dict.fromkeys(names, "")  # for rows that are too short
    cells = ((number, [cell.strip() for cell in line]) for number, line in enumerate(lines, start=2))
    records = [(number, empty | dict(zip(names, line, strict=False))) for number, line in cells if any(line)]
    if not records:
        raise UserError(f"table {path} has a header but no rows")
    return names, records


def _choose_column(purpose: str, options: PrepareOptions, names: list[str]) -> ColumnChoice:
    chosen: str | None = getattr(options, f"{purpose}_column")
    has = f"the table has the columns {', '.join(names)}"
    if chosen is not None:
        if chosen not in names:
            raise UserError(f"--{purpose}-column {chosen}: there is no such column in {options.table}; {has}")
        return ColumnChoice(chosen, guessed=False)
    spellings = {_letters(name): name for name in reversed(names)}
    for usual in _USUAL_NAMES[purpose]:
        if _letters(usual) in spellings:
            return ColumnChoice(spellings[_letters(usual)], guessed=True)
    if purpose in ("image", "caption"):
        raise UserError(f"no column of {options.table} looks like the {purpose}: choose it with --{purpose}-column; {has}")
    return ColumnChoice(None, guessed=False)


def _letters(name: str) -> str:
    """``productDisplayName``, ``Product display name`` and ``product_display_name`` are the same name."""
    return re.sub(r"[\s_-]", "", name).casefold()


def _usable_rows(records: list[tuple[int, dict[str, str]]], columns: Mapping[str, ColumnChoice], losses: _Losses) -> list[_Row]:
    """The rows that have a caption and an image file; nothing is decoded yet."""
    # ShardSample writes product_id and category itself, whatever the columns that they come from are called.
    no_attributes = {"", "product_id", "category", *(choice.name for choice in columns.values())}
    rows: list[_Row] = []
    for number, record in records:
        values = {purpose: record[choice.name] if choice.name else "" for purpose, choice in columns.items()}
        file, caption = values["image"], values["caption"]
        if Path(file).is_absolute() or ".." in Path(file).parts:
            losses.add("image outside the folder", number, file)
        elif not caption:
            losses.add("caption empty", number, file)
        elif (path := find_photo(losses.options.images, file)) is None:
            losses.add("image missing", number, file)
        else:
            sample = ShardSample(
                key="",
                jpeg=b"",
                captions=(caption,),
                product_id=values["id"] or product_id_from_caption(caption),
                category=values["category"],
                attributes={
                    name: value
                    for name, value in record.items()
                    if name not in no_attributes and 0 < len(value) <= _MAX_ATTRIBUTE_LENGTH
                },
            )
            rows.append(_Row(number, file, path, values["split"], values["group"], sample))
    return rows
