#!/usr/bin/env python
"""Records whole learning curves of random settings of a space: a table on which any searcher can be replayed in seconds.

    python benchmarks/search_record.py --out benchmarks/search_curves_synthetic.csv
    python benchmarks/search_record.py --data DIR --set training.epochs=3 --out benchmarks/search_curves_fpi60.csv

Each setting trains alone, to the end of the budget that a sweep of this space and data would give it, and leaves a row a
stage, the untouched model first. ``device_s`` are the processor seconds of this process, which other work on the machine
does not lengthen (one thread, no loader processes). Started again, it goes on after the last whole curve.
"""

import argparse
import csv
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from fashionclip_tune.cli import assignments, user_errors
from fashionclip_tune.pretraining import pretrain_missing
from fashionclip_tune.training import train
from fashionclip_tune.tuning.plan import SweepPlan, SweepSettings, plan_sweep
from fashionclip_tune.tuning.study import draw_points

COLUMNS = ("setting", "parameters", "examples_seen", "recall_at_10", "recall_at_5", "loss", "device_s")


def record(plan: SweepPlan, number: int, parameters: dict[str, Any], settings: dict[str, Any]) -> list[list[Any]]:
    config = plan.build(settings)
    started = time.process_time()
    rows: list[list[Any]] = []

    def on_eval(row: dict[str, Any]) -> None:
        seconds = round(time.process_time() - started, 3)
        figures = [row["examples_seen"], row["recall_at_10"], row["recall_at_5"], row.get("loss"), seconds]
        rows.append([number, json.dumps(parameters), *figures])

    folder = Path(tempfile.mkdtemp(prefix="search-record-"))
    try:
        train(config, folder / "run", on_eval=on_eval)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def whole_curves(path: Path, budget: int) -> int:
    """How many settings are recorded to their end; what follows the last of them is cut off."""
    if not path.exists():
        return 0
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    ended = [int(row["setting"]) for row in rows if row["examples_seen"] == str(budget)]
    count = max(ended, default=-1) + 1
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row for row in rows if int(row["setting"]) < count)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="CSV")
    parser.add_argument("--data", metavar="DIR", help="folder of shards (default: synthetic garments)")
    parser.add_argument("--space", default="tiny")
    parser.add_argument("--settings", type=int, default=100, help="random settings (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=20261124, help="of the settings (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    arguments = parser.parse_args()
    with user_errors():
        overrides = {"hardware.threads": 1, "training.num_workers": 0, **assignments(arguments.set)}
        settings = SweepSettings(data=arguments.data, space=arguments.space, device="cpu", overrides=overrides)
        plan = plan_sweep(settings, print)
        pretrain_missing(list(plan.check.config_of_model), print)
        budget = plan.base.training.budget_examples
        assert budget is not None
        done = whole_curves(arguments.out, budget)
        for number, point in enumerate(draw_points(plan.draw, arguments.settings, arguments.seed)):
            if number < done:
                continue
            rows = record(plan, number, point.params, point.settings)
            is_new = not arguments.out.exists()
            with open(arguments.out, "a", newline="") as file:
                writer = csv.writer(file)
                writer.writerows([COLUMNS] * is_new + rows)
            print(f"setting {number}: recall_at_10 {rows[-1][3]:.4f} after {rows[-1][-1]:.0f} s: {point.params}", flush=True)


if __name__ == "__main__":
    main()
