#!/usr/bin/env python
"""Prints what the plans of finished sweeps had said beside what came, from their files alone.

    python -m benchmarks plan_beside_fact results/sweep-001 ...

A sweep that was interrupted has counted its time in each of its lives, Ray's start included.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from fashionclip_tune.reporting.sweep_files import read_sweep


def compared(sweep: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Figures as name, planned, found; the rates are medians over the last stages of a model's trials."""
    plan, rows = sweep["plan"], sweep["trials"]
    if plan["hours"] is not None:
        yield "minutes", 60 * plan["hours"], sweep["elapsed_s"] / 60
    yield "examples", plan["examples"], sum(row["examples_seen"] for row in rows)
    yield "trials to budget", plan["trials_to_budget"], sum(row["stop_reason"] == "budget" for row in rows)
    for model, rate in plan["samples_per_second"].items():
        rates = [row["samples_per_second"] for row in rows if row["config"].get("clip_model") == model]
        if known := [rate for rate in rates if rate is not None]:
            yield f"samples/s, {model}", rate, median(known)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", type=Path, nargs="+", help="folders with a sweep.json")
    print("| sweep | figure | planned | found | difference |\n|---|---|---|---|---|")
    for folder in parser.parse_args(arguments).sweeps:
        sweep = read_sweep(folder)
        if sweep["state"] != "FINISHED" or not sweep.get("plan"):
            print(f"| {folder.name} | not finished, or without a plan | | | |")
            continue
        for name, planned, found in compared(sweep):
            difference = f"{found / planned - 1:+.0%}" if planned else ""
            print(f"| {folder.name} | {name} | {planned:,.1f} | {found:,.1f} | {difference} |")


if __name__ == "__main__":
    main()
