"""The options of ``prepare``, and what is wrong with them before any row is looked at."""

from dataclasses import dataclass
from pathlib import Path

from fashionclip_tune.errors import UserError
from fashionclip_tune.prepare.photos import SHORT_SIDE
from fashionclip_tune.prepare.tables.tables import Tables

_SIZES = (16, 4_096)


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Where the items are and where the shards go. A column that is not given is guessed by its name.

    Without a split column, splits are drawn with these shares; rows of one product, group or caption stay together.
    """

    tables: tuple[Path, ...]
    """Several files: each file's name says its split (train, valid, val, validation, dev, test), or none does."""
    images: Path | None = None
    """The folder of photos; None for tables that hold them."""
    out: Path
    image_columns: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    """Templates such as ``{title}. {colour}``: the original caption, then any number of further ones (``_aug`` shards)."""
    caption_column: str | None = None
    id_column: str | None = None
    category_column: str | None = None
    split_column: str | None = None
    group_column: str | None = None
    valid_share: float = 0.1
    test_share: float = 0.1
    seed: int = 0
    size: int = SHORT_SIDE
    """Pixels of a photo's short side, at most."""
    encoding: str | None = None
    """Of CSV files, by a name that Python knows; None: found by looking at them."""
    separator: str | None = None
    """Of CSV files, one character; None: found by looking at them."""
    workers: int | None = None
    """Threads that encode photos; None: one for each core that this process may use."""


def check_options(options: PrepareOptions) -> None:
    valid, test = options.valid_share, options.test_share
    if not (valid > 0 and test >= 0 and valid + test < 1):
        raise UserError(
            f"--valid-share {valid} and --test-share {test} do not fit: valid must be above 0, test at least 0, "
            "and their sum below 1, since train gets the rest"
        )
    if not _SIZES[0] <= options.size <= _SIZES[1]:
        raise UserError(f"--size {options.size}: allowed are {_SIZES[0]} to {_SIZES[1]} pixels of a photo's short side")
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers {options.workers}: at least 1 is needed")
    if options.separator is not None and len(options.separator) != 1:
        raise UserError(f"--separator {options.separator!r}: give one character, or comma, semicolon, tab or pipe")
    if options.captions and options.caption_column is not None:
        raise UserError("--caption and --caption-column exclude each other: put the column into the template as {name}")


def check_images(options: PrepareOptions, tables: Tables) -> bool:
    """Whether the photos are in the tables themselves, rather than in a folder, which must be there."""
    if tables.is_hdf5 and (options.images is not None or options.image_columns):
        raise UserError("an HDF5 table holds its photos: leave out --images and --image-column")
    if tables.photo_columns and set(options.image_columns) <= set(tables.photo_columns):
        return True
    if options.images is None:
        raise UserError(f"--images is missing: give the folder that holds the photos of {options.tables[0]}")
    if not options.images.is_dir():
        raise UserError(f"--images {options.images} is not a folder: give the folder that holds the table's images")
    if not any(options.images.iterdir()):
        raise UserError(f"--images {options.images} is empty: give the folder that holds the table's images")
    return False
