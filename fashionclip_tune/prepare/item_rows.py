"""Which photos of a table can be used: its cells read as captions and photos, the rest dropped."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fashionclip_tune.data.shards import ShardSample, normalised_caption, product_id_from_caption
from fashionclip_tune.prepare.caption_templates import CaptionTemplate
from fashionclip_tune.prepare.columns import NOT_THERE, ColumnChoice, has_id, usual_columns
from fashionclip_tune.prepare.html_text import without_html
from fashionclip_tune.prepare.photo_encoding import PhotoSource
from fashionclip_tune.prepare.photo_folder import NONE_NAMED, FoundPhoto, PhotoFolder
from fashionclip_tune.prepare.splits import Tie, UselessDataError
from fashionclip_tune.prepare.tables.tables import Record, Tables

_SHOWN = 80  # letters of a caption
_MAX_ATTRIBUTE_LENGTH = 200


@dataclass(frozen=True)
class ItemRow:
    """One photo of a row of the table, with the row's captions."""

    number: int  # of the table's row
    file: str  # the image as the table has it
    shown: str  # the same for people, with the table where there are several
    source: PhotoSource
    file_bytes: int  # of the file that holds the photo, so that a changed one is noticed
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
        return [*self.ties(), ("caption", normalised_caption(self.sample.captions[0])), ("image", str(self.source))]


@dataclass
class DroppedPhotos:
    """Counts the photos that are dropped and stops when they are more than half of the table's."""

    advice: Callable[[str], str]
    """What to look at, by the most frequent reason."""
    tables: str
    num_photos: int = 0  # those dropped included
    by_reason: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    def add(self, reason: str, number: int, file: str) -> None:
        self.by_reason.setdefault(reason, []).append((number, file))

    def refuse_if_most(self) -> None:
        lost = sum(map(len, self.by_reason.values()))
        if lost > self.num_photos / 2:
            reason, rows = max(self.by_reason.items(), key=lambda item: len(item[1]))
            raise UselessDataError(
                f"{lost:,} of the {self.num_photos:,} photos of {self.tables} cannot be used. Most frequent: "
                f"{reason} ({len(rows):,}, such as row {rows[0][0]}: {rows[0][1]!r}). {self.advice(reason)}"
            )


@dataclass(frozen=True)
class RecordPhotos:
    """A row of the table and its photos: the names as it has them, where they are, what is wrong, and how they were guessed."""

    record: Record
    photos: tuple[tuple[str, PhotoSource | None, str, str], ...]


def look_for_photos(tables: Tables, folder: PhotoFolder | None, columns: Sequence[str]) -> list[RecordPhotos]:
    """The photos of each row; a file that a row names twice counts once. Nothing is decoded yet.

    Args:
        folder: None where the table holds its photos, in the first of ``columns``.
    """
    if folder is None:
        column = None if tables.is_hdf5 else columns[0]
        return [
            RecordPhotos(each, ((f"{each.table.stem}_{each.number}", PhotoSource(each.table, each.number, column), "", ""),))
            for each in tables.records
        ]
    looked: list[tuple[Record, list[FoundPhoto]]] = []
    for record in tables.records:
        cells = [(cell, record.lists.get(name, ())) for name in columns if (cell := record.values[name])]
        looked.append((record, [photo for cell, parts in cells for photo in folder.find(cell, parts)]))
    found: list[RecordPhotos] = []
    for record, photos in looked:
        of_row: dict[Path | int, tuple[str, PhotoSource | None, str, str]] = {}
        for number, photo in enumerate(map(folder.settled, photos)):
            source = None if photo.path is None else PhotoSource(photo.path)
            of_row.setdefault(photo.path or number, (photo.name, source, photo.problem, photo.guess))
        found.append(RecordPhotos(record, tuple(of_row.values())))
    return found


