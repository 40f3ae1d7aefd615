"""A shop's tables of items, read as text: CSV, Excel, Parquet, and HDF5 as Fashion-Gen has it. Photos are not read here."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fashionclip_tune.errors import UserError
from fashionclip_tune.prepare.splits import SPLIT_WORDS
from fashionclip_tune.prepare.tables.cells import BrokenRow, TableRows
from fashionclip_tune.prepare.tables.csv_reader import read_csv
from fashionclip_tune.prepare.tables.excel_reader import read_excel
from fashionclip_tune.prepare.tables.hdf5_reader import read_hdf5
from fashionclip_tune.prepare.tables.parquet_reader import read_parquet

_KINDS = {".h5": "HDF5", ".hdf5": "HDF5", ".parquet": "Parquet", ".pq": "Parquet", ".xlsx": "Excel", ".xlsm": "Excel"}
_READERS = {"HDF5": read_hdf5, "Parquet": read_parquet, "Excel": read_excel}
_OTHER_KINDS = {
    ".xls": "an Excel file of before 2007: save as .xlsx",
    ".ods": "an OpenDocument file: save as .xlsx or .csv",
    ".json": "JSON: export it as CSV or Parquet",
    ".jsonl": "JSON: export it as CSV or Parquet",
    ".xml": "XML: export it as CSV",
    ".feather": "a Feather file: save as Parquet",
    ".zip": "an archive: unpack it",
    ".gz": "compressed: unpack it",
}


@dataclass(frozen=True)
class Record:
    """One row: where it stands (the header of a CSV file is row 1; elsewhere rows count from 0) and its values by column."""

    table: Path
    number: int
    values: dict[str, str]
    lists: Mapping[str, tuple[str, ...]]
    """Of columns that hold lists: their parts, which ``values`` has joined by ``|``."""


@dataclass(frozen=True)
class Tables:
    """The rows of all files given, in their order."""

    paths: tuple[Path, ...]
    columns: tuple[str, ...]
    records: tuple[Record, ...]
    broken: tuple[tuple[Path, BrokenRow], ...]
    notes: tuple[str, ...]
    photo_columns: tuple[str, ...]
    """Columns that hold the photos themselves."""
    photos_of_block: int
    """Rows whose photos are read together, at most of all files."""
    is_hdf5: bool

    def values(self, column: str) -> list[str]:
        return [record.values[column] for record in self.records]


def read_tables(paths: Sequence[Path], *, encoding: str | None = None, separator: str | None = None) -> Tables:
    """Reads all tables; a column that one of several files lacks is empty there.

    Args:
        encoding: of CSV files; None: found by looking at them.
        separator: the same, one character.

    Raises:
        UserError: a file is missing or is not what its name says, or the files do not go together.
    """
    for path in paths:
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "does not exist"
            raise UserError(f"table {path} {problem}: give a CSV, Excel (.xlsx), Parquet or HDF5 (.h5) file with --table")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("--table names the same file twice")
    inside = {_kind(path) == "HDF5" for path in paths}
    if len(inside) > 1:
        raise UserError("--table: HDF5 files bring their photos, other tables do not: prepare them apart")
    found: dict[Path, TableRows] = {}
    for path in paths:
        reader = _READERS.get(_kind(path))
        found[path] = reader(path) if reader else read_csv(path, encoding=encoding, separator=separator)
        if not found[path].rows and not found[path].broken:
            raise UserError(f"table {path} has a header but no rows")
    columns = tuple(dict.fromkeys(name for table in found.values() for name in table.columns))
    empty = dict.fromkeys(columns, "")
    photo_columns = {table.photo_columns for table in found.values()}
    if len(photo_columns) > 1:
        raise UserError("--table: some of the files bring photos in a column and others do not: prepare them apart")
    return Tables(
        paths=tuple(paths),
        columns=columns,
        records=tuple(Record(p, row.number, empty | row.values, row.lists) for p, table in found.items() for row in table.rows),
        broken=tuple((path, row) for path, table in found.items() for row in table.broken),
        notes=tuple(note for table in found.values() for note in table.notes),
        photo_columns=photo_columns.pop(),
        photos_of_block=max(table.photos_of_block for table in found.values()),
        is_hdf5=inside == {True},
    )


def refuse_if_mostly_broken(tables: Tables) -> None:
    """Guesses of columns would be misled.

    Raises:
        UserError: more rows do not fit the header than do.
    """
    if len(tables.broken) > len(tables.records):
        path, row = tables.broken[0]
        cure = "A separator within a cell wants quotation marks around it"
        if "quotation" in row.reason:
            cure = 'A quotation mark within a cell is written twice, and the cell stands in others: "a ""small"" bag"'
        raise UserError(
            f"{len(tables.broken):,} of {len(tables.broken) + len(tables.records):,} rows of {path} do not fit its header, "
            f"such as row {row.number}, which has {row.reason}: {row.text!r}. Is the header the first row? Is the separator "
            f"right (--separator)? {cure}"
        )


def _kind(path: Path) -> str:
    """By the name, and where that says nothing by the first bytes.

    Raises:
        UserError: it is of a kind that is not read.
    """
    suffix = path.suffix.lower()
    if suffix in _KINDS:
        return _KINDS[suffix]
    if suffix in _OTHER_KINDS:
        raise UserError(f"table {path} is {_OTHER_KINDS[suffix]}")
    with open(path, "rb") as file:
        head = file.read(8)
    if head.startswith(b"PAR1"):
        return "Parquet"
    if head.startswith(b"\x89HDF"):
        return "HDF5"
    if head.startswith(b"PK\x03\x04"):
        return "Excel"
    if head.startswith(b"\xd0\xcf\x11\xe0"):
        raise UserError(f"table {path} is {_OTHER_KINDS['.xls']}")
    return "CSV"


def splits_by_file(paths: Sequence[Path]) -> dict[Path, str]:
    """The split that the name of each of several files says by its first such word: ``fashiongen_256_256_train.h5``; else {}.

    Raises:
        UserError: some names say it and others do not.
    """
    if len(paths) == 1:
        return {}
    words = {path: [word for word in re.split(r"[^a-z]+", path.stem.lower()) if word in SPLIT_WORDS] for path in paths}
    splits = {path: SPLIT_WORDS[found[0]] for path, found in words.items() if found}
    if splits and (unclear := [path.name for path in paths if path not in splits]):
        raise UserError(
            f"--table: the names of some files say their split and that of {unclear[0]} does not: have one of "
            f"{', '.join(SPLIT_WORDS)} in each name or in none, or a split column in each file"
        )
    return splits
