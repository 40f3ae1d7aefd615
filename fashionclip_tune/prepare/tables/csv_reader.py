"""CSV as shops and spreadsheets write it: separator, encoding and quoting are found, and no row is cut or swallowed in silence.

A row that does not fit the header, or that a stray quotation mark would join with those below, is left out and named
(``BrokenRow``); reading goes on in the line after it.
"""

import codecs
import csv
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fashionclip_tune.errors import UserError
from fashionclip_tune.prepare.tables.cells import SHOWN, BrokenRow, Header, Row, TableRows

SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_GUESSED_BY = 200  # lines
_BAD_BYTES = "bytes that are not UTF-8"
_LONE_SURROGATE = re.compile("[\udc80-\udcff]")  # as which such bytes are decoded


class _Record(NamedTuple):
    """Lines ``start`` to ``end`` of the file; ``problem``: why the cells are not to be trusted."""

    start: int
    end: int
    cells: list[str]
    problem: str = ""


def read_csv(path: Path, *, encoding: str | None = None, separator: str | None = None) -> TableRows:
    """Reads all rows.

    Args:
        encoding: a name that Python knows; None: by its byte order mark, else UTF-8, else Windows-1252, or Mac Roman by a
            Mac's line ends.
        separator: one character; None: the one of ``SEPARATORS`` by which header and rows agree, or what a first line
            ``sep=;`` says.

    Raises:
        UserError: the file is no text in that encoding, or has no header.
    """
    csv.field_size_limit(sys.maxsize)  # a description may have a picture in it
    text, notes = _decoded(path, encoding)
    lines = list(io.StringIO(text, newline=""))
    start = 0
    if lines and lines[0].strip().lower().startswith("sep=") and len(lines[0].strip("\r\n")) == 5:
        start, said = 1, lines[0][4]
        separator = separator or said
    elif separator is None:
        separator = _likely_separator(lines)
        if separator != ",":
            (name,) = (name for name, each in SEPARATORS.items() if each == separator)
            notes.append(f"separated by {name} (guessed: --separator)")
    dialect = _dialect(separator)
    records = list(_records(lines, start, dialect))
    if '\\"' in text:
        escaped = list(_records(lines, start, dialect | {"escapechar": "\\"}))
        if _num_broken(escaped) < _num_broken(records):
            records = escaped
            notes.append("quotation marks are escaped by a backslash")
    place = Header.place([record.cells or [record.problem] for record in records])
    if not records or not any(records[place].cells or records[place].problem):
        raise UserError(f"table {path} has no header: its first line must name the columns")
    first = records[place]
    if place and (above := [_shown(lines, record) for record in records[:place] if any(record.cells)]):
        notes.append(f"its header is row {start + place + 1}; above it are {', '.join(map(repr, above))}")
    if first.problem:
        raise UserError(f"table {path}: its header, row 1, has {first.problem}: {_shown(lines, first)}")
    header = Header(first.cells)
    numbered = list(enumerate(records[place + 1 :], start=start + place + 2))
    unread = [BrokenRow(number, each.problem, _shown(lines, each)) for number, each in numbered if each.problem]
    whole = ((number, each.cells, _shown(lines, each)) for number, each in numbered if not each.problem and any(each.cells))
    rows, unfit = header.sorted_out(whole)
    _mend_floats(header.names, rows)
    notes = [f"{path.name}: {note}" for note in (*notes, *header.notes)]
    return TableRows(tuple(filter(None, header.names)), rows, sorted([*unread, *unfit]), notes)


