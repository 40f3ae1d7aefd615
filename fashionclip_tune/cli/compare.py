"""``compare``: the ranking of one or more sweeps."""

import argparse
from pathlib import Path
from typing import Any

from fashionclip_tune.progress import messages_on, progress_bar


def add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="the ranking of one or more sweeps, and their report",
        description="Ranks the trials of one or more sweeps, names the best, and writes report.html into the first one's "
        "folder.",
    )
    add = parser.add_argument
    add("sweeps", nargs="+", type=Path, metavar="RESULTS/NAME", help="folders of sweeps, running ones included")
    add("--table", choices=("markdown", "latex", "csv"), help="print the ranking in this form only, for a paper")
    add("--no-gallery", action="store_true", help="leave the winner's photos out: it takes as long as an evaluation")
    add("--allow-remote", action="store_true", help="for these photos, read https://, s3://, gs:// and pipe: (runs commands)")
    parser.set_defaults(run=_compare)


def _compare(parsed: argparse.Namespace) -> None:
    if parsed.table:
        from fashionclip_tune.reporting.tables import ranking_text

        print(ranking_text(parsed.sweeps, parsed.table), end="")
        return
    from rich.console import Console

    from fashionclip_tune.reporting.page import write_report
    from fashionclip_tune.reporting.terminal import comparison, print_lines

    console = Console()
    for part in comparison(parsed.sweeps):
        if isinstance(part, str):
            print_lines(console, [part])
        else:
            console.print(part)
    with messages_on(console), progress_bar("encoding photos", console) as on_progress:
        path = write_report(
            parsed.sweeps, gallery=not parsed.no_gallery, allow_remote=parsed.allow_remote, on_progress=on_progress
        )
    print(f"report: {path}")