def settled_ids(choice: ColumnChoice, tables: Tables, looked: Sequence[RecordPhotos]) -> tuple[ColumnChoice, list[str]]:
    """A guessed column that has several values for most photos numbers their captions, not products.

    A few such photos are what shops show where they have none.
    """
    if not choice.guessed:
        return choice, []
    others = [name for name in usual_columns("id", tables) if name != choice.name]
    for name in (*choice.names, *others):
        ids_of: dict[PhotoSource, set[str]] = {}
        for each in looked:
            for _, source, _, _ in each.photos:
                if source is not None:
                    ids_of.setdefault(source, set()).add(each.record.values[name])
        if sum(len(ids) > 1 for ids in ids_of.values()) <= len(ids_of) / 2:
            taken = ColumnChoice((name,), guessed=True)
            return taken, [] if taken == choice else [f"{_numbers_rows(choice)}; products: by {name} (guessed: --id-column)"]
    return NOT_THERE, [f"{_numbers_rows(choice)}, so it is no product (guessed: --id-column)"]


def _numbers_rows(choice: ColumnChoice) -> str:
    return f"column {choice.name} has several values for most photos"


@dataclass
class RowCounts:
    """What was done to rows and is no fault of theirs."""

    without_photo: int = 0
    filled: int = 0
    from_above: list[int] = field(default_factory=list)
    """Numbers of rows that say neither product nor caption."""
    merged: int = 0
    html: int = 0
    html_example: str = ""
    template_of: dict[str, str] = field(default_factory=dict)
    """By caption."""
    guessed: dict[str, dict[PhotoSource, str]] = field(default_factory=dict)
    """By how they were found, photos with an example."""

    def notes(self) -> list[str]:
        notes = [
            f"photos found {how}: {len(each):,} (such as {next(iter(each.values()))})"
            for how, each in self.guessed.items()
            if how
        ]
        if self.filled:
            notes.append(f"photos whose row has no caption, and which have that of their product's first row: {self.filled:,}")
        if self.from_above:
            rows = ", ".join(map(str, self.from_above[:3]))
            notes.append(
                f"rows that say neither product nor caption, taken for the product of the row above: {len(self.from_above):,} "
                f"(such as row {rows})"
            )
        if self.without_photo:
            notes.append(f"rows without photo and caption, of products that have both in other rows: {self.without_photo:,}")
        if self.merged:
            notes.append(f"rows of a photo that an earlier row has: {self.merged:,}; each photo has all its captions")
        if self.html:
            notes.append(f"captions with HTML, which was taken out: {self.html:,} (such as {self.html_example!r})")
        return notes


def usable_rows(
    tables: Tables,
    looked: Sequence[RecordPhotos],
    columns: Mapping[str, ColumnChoice],
    templates: Sequence[CaptionTemplate],
    splits_by_file: Mapping[Path, str],
    dropped: DroppedPhotos,
) -> tuple[list[ItemRow], RowCounts]:
    """The photos that have a caption and an image, and how they came about.

    A photo in several rows of one product and split is one sample with the captions of all of them. A row without a caption has
    that of its product's first row, as exports of shops mean it.
    """
    # ShardSample writes product_id and category itself, whatever the columns that they come from are called.
    no_attributes = {"", "product_id", "category", *(name for choice in columns.values() for name in choice.names)}
    attributes = [name for name in tables.columns if name not in no_attributes]
    several = len(tables.paths) > 1
    table_bytes = {path: path.stat().st_size for path in tables.paths}
    counts = RowCounts()
    fill = _Filling(tables, columns, templates)
    group_of = _groups(tables, columns["group"])
    rows: dict[tuple[PhotoSource, str, str], ItemRow] = {}
    for table, broken in tables.broken:
        dropped.num_photos += 1
        dropped.add(broken.reason, broken.number, f"{table.name}: {broken.text}" if several else broken.text)
    for each in looked:
        record = each.record
        values, is_filled = fill(record)
        if not each.photos and is_filled:
            counts.without_photo += 1
            continue
        single = {purpose: values.get(choice.names[0], "") if choice.names else "" for purpose, choice in columns.items()}
        if is_filled and columns["id"].names and not record.values[columns["id"].names[0]]:
            counts.from_above.append(record.number)
        single["id"] = single["id"] if has_id(single["id"]) else ""
        captions = _captions(record, values, templates, columns["caption"], counts)
        for file, source, problem, guess in each.photos or (("", None, NONE_NAMED, ""),):
            dropped.num_photos += 1
            shown = f"{record.table.name}: {file}" if several else file
            if problem or source is None or not captions:
                dropped.add(problem or "caption empty", record.number, shown)
                continue
            counts.guessed.setdefault(guess, {})[source] = f"{file!r} is {source.path.name}"
            counts.filled += is_filled
            split = splits_by_file.get(record.table, single["split"])
            sample = ShardSample(
                key="",
                jpeg=b"",
                captions=captions,
                product_id=single["id"] or product_id_from_caption(captions[0]),
                category=single["category"],
                attributes={n: v for n in attributes if 0 < len(v := record.values[n]) <= _MAX_ATTRIBUTE_LENGTH},
            )
            place = (source, single["id"], split)
            if (known := rows.get(place)) is not None:
                dropped.num_photos -= 1
                counts.merged += 1
                all_captions = tuple(dict.fromkeys((*known.sample.captions, *captions)))
                rows[place] = replace(known, sample=replace(known.sample, captions=all_captions))
                continue
            size = os.stat(source.path).st_size if source.row is None else table_bytes[source.path]
            rows[place] = ItemRow(record.number, file, shown, source, size, split, group_of(values), sample)
    return list(rows.values()), counts


