#!/usr/bin/env python
"""Searches over models, losses, learning rates and augmentation; without arguments, on embedded synthetic garments."""

import argparse
import sys
from typing import Any

from fashionclip_tune.cli.doctor import refuse_problems
from fashionclip_tune.cli.flags import Parser, add_reading_flags, finite, user_errors
from fashionclip_tune.config.section import assignments


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data", metavar="DIR", help="folder of shards, or its URL (default: synthetic garments)")
    add(
        "--space",
        metavar="NAME|FILE",
        help="a search space of fashionclip_tune/spaces/, or a file (default: tiny; openclip on a GPU)",
    )
    add("--name", help="the sweep's folder in --results (default: the next free one)")
    add("--results", default="results", metavar="DIR", help="folder of all sweeps, or s3://... (default: %(default)s)")
    add("--num-trials", type=int, metavar="N", help="default: 16, or as many as the space has settings")
    add("--max-concurrent", type=int, metavar="N", help="trials side by side (default: a core each, or what the GPU takes)")
    add("--seed", type=int, metavar="N", help="default: 0")
    add("--budget-examples", type=int, metavar="N", help="photos that a trial trains on (default: the space's epochs)")
    add("--scheduler", help="asha, median or none (default: asha)")
    add("--grace-examples", type=int, metavar="N", help="a stage, and the first rung (default: a ninth of the budget)")
    add("--reduction-factor", type=int, metavar="N", help="one in N goes on at a rung (default: 3)")
    add("--min-trials-per-model", type=int, metavar="N", help="before the search chooses (default: 6, or half of the trials)")
    add("--warm-start", metavar="DIR", help="an older sweep's folder, or s3://...: its ended trials inform this one")
    add("--gpus-per-trial", type=finite, metavar="F", help="share of a GPU (default: by the memory that a trial needs)")
    add("--gpu-memory-gb", type=finite, metavar="G", help="of a card, at most; a dry run plans for one, here or not")
    add("--preset", metavar="NAME", help="quick, evening or night on a T4: trials and rungs that no flag gives")
    add("--time-budget", type=finite, metavar="MIN", help="of this run: ten minutes before its end all is kept; then --resume")
    add("--samples-per-second", type=finite, metavar="N", help="a trial's training rate (default: measured or estimated)")
    add("--device", help="auto, cpu or cuda (default: auto)")
    add("--set", action="append", default=[], metavar="PATH=VALUE", help="fix a setting for all trials, e.g. training.epochs=2")
    add_reading_flags(parser)
    add(
        "--sync-every",
        type=finite,
        metavar="MIN",
        help="with --scratch: what a lost machine costs at most (default: 15)",
    )
    add("--disk-budget-gb", type=finite, metavar="G", help="of the sweep's folder in --results (default: no limit)")
    add(
        "--address",
        metavar="ADDR",
        help="of a running Ray cluster, or auto (default: local, this machine alone)",
    )
    add("--refit", type=int, metavar="N", help="train the named finished sweep's winner anew with N times the examples")
    add("--dry-run", action="store_true", help="print the plan and start nothing")
    add("--resume", action="store_true", help="go on with an interrupted sweep (the latest one without --name), or start")
    return parser.parse_args()


def main() -> None:
    arguments = vars(parse())
    own = {name: arguments.pop(name) for name in ("name", "results", "dry_run", "resume", "refit")}
    with user_errors():
        from rich.console import Console

        from fashionclip_tune.tuning.planning.settings import SweepSettings
        from fashionclip_tune.tuning.sweep import sweep

        elsewhere = own["dry_run"] and arguments["gpu_memory_gb"] is not None
        if arguments["address"] in (None, "local") and not elsewhere:
            refuse_problems(own["results"], arguments["scratch"], arguments["device"])
        settings = SweepSettings(overrides=assignments(arguments.pop("set")), **arguments)
        result = sweep(settings, **own, console=Console())
    if result is not None:
        sys.exit(_status(result))
    sys.exit(0)


def _status(result: dict[str, Any]) -> int:
    """0: done, or out of time as was asked; 1: no trial has a result; 130: interrupted."""
    if "time_is_up" in result:
        return 0
    return 130 if result["state"] == "INTERRUPTED" else 0 if result["best"] else 1


if __name__ == "__main__":
    main()
