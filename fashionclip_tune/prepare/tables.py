"""A shop's tables of items, read as text: CSV, Parquet, and HDF5 as Fashion-Gen has it. Photos are not read here.

Fashion-Gen's ``.h5`` files hold ``input_image`` [n, height, width, 3] uint8, and byte strings (latin-1) of shape [n, 1]
such as ``input_description``. Every data set of one value a row is a column, under its own name.
"""

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fashionclip_tune.errors import UserError
from fashionclip_tune.prepare.splits import SPLIT_WORDS

IMAGES_DATASET = "input_image"
_HDF5_SUFFIXES = (".h5", ".hdf5")
_PARQUET_SUFFIXES = (".parquet", ".pq")
_ROWS_READ_AT_ONCE = 4_096


@dataclass(frozen=True)
class Record:
    """One row: where it stands (the header of a CSV file is row 1; elsewhere rows count from 0) and its values by column."""

    table: Path
    number: int
    values: dict[str, str]


@dataclass(frozen=True)
class Tables:
    """The rows of all files given, in their order."""

    paths: tuple[Path, ...]
    columns: tuple[str, ...]
    records: tuple[Record, ...]
    photos_inside: bool  # HDF5: the photo of a record is row ``number`` of ``input_image``


def read_tables(paths: Sequence[Path]) -> Tables:
    """Reads all tables; a column that one of several files lacks is empty there.

    Raises:
        UserError: a file is missing or is not what its name says, or the files do not go together.
    """
    for path in paths:
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "does not exist"
            raise UserError(f"table {path} {problem}: give a CSV, Parquet or HDF5 (.h5) file with --table")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("--table names the same file twice")
    inside = {path.suffix.lower() in _HDF5_SUFFIXES for path in paths}
    if len(inside) > 1:
        raise UserError("--table: HDF5 files bring their photos, other tables do not: prepare them apart")
    columns: dict[str, None] = {}  # ordered
    found: list[tuple[Path, list[tuple[int, dict[str, str]]]]] = []
    for path in paths:
        names, rows = _reader(path)(path)
        if not rows:
            raise UserError(f"table {path} has a header but no rows")
        columns |= dict.fromkeys(names)
        found.append((path, rows))
    empty = dict.fromkeys(columns, "")
    records = tuple(Record(path, number, empty | values) for path, rows in found for number, values in rows)
    return Tables(tuple(paths), tuple(columns), records, inside == {True})


def _reader(path: Path) -> Callable[[Path], tuple[list[str], list[tuple[int, dict[str, str]]]]]:
    if path.suffix.lower() in _HDF5_SUFFIXES:
        return _read_hdf5
    return _read_parquet if path.suffix.lower() in _PARQUET_SUFFIXES else _read_csv


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


def _read_csv(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header, *lines = list(csv.reader(file)) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"table {path} is not a CSV file in UTF-8 ({error}): export it as such") from error
    names = [name.strip() for name in header]
    if not any(names):
        raise UserError(f"table {path} has no header: its first line must name the columns")
    cells = ((number, [cell.strip() for cell in line]) for number, line in enumerate(lines, start=2))
    return names, [(number, dict(zip(names, line, strict=False))) for number, line in cells if any(line)]


def _read_parquet(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    import pyarrow
    import pyarrow.parquet

    rows: list[tuple[int, dict[str, str]]] = []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # Structs hold no text: the photos of a Hugging Face data set, for instance.
            names = [column.name for column in file.schema_arrow if not pyarrow.types.is_nested(column.type)]
            names += [column.name for column in file.schema_arrow if pyarrow.types.is_list(column.type)]
            for batch in file.iter_batches(_ROWS_READ_AT_ONCE, columns=names):
                for values in batch.to_pylist():
                    rows.append((len(rows), {name: as_text(value) for name, value in values.items()}))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"table {path} is not a Parquet file that can be read ({error})") from error
    return [name for name in file.schema_arrow.names if name in names], rows


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
    if isinstance(value, list):
        return "|".join(filter(None, map(as_text, value)))
    return str(value).strip()


def _read_hdf5(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            images = file.get(IMAGES_DATASET)
            if (
                not isinstance(images, h5py.Dataset)
                or len(images.shape) != 4
                or images.shape[3] != 3
                or images.dtype != "uint8"
            ):
                raise UserError(
                    f"table {path} has no data set {IMAGES_DATASET} of shape [n, height, width, 3] and type uint8, as "
                    f"Fashion-Gen's files have; it has {', '.join(file) or 'nothing'}"
                )
            shapes = ((len(images),), (len(images), 1))  # of one value a row
            texts = {
                name: [as_text(value) for value in data[()].reshape(-1).tolist()]
                for name, data in file.items()
                if isinstance(data, h5py.Dataset) and data.shape in shapes and data.dtype.kind in "SOiuf"
            }
            rows = list(enumerate(dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)))
    except OSError as error:
        raise UserError(f"table {path} is not an HDF5 file that can be read ({error})") from error
    return list(texts), rows


def rows_read_together(path: Path) -> int:
    """How many photos of an HDF5 file are decompressed together, at least: the length of its chunks."""
    import h5py

    with h5py.File(path, "r") as file:
        chunks: tuple[int, ...] | None = file[IMAGES_DATASET].chunks
    return chunks[0] if chunks else 1