def _mend_floats(columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Whole numbers that pandas turned into floats, since one is missing, are whole again: 1163.0 is 1163."""
    for column in filter(None, columns):
        if all(re.fullmatch(r"(\d+\.0)?", row.values[column]) for row in rows):
            for row in rows:
                row.values[column] = row.values[column].removesuffix(".0")


def _decoded(path: Path, encoding: str | None) -> tuple[str, list[str]]:
    """Bytes that are not of the encoding become lone surrogates where the rest is UTF-8: their rows are broken, not all."""
    data = path.read_bytes()
    if encoding is None:
        encoding = next((name for mark, name in _BOMS if data.startswith(mark)), None) or _without_mark(data)
    try:
        if encoding is not None:
            return data.decode(encoding), []
        text = data.decode("utf-8", errors="surrogateescape")
        num_bad = len(_LONE_SURROGATE.findall(text))
        if num_bad == 0:
            return text, []
        num_good = sum(letter > "\x7f" for letter in text) - num_bad
        if num_good > num_bad:
            return text, []
        # Lines of a bare carriage return are those of Excel's "CSV (Macintosh)".
        name, encoding = ("Mac Roman", "mac_roman") if b"\r" in data and b"\n" not in data else ("Windows-1252", "cp1252")
        text = data.decode(encoding)
    except LookupError as error:
        raise UserError(f"--encoding {encoding}: no such encoding; known are utf-8, utf-16, cp1252 and others") from error
    except UnicodeError as error:
        tried = "UTF-8 or Windows-1252" if encoding == "cp1252" else encoding
        raise UserError(f"table {path} is no text in {tried} ({error}): choose its encoding with --encoding") from error
    word = next((word for word in re.findall(r"\w+", text) if not word.isascii()), "")
    return text, [f"in {name} (guessed: --encoding), with words such as {word[:SHOWN]!r}"]


def _without_mark(data: bytes) -> str | None:
    """UTF-16 in Latin script is a zero in every other byte."""
    head = data[:1000]
    for name, start in (("utf-16-le", 1), ("utf-16-be", 0)):
        if len(head) > 3 and head[start::2].count(0) > 0.4 * len(head):
            return name
    return None


def _likely_separator(lines: Sequence[str]) -> str:
    """The one of which the header has any, by which most rows have as many cells as it.

    Of several, first the one whose header comes first, since commas in texts would make titles of headers.
    """
    head = lines[:_GUESSED_BY]

    def agreement(separator: str) -> tuple[bool, int, float, int]:
        records = [each for each in _records(head, 0, _dialect(separator)) if any(each.cells)]
        if not records:
            return False, 0, 0.0, 0
        place = Header.place([each.cells for each in records])
        width = len(records[place].cells)
        others = records[place + 1 :]
        fitting = sum(len(each.cells) == width for each in others) / max(1, len(others))
        return width > 1, -place, fitting, width

    return max(SEPARATORS.values(), key=agreement)


def _dialect(separator: str) -> dict[str, Any]:
    return {"delimiter": separator, "strict": True, "skipinitialspace": True}


def _records(lines: Sequence[str], start: int, dialect: dict[str, Any]) -> Iterator[_Record]:
    """After a quotation mark that is not closed, or closed in the middle of a cell, the next line begins a record."""
    width = 0

    def feed() -> Iterator[str]:
        yield from (lines[place] for place in range(start, len(lines)))

    reader, begun = csv.reader(feed(), **dialect), start
    while start < len(lines):
        problem, cells = "", list[str]()
        try:
            cells = [cell.strip() for cell in next(reader)]
        except csv.Error:
            problem = "a quotation mark that is not closed, or stands within a cell"
        end = begun + reader.line_num
        if not problem and width > 1 and end - start > 1 and _are_rows(lines[start:end], dialect["delimiter"], width):
            problem = "a quotation mark that is not closed"
        if not problem and any(map(_LONE_SURROGATE.search, lines[start:end])):
            problem = _BAD_BYTES
        if problem:
            end = start + 1 if problem != _BAD_BYTES else end
            yield _Record(start, end, cells, problem)
            start = begun = end
            reader = csv.reader(feed(), **dialect)
            continue
        width = width or (len(cells) if len(cells) > 1 else 0)
        yield _Record(start, end, cells)
        start = end


def _are_rows(lines: Sequence[str], separator: str, width: int) -> bool:
    """Whether each line of what is quoted as one record is a whole row by itself: then the quotation mark is a stray one."""
    return all(line.count(separator) == width - 1 for line in lines)


def _num_broken(records: Sequence[_Record]) -> int:
    width = len(records[Header.place([each.cells for each in records])].cells) if records else 0
    return sum(bool(each.problem) or (any(each.cells) and len(each.cells) != width) for each in records)


def _shown(lines: Sequence[str], record: _Record) -> str:
    text = lines[record.start].strip().encode("utf-8", "replace").decode()
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
