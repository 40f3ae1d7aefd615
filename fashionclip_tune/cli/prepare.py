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
        help="CSV, Excel (.xlsx) or Parquet file, one row a photo, a caption or a product, or Fashion-Gen's HDF5 (.h5); may be "
        "given again: then train, valid or test in the names of the files is the split, where no column says it",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder of the photos; some tables hold them (HDF5, Parquet)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the shards: new, empty, or of a stopped prepare"
    )
    parser.add_argument(
        "--image-column",
        dest="image_columns",
        action="append",
        default=[],
        metavar="NAME",
        help="may be given again; a cell holds a name or an address, several separated by |, ; or commas, or a glob such as "
        "1163_*.jpg (default: guessed by its name, or by the files that its cells name)",
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
    columns = {
        "caption": "the text of a photo",
        "id": "the product: rows of one are photos of one product",
        "category": "the kind of product, for the protocol candidates_101",
        "split": "train, valid or test",
        "group": "rows of one group are kept in one split",
    }
    for purpose, what in columns.items():
        parser.add_argument(
            f"--{purpose}-column", metavar="NAME", help=f"{what} (default: guessed by its name; none: no column)"
        )
    parser.add_argument("--encoding", metavar="NAME", help="of CSV files, such as utf-8 or cp1252 (default: found by looking)")
    parser.add_argument(
        "--separator",
        metavar="NAME",
        help="of CSV files: comma, semicolon, tab, pipe or another character (default: found by looking)",
    )
    parser.add_argument(
        "--valid-share",
        type=finite,
        default=0.1,
        metavar="F",
        help="share of validation photos, where nothing says the split (default: %(default)s)",
    )
    parser.add_argument("--test-share", type=finite, default=0.1, metavar="F", help="of test photos (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the splits that are drawn (default: %(default)s)")
    parser.add_argument(
        "--size",
        type=int,
        default=288,
        metavar="N",
        help="pixels of a photo's short side, at most; none is enlarged (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="threads that encode photos (default: one for each available core)"
    )
    parser.set_defaults(run=_prepare)


def _prepare(parsed: argparse.Namespace) -> None:
    from fashionclip_tune.prepare import prepare
    from fashionclip_tune.prepare.options import PrepareOptions
    from fashionclip_tune.prepare.tables.csv_reader import SEPARATORS

    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(parsed).items() if name != "run"
    }
    given["separator"] = SEPARATORS.get(parsed.separator, parsed.separator)
    try:
        with progress_bar("preparing photos") as on_progress:
            report = prepare(PrepareOptions(**given), on_progress=on_progress, on_note=print)
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on", file=sys.stderr)
        sys.exit(130)
    print(report)
