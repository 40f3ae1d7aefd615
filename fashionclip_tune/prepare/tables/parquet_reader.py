"""Parquet tables: nested columns by ``a.b``, lists of every kind, and photos that the file holds itself.

A column of photos holds their encoded bytes, alone or as the field ``bytes`` of a struct, which is how Hugging Face's data
sets have them.
"""

import io
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from fashionclip_tune.errors import UserError
from fashionclip_tune.prepare.tables.cells import Row, TableRows, as_text

if TYPE_CHECKING:
    import pyarrow

_ROWS_READ_AT_ONCE = 4_096
_LOOKED_AT = 20  # photos of a column of bytes, before it counts as one of photos


def read_parquet(path: Path) -> TableRows:
    """Reads all columns but those of photos, which are named only.

    Raises:
        UserError: the file is no Parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    rows: list[Row] = []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            inside = {name: place for name, place in _byte_columns(schema) if _holds_photos(file, place)}
            paths = [path for field in schema for path in _leaves(field) if ".".join(path) not in inside.values()]
            columns = sorted({".".join(path) if path[0] in inside else path[0] for path in paths})
            for batch in file.iter_batches(_ROWS_READ_AT_ONCE, columns=columns) if columns else ():
                for record in batch.to_pylist():
                    found = {".".join(path): _at(record, path) for path in paths}
                    lists = {name: tuple(map(as_text, value)) for name, value in found.items() if isinstance(value, list)}
                    rows.append(Row(len(rows), {name: as_text(value) for name, value in found.items()}, lists))
            if not columns:
                rows = [Row(number, {}) for number in range(file.metadata.num_rows)]
            longest = max((file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)), default=1)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"table {path} is not a Parquet file that can be read ({error})") from error
    return TableRows(
        tuple(".".join(path) for path in paths), rows, photo_columns=tuple(inside), photos_of_block=longest if inside else 1
    )


def _is_list(kind: "pyarrow.DataType") -> bool:
    import pyarrow

    checks = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    return any(check(kind) for name in checks if (check := getattr(pyarrow.types, name, None)) is not None)


def _leaves(field: "pyarrow.Field", above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The columns of a field: itself, or what its structs hold, also where they are in lists."""
    import pyarrow

    kind, path = field.type, (*above, field.name)
    while _is_list(kind):
        kind = kind.value_type
    if pyarrow.types.is_struct(kind):
        for place in range(kind.num_fields):
            yield from _leaves(kind.field(place), path)
    elif not pyarrow.types.is_map(kind):
        yield path


def _at(value: Any, path: Sequence[str]) -> Any:
    if not path or value is None:
        return value
    if isinstance(value, list):
        found = [_at(each, path) for each in value]
        return [part for each in found for part in (each if isinstance(each, list) else [each])]
    return _at(value[path[0]], path[1:])


def _byte_columns(schema: "pyarrow.Schema") -> Iterator[tuple[str, str]]:
    """Columns that may hold photos: their names, and where the bytes are."""
    import pyarrow

    for field in schema:
        kinds = [(field.name, field.type)]
        if pyarrow.types.is_struct(field.type):
            kinds = [(f"{field.name}.bytes", part.type) for part in field.type if part.name == "bytes"]
        for place, kind in kinds:
            if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
                yield field.name, place


def _holds_photos(file: Any, place: str) -> bool:
    for batch in file.iter_batches(_LOOKED_AT, columns=[place]):
        for value in _bytes_in(batch.column(0)):
            if value:
                return _is_photo(value)
    return False


def _bytes_in(column: Any) -> list[bytes | None]:
    values = column.to_pylist()
    return [value["bytes"] if isinstance(value, dict) else value for value in values]


def _is_photo(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)):
            return True
    except Exception:  # Pillow raises nearly anything
        return False


def photos_in(path: Path, column: str, rows: Sequence[int]) -> list[bytes | None]:
    """The encoded photos of rows in ascending order; None where there is none.

    Raises:
        OSError: the file cannot be read there.
    """
    found: list[bytes | None] = []
    place, groups = _layout(path, column, path.stat().st_mtime_ns)
    for group, (start, end) in enumerate(groups):
        wanted = [row - start for row in rows if start <= row < end]
        if wanted:
            found += _photos_of_group(path, place, group, wanted)
    return found


def _photos_of_group(path: Path, place: str, group: int, rows: Sequence[int]) -> list[bytes | None]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            column = file.read_row_group(group, columns=[place]).column(0)
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error
    return _bytes_in(column.take(rows))


@lru_cache(maxsize=64)
def _layout(path: Path, column: str, changed_ns: int) -> tuple[str, list[tuple[int, int]]]:
    """Where the bytes of a column are, and the first and last rows of the groups."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        place = dict(_byte_columns(file.schema_arrow))[column]
        lengths = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    return place, list(pairwise(accumulate(lengths, initial=0)))
