"""What every kind of table is read into: rows of text, those that cannot be trusted, and what was guessed of the file."""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Row(NamedTuple):
    """``number``: the header of a CSV or Excel file is row 1; elsewhere rows count from 0."""

    number: int
    values: dict[str, str]
    lists: Mapping[str, tuple[str, ...]] = {}
    """Of columns that hold lists: their parts, which ``values`` has joined."""


class BrokenRow(NamedTuple):
    """A row whose cells may stand in the wrong columns: it is left out, counted and named."""

    number: int
    reason: str
    text: str


@dataclass(frozen=True)
class TableRows:
    """One file's content."""

    columns: tuple[str, ...]
    rows: Sequence[Row]
    broken: Sequence[BrokenRow] = ()
    notes: Sequence[str] = ()
    """What was guessed, a line each."""
    photo_columns: tuple[str, ...] = ()
    """Those that hold the photos themselves."""
    photos_of_block: int = 1
    """Rows whose photos are read together, where the file holds them."""


_TITLE_LINES = 10
SHOWN = 60
"""Letters of a broken row."""


@dataclass
class Header:
    """The names of the columns of a table with a header row; a name that is there again gets a number."""

    cells: Sequence[str]
    names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for place, cell in enumerate(self.cells, start=1):
            name, count = cell, 1
            while name and name in self.names:
                count += 1
                name = f"{cell} ({count})"
            if count > 1:
                self.notes.append(
                    f"{count} columns have the same name {cell!r}: the first one counts, column {place} is called {name!r} here"
                )
            self.names.append(name)

    @classmethod
    def place(cls, lines: Sequence[Sequence[str]]) -> int:
        """Of the header: the first of the first lines that has several cells; a title above a table has one."""
        filled = [sum(map(bool, line)) for line in lines[:_TITLE_LINES]]
        several = next((place for place, count in enumerate(filled) if count > 1), None)
        return several if several is not None else next((place for place, count in enumerate(filled) if count), 0)

    def sorted_out(self, numbered: Iterable[tuple[int, Sequence[str], str]]) -> tuple[list[Row], list[BrokenRow]]:
        """Rows and those that do not fit, of their numbers, cells and text."""
        rows: list[Row] = []
        broken: list[BrokenRow] = []
        for each in numbered:
            row = self._row(*each)
            if isinstance(row, Row):
                rows.append(row)
            else:
                broken.append(row)
        return rows, broken

    def _row(self, number: int, cells: Sequence[str], text: str) -> Row | BrokenRow:
        """Cells beyond the header count if they say anything."""
        more = cells[len(self.names) :]
        if any(more):
            return BrokenRow(number, f"more cells than the header's {len(self.names)}", text)
        if len(cells) < len(self.names):
            return BrokenRow(number, f"fewer cells than the header's {len(self.names)}", text)
        return Row(number, {name: cell for name, cell in zip(self.names, cells, strict=False) if name})


def as_text(value: Any) -> str:
    """A value as a CSV file would have it. Lists are joined by ``|``; Bytes are UTF-8 or else latin-1, as in
    Fashion-Gen: text in latin-1 with accents is hardly ever UTF-8 by chance.

    1163.0 becomes "1163": pandas turns whole numbers into floats where one is missing.
    """
    if value is None or value != value:  # not a number
        return ""
    if isinstance(value, bytes):
        try:
            text = value.decode()
        except UnicodeDecodeError:
            text = value.decode("latin-1")
        return text.strip("\0 \t\r\n")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    if isinstance(value, list):
        return "|".join(filter(None, map(as_text, value)))
    return str(value).strip()
