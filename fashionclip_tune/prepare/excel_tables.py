"""Excel workbooks (.xlsx): the values of the first sheet that has any, through openpyxl."""

import io
from pathlib import Path
from zipfile import BadZipFile

from fashionclip_tune.errors import UserError
from fashionclip_tune.prepare.cells import BrokenRow, Header, Row, TableRows, as_text

_SHOWN = 60  # letters of a broken row


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
            lines = [[as_text(value) for value in line] for line in sheet.iter_rows(values_only=True)]
            start = next((place for place, line in enumerate(lines) if any(line)), None)
            if start is None:
                continue
            notes = [f"sheet {sheet.title!r} of {', '.join(names)}: to take another, put it first"] if len(names) > 1 else []
            return _rows(path, lines, start, notes)
    finally:
        book.close()
    raise UserError(f"table {path} has no header: its first line must name the columns")


def _rows(path: Path, lines: list[list[str]], start: int, notes: list[str]) -> TableRows:
    cells = lines[start]
    while cells and not cells[-1]:
        cells = cells[:-1]
    header = Header(cells)
    rows: list[Row] = []
    broken: list[BrokenRow] = []
    for number, line in enumerate(lines[start + 1 :], start=start + 2):
        if any(line):
            row = header.row(number, line + [""] * (len(cells) - len(line)), ", ".join(line)[:_SHOWN])
            (rows if isinstance(row, Row) else broken).append(row)  # type: ignore[arg-type]
    notes = [f"{path.name}: {note}" for note in (*notes, *header.notes)]
    return TableRows(tuple(filter(None, header.names)), rows, broken, notes)
