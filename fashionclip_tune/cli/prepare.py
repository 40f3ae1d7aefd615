"""``prepare``: tables and photos to shards."""

import argparse
import sys
from pathlib import Path
from typing import Any

from fashionclip_tune.cli.flags import finite
from fashionclip_tune.progress import progress_bar


def add_prepare(commands: Any) -> None:
    parser = commands.add_parser(
        "prepare",
        help="tables and photos to shards",
        description="Tables and photos to shards, with a report on the data. Stopped and started again, it goes on.",
    )
    parser.add_argument(
        "--table",
        dest="tables",
        metavar="FILE",
        type=Path,
        action="append",
        required=True,
        help="CSV or Parquet file, one row a photo or a product, or Fashion-Gen's HDF5 (.h5); may be given again: then "
        "train, valid or test in the names of the files is the split, where no column says it",
    )
    parser.add_argument("--images", type=Path, help="folder of the photos (an .h5 file holds them)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards: new, empty, or of a stopped prepare")
    parser.add_argument(
        "--image-column",
        dest="image_columns",
        action="append",
        default=[],
        metavar="NAME",
        help="may be given again; a cell holds a name, several separated by | or ;, or a glob such as 1163_*.jpg "
        "(default: guessed by its name)",
    )
    parser.add_argument(
        "--caption",
        dest="captions",
        action="append",
        default=[],
        metavar="TEMPLATE",
        help="such as '{title}. {colour} {category}', instead of --caption-column; given several times, the first is "
        "the original caption and the others are further ones, in _aug shards",
    )
    for purpose in ("caption", "id", "category", "split", "group"):
        parser.add_argument(f"--{purpose}-column", metavar="NAME", help="default: guessed by its name")
    parser.add_argument("--valid-share", type=finite, default=0.1, help="where nothing says the split (default: %(default)s)")
    parser.add_argument("--test-share", type=finite, default=0.1, help="likewise (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--size", type=int, default=288, help="pixels of a photo's short side; smaller ones stay (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, help="processes that encode photos (default: one for each available core)")
    parser.set_defaults(run=_prepare)


def _prepare(parsed: argparse.Namespace) -> None:
    from fashionclip_tune.prepare import prepare
    from fashionclip_tune.prepare.options import PrepareOptions

    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(parsed).items() if name != "run"
    }
    try:
        with progress_bar("preparing photos") as on_progress:
            report = prepare(PrepareOptions(**given), on_progress=on_progress, on_note=print)
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on", file=sys.stderr)
        sys.exit(130)
    print(report)
