#!/usr/bin/env python
"""Ranks the trials of one or more sweeps, names the best, and writes report.html into the first one's folder."""

from pathlib import Path

from fashionclip_tune.cli.flags import Parser, user_errors
from fashionclip_tune.progress import messages_on, progress_bar


def make_parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("sweeps", nargs="+", type=Path, metavar="RESULTS/NAME", help="folders of sweeps, running ones included")
    add("--table", choices=("markdown", "latex", "csv"), help="print the ranking in this form only, for a paper")
    add("--no-gallery", action="store_true", help="leave the winner's photos out: it takes as long as an evaluation")
    add("--allow-remote", action="store_true", help="for these photos, read https://, s3://, gs:// and pipe: (runs commands)")
    return parser


def main() -> None:
    given = make_parser().parse_args()
    with user_errors():
        if given.table:
            from fashionclip_tune.reporting.tables import ranking_text

            print(ranking_text(given.sweeps, given.table), end="")
            return
        from rich.console import Console

        from fashionclip_tune.reporting.page import write_report
        from fashionclip_tune.reporting.terminal import comparison, print_lines

        console = Console()
        for part in comparison(given.sweeps):
            if isinstance(part, str):
                print_lines(console, [part])
            else:
                console.print(part)
        with messages_on(console), progress_bar("encoding photos", console) as on_progress:
            path = write_report(
                given.sweeps, gallery=not given.no_gallery, allow_remote=given.allow_remote, on_progress=on_progress
            )
        print(f"report: {path}")


if __name__ == "__main__":
    main()
