#!/usr/bin/env python
"""Searches over models, losses, learning rates and augmentation; without arguments, on embedded synthetic garments."""

import argparse
import sys

from fashionclip_tune.cli import Parser, add_reading_flags, assignments, user_errors


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data", metavar="DIR", help="folder of shards, or its URL (default: synthetic garments)")
    add(
        "--space",
        metavar="NAME|FILE",
        help="a search space of sweeps/spaces/, or a file (default: tiny; openclip on a GPU)",
    )
    add("--name", help="the sweep's folder in --results (default: the next free one)")
    add("--results", default="results", metavar="DIR", help="folder of all sweeps, or s3://... (default: %(default)s)")
    add("--num-trials", type=int, metavar="N", help="default: 16")
    add("--max-concurrent", type=int, metavar="N", help="trials side by side (default: a core each, or what the GPU takes)")
    add("--seed", type=int, metavar="N", help="default: 0")
    add("--budget-examples", type=int, metavar="N", help="photos that a trial trains on (default: the space's epochs)")
    add("--scheduler", help="asha, median or none (default: asha)")
    add("--grace-examples", type=int, metavar="N", help="a stage, and the first rung (default: a ninth of the budget)")
    add("--reduction-factor", type=int, metavar="N", help="one in N goes on at a rung (default: 3)")
    add("--min-trials-per-model", type=int, metavar="N", help="before the search chooses (default: 6, or half of the trials)")
    add("--warm-start", metavar="DIR", help="an older sweep's folder: its ended trials inform this one")
    add("--gpus-per-trial", type=float, metavar="F", help="share of a GPU (default: 1)")
    add("--device", help="auto, cpu or cuda (default: auto)")
    add("--set", action="append", default=[], metavar="PATH=VALUE", help="fix a setting for all trials, e.g. training.epochs=2")
    add_reading_flags(parser)
    add(
        "--sync-every",
        type=float,
        metavar="MIN",
        help="with --scratch: what a lost machine costs at most (default: 15)",
    )
    add(
        "--address",
        metavar="ADDR",
        help="of a running Ray cluster, or auto (default: this machine alone)",
    )
    add("--dry-run", action="store_true", help="print the plan and start nothing")
    add("--resume", action="store_true", help="go on with an interrupted sweep (the latest one without --name), or start")
    return parser.parse_args()


def main() -> None:
    arguments = vars(parse())
    own = {name: arguments.pop(name) for name in ("name", "results", "dry_run", "resume")}
    with user_errors():
        from rich.console import Console

        from fashionclip_tune.tuning.plan import SweepSettings
        from fashionclip_tune.tuning.sweep import sweep

        settings = SweepSettings(overrides=assignments(arguments.pop("set")), **arguments)
        result = sweep(settings, **own, console=Console())
    if result is not None:
        sys.exit(130 if result["state"] == "INTERRUPTED" else 0 if result["best"] else 1)
    sys.exit(0)


if __name__ == "__main__":
    main()