def _groups(tables: Tables, choice: ColumnChoice) -> Callable[[Mapping[str, str]], str]:
    """The group that a row says; by a column of parents, a row that is a parent belongs to its children's."""
    if not choice.names:
        return lambda values: ""
    (column,) = choice.names
    ids = usual_columns("id", tables) if "parent" in column.casefold() else []
    # WooCommerce names a parent without a SKU by its number: id:500.
    parents = {value.removeprefix("id:") for value in tables.values(column)} - {""}

    def group(values: Mapping[str, str]) -> str:
        own = values[column].removeprefix("id:") if ids else values[column]
        return own or next((values[name] for name in ids if values[name] in parents), "")

    return group


class _Filling:
    """The values of a row; where it has no caption, those of its product's first row that has one."""

    def __init__(self, tables: Tables, columns: Mapping[str, ColumnChoice], templates: Sequence[CaptionTemplate]) -> None:
        self._id = columns["id"].names[0] if columns["id"].names else None
        self._caption = templates[0].columns[0] if templates else columns["caption"].names[0]
        of_templates = (column for template in templates for column in template.columns)
        of_purposes = (
            columns[purpose].names[0] for purpose in ("id", "caption", "category", "split", "group") if columns[purpose].names
        )
        self._columns = tuple(dict.fromkeys((*of_templates, *of_purposes)))
        self._photos = columns["image"].names
        self._above: Record | None = None
        self._first: dict[str, Record] = {}
        if self._id is not None:
            for record in tables.records:
                if record.values[self._caption]:
                    self._first.setdefault(record.values[self._id], record)

    def __call__(self, record: Record) -> tuple[dict[str, str], bool]:
        if self._id is None:
            return record.values, False
        if record.values[self._id] or record.values[self._caption]:
            self._above = record
        if record.values[self._caption]:
            return record.values, False
        product = record.values[self._id] or (above.values[self._id] if (above := self._goes_on(record)) else "")
        first = self._first.get(product) if product else None
        if first is None:
            return record.values, False
        return record.values | {name: first.values[name] for name in self._columns if not record.values[name]}, True

    def _goes_on(self, record: Record) -> Record | None:
        """The row above, where one that says neither product nor caption comes of merged cells.

        In a text file one that says more than photos may as well be a product whose name is missing.
        """
        above = self._above
        if above is None or record.table.suffix.lower().startswith(".xls"):
            return above
        says_more = (value not in ("", above.values[name]) for name, value in record.values.items() if name not in self._photos)
        return None if any(says_more) else above


def _captions(
    record: Record, values: dict[str, str], templates: Sequence[CaptionTemplate], plain: ColumnChoice, counts: RowCounts
) -> tuple[str, ...]:
    """The row's captions, the original first; none where that is empty. A column of lists has several."""
    if templates:
        written = [template.fill(values) for template in templates]
    else:
        written = list(record.lists.get(plain.names[0], ())) or [values[plain.names[0]]]
    read = [without_html(caption) for caption in written]
    for before, caption in zip(written, read, strict=True):
        if before != caption:
            counts.html += 1
            counts.html_example = counts.html_example or before[:_SHOWN]
    counts.template_of |= {caption: template.text for caption, template in zip(read, templates, strict=False)}
    first, *others = read
    return (first, *filter(None, others)) if first else ()
