"""Which photos of a table can be used: its columns chosen, its cells read as captions and photos, the rest dropped."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fashionclip_tune.data.shards import ShardSample, normalised_caption, product_id_from_caption
from fashionclip_tune.errors import UserError
from fashionclip_tune.prepare.caption_templates import CaptionTemplate
from fashionclip_tune.prepare.photo_encoding import PhotoSource
from fashionclip_tune.prepare.photos import PhotoFolder
from fashionclip_tune.prepare.splits import Tie, UselessDataError
from fashionclip_tune.prepare.tables import Record, Tables

# What a column is for, and the names by which it is guessed: the first that the table has, in any spelling. Fashion-Gen's
# names begin with input_, and its descriptions are what it is about; its names are too short to tell products apart.
USUAL_NAMES = {
    "image": ("image", "image_path", "image_file", "image_name", "filename", "file", "photo", "picture", "path"),
    "caption": (
        *("caption", "input_description", "title", "name", "product_name", "product_display_name", "text", "description"),
        "input_name",
    ),
    "id": ("product_id", "id", "item_id", "article_id", "sku", "input_product_id"),
    "category": ("category", "article_type", "product_type", "type", "input_category"),
    "split": ("split", "subset", "partition"),
    "group": ("group_id", "group", "family_id", "family"),
}
_MAX_ATTRIBUTE_LENGTH = 200


@dataclass(frozen=True)
class ColumnChoice:
    """The columns that serve a purpose (none: the table has none; several: photos), and whether the name was guessed."""

    names: tuple[str, ...]
    guessed: bool

    @property
    def name(self) -> str | None:
        return " and ".join(self.names) or None

    def __str__(self) -> str:
        return f"{self.name}{' (guessed)' if self.guessed else ''}" if self.names else "none"


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

    advice: str
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
                f"{lost:,} of the {self.num_photos:,} rows of {self.tables} cannot be used. Most frequent: "
                f"{reason} ({len(rows):,} rows, such as row {rows[0][0]}: {rows[0][1]!r}). {self.advice}"
            )


def choose_columns(purpose: str, chosen: Sequence[str], tables: Tables) -> ColumnChoice:
    """The columns that the user chose, or the one whose name is usual; only photos may stand in several.

    Raises:
        UserError: a chosen column does not exist, or none is usual where one is needed.
    """
    has = f"the table has the columns {', '.join(tables.columns)}"
    of = " and ".join(path.name for path in tables.paths)
    for name in chosen:
        if name not in tables.columns:
            raise UserError(f"--{purpose}-column {name}: there is no such column in {of}; {has}")
    if chosen:
        return ColumnChoice(tuple(chosen), guessed=False)
    spellings = {_letters(name): name for name in reversed(tables.columns)}
    for usual in USUAL_NAMES[purpose]:
        if _letters(usual) in spellings:
            return ColumnChoice((spellings[_letters(usual)],), guessed=True)
    if purpose in ("image", "caption"):
        instead = f"--{purpose}-column" + (" or write it with --caption" if purpose == "caption" else "")
        raise UserError(f"no column of {of} looks like the {purpose}: choose it with {instead}; {has}")
    return ColumnChoice((), guessed=False)


def _letters(name: str) -> str:
    """``productDisplayName``, ``Product display name`` and ``product_display_name`` are the same name."""
    return re.sub(r"[\s_-]", "", name).casefold()


def usable_rows(
    tables: Tables,
    images: Path | None,
    columns: Mapping[str, ColumnChoice],
    templates: Sequence[CaptionTemplate],
    splits_by_file: Mapping[Path, str],
    dropped: DroppedPhotos,
) -> list[ItemRow]:
    """The photos that have a caption and an image file; nothing is decoded yet."""
    # ShardSample writes product_id and category itself, whatever the columns that they come from are called.
    no_attributes = {"", "product_id", "category", *(name for choice in columns.values() for name in choice.names)}
    attributes = [name for name in tables.columns if name not in no_attributes]
    folder = None if images is None else PhotoFolder(images)
    several = len(tables.paths) > 1
    table_bytes = {path: path.stat().st_size for path in tables.paths}
    rows: list[ItemRow] = []
    for record in tables.records:
        single = {
            purpose: record.values[choice.names[0]] if choice.names else ""
            for purpose, choice in columns.items()
            if purpose != "image"
        }
        captions = _captions(record, templates, single["caption"])
        for file, source, problem in _photos(record, folder, columns["image"].names):
            dropped.num_photos += 1
            shown = f"{record.table.name}: {file}" if several else file
            if problem or source is None or not captions:
                dropped.add(problem or "caption empty", record.number, shown)
                continue
            sample = ShardSample(
                key="",
                jpeg=b"",
                captions=captions,
                product_id=single["id"] or product_id_from_caption(captions[0]),
                category=single["category"],
                attributes={n: v for n in attributes if 0 < len(v := record.values[n]) <= _MAX_ATTRIBUTE_LENGTH},
            )
            size = os.stat(source.path).st_size if source.row is None else table_bytes[source.path]
            split = splits_by_file.get(record.table, single["split"])
            rows.append(ItemRow(record.number, file, shown, source, size, split, single["group"], sample))
    return rows


def _captions(record: Record, templates: Sequence[CaptionTemplate], plain: str) -> tuple[str, ...]:
    """The row's captions, the original first; none where that is empty."""
    if not templates:
        return (plain,) if plain else ()
    first, *others = (template.fill(record.values) for template in templates)
    return (first, *filter(None, others)) if first else ()


def _photos(
    record: Record, folder: PhotoFolder | None, columns: Sequence[str]
) -> Iterator[tuple[str, PhotoSource | None, str]]:
    """The photos of a row: as the table has them, where they are, and what is wrong with them. A photo counts once."""
    if folder is None:
        yield f"{record.table.stem}_{record.number}", PhotoSource(record.table, record.number), ""
        return
    cells = [cell for name in columns if (cell := record.values[name])] or [""]
    seen: set[Path] = set()
    for cell in cells:
        try:
            found = folder.find(cell)
        except ValueError:
            yield cell, None, "image outside the folder"
            continue
        for file, path in found:
            if path is None:
                yield file, None, "image missing"
            elif path not in seen:
                seen.add(path)
                yield file, PhotoSource(path), ""
