"""Excel workbooks (.xlsx): the values of the first sheet that has any, through openpyxl."""

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from fashionclip_tune.errors import UserError
from fashionclip_tune.prepare.tables.cells import SHOWN, Header, TableRows, as_text


def read_excel(path: Path) -> TableRows:
    """Formulas count by the value that was saved with them.

    Raises:
        UserError: the file is no workbook, or no sheet has a header.
    """
    import openpyxl
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        # As bytes: openpyxl refuses a workbook whose name says nothing.
        book = openpyxl.load_workbook(io.BytesIO(path.read_bytes()), read_only=True, data_only=True)
    except (InvalidFileException, BadZipFile, OSError, KeyError, ValueError) as error:
        raise UserError(f"table {path} is not an Excel file (.xlsx) that can be read ({error})") from error
    try:
        names = [sheet.title for sheet in book.worksheets]
        for sheet in book.worksheets:
            lines = [[_text(cell) for cell in line] for line in sheet.iter_rows()]
            start = Header.place(lines)
            if not any(map(any, lines[start + 1 :])):
                continue
            others = ", ".join(name for name in names if name != sheet.title)
            notes = [f"read is sheet {sheet.title!r}, and not {others}; to read another, put it first"] if others else []
            if any(map(any, lines[:start])):
                notes.append(f"its header is row {start + 1}; what stands above is left out")
            found = _rows(path, lines, start, notes)
            return replace(found, notes=[*found.notes, *_unsaved(path, sheet.title, found)])
    finally:
        book.close()
    raise UserError(f"table {path} has no sheet with a header and rows; its sheets are {', '.join(names)}")


def _unsaved(path: Path, sheet: str, found: TableRows) -> list[str]:
    """What is to be said of formulas that a program wrote: they have no value before Excel has computed it."""
    import openpyxl

    if all(any(row.values[name] for row in found.rows) for name in found.columns):
        return []
    book = openpyxl.load_workbook(io.BytesIO(path.read_bytes()), read_only=True)
    formula = next((cell for line in book[sheet].iter_rows() for cell in line if cell.data_type == "f"), None)
    book.close()
    if formula is None:
        return []
    cure = "open the file in Excel or LibreOffice and save it"
    return [f"{path.name}: cell {formula.coordinate} is a formula; if its value was not saved, {cure}"]


def _text(cell: Any) -> str:
    """A number that is shown with leading zeros has them."""
    if isinstance(cell.value, int) and re.fullmatch("0+", cell.number_format):
        return str(cell.value).zfill(len(cell.number_format))
    return as_text(cell.value)


def _rows(path: Path, lines: list[list[str]], start: int, notes: list[str]) -> TableRows:
    cells = lines[start]
    while cells and not cells[-1]:
        cells = cells[:-1]
    header = Header(cells)
    filled = [(number, line + [""] * (len(cells) - len(line))) for number, line in enumerate(lines, start=1)][start + 1 :]
    rows, broken = header.sorted_out((number, line, ", ".join(line)[:SHOWN]) for number, line in filled if any(line))
    notes = [f"{path.name}: {note}" for note in (*notes, *header.notes)]
    return TableRows(tuple(filter(None, header.names)), rows, broken, notes)
