#!/usr/bin/env python
"""Ranks the trials of one or more sweeps and names the best."""

import argparse
from pathlib import Path

from fashionclip_tune.cli import user_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="RESULTS/NAME", help="folders of sweeps, running ones included")
    sweeps = parser.parse_args().sweeps
    with user_errors():
        from rich.console import Console

        from fashionclip_tune.report import comparison

        for part in comparison(sweeps):
            Console().print(part, highlight=False, soft_wrap=isinstance(part, str))


if __name__ == "__main__":
    main()
