#!/usr/bin/env python
"""Records whole learning curves of random settings of a space: a table on which any searcher can be replayed in seconds.

    python -m benchmarks search_record --out benchmarks/search/search_curves_synthetic.csv
    python -m benchmarks search_record --data DIR --out benchmarks/search/search_curves_fpi60.csv
    SEARCH_START=DIR python -m benchmarks search_record --data DIR --space benchmarks/search/start_space.py --budget 2304 \\
        --settings 40 --out benchmarks/search/search_curves_start.csv

Each setting trains alone, to the end of the budget that a sweep of this space and data would give it, and leaves a row
of lists, a value a stage, the zero-shot model first. ``device_s`` are the processor seconds of this process, which other
work on the machine does not lengthen (one thread, no loader processes). Started again, it goes on after the last curve.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.search.search_table import append_curve, num_curves
from fashionclip_tune.cli.flags import user_errors
from fashionclip_tune.config.section import assignments
from fashionclip_tune.training.pretraining import pretrain_missing
from fashionclip_tune.training.train import train
from fashionclip_tune.tuning.planning.plan import SweepPlan, plan_sweep
from fashionclip_tune.tuning.planning.settings import SweepSettings
from fashionclip_tune.tuning.study.draws import draw_points


def record(plan: SweepPlan, settings: dict[str, Any]) -> list[dict[str, Any]]:
    config = plan.build(settings)
    started = time.process_time()
    rows: list[dict[str, Any]] = []

    def on_eval(row: dict[str, Any]) -> None:
        figures = {name: row.get(name) for name in ("examples_seen", "recall_at_10", "recall_at_5", "loss")}
        rows.append({**figures, "device_s": time.process_time() - started})

    folder = Path(tempfile.mkdtemp(prefix="search-record-"))
    try:
        train(config, folder / "run", on_eval=on_eval)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="CSV")
    parser.add_argument("--data", metavar="DIR", help="folder of shards (default: synthetic garments)")
    parser.add_argument("--space", default="tiny")
    parser.add_argument("--settings", type=int, default=100, help="random settings (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=20261124, help="of the settings (default: %(default)s)")
    parser.add_argument("--budget", type=int, metavar="N", help="photos that each trains on (default: the space's epochs)")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    arguments = parser.parse_args()
    with user_errors():
        overrides = {"hardware.threads": 1, "training.num_workers": 0, **assignments(arguments.set)}
        given = {"data": arguments.data, "space": arguments.space, "budget_examples": arguments.budget}
        settings = SweepSettings(**given, device="cpu", overrides=overrides)
        plan = plan_sweep(settings)
        pretrain_missing(list(plan.check.config_of_model))
        done = num_curves(arguments.out)
        for number, point in enumerate(draw_points(plan.draw, arguments.settings, arguments.seed)):
            if number < done:
                continue
            rows = record(plan, point.settings)
            append_curve(arguments.out, number, point.params, rows)
            last = rows[-1]
            said = f"recall_at_10 {last['recall_at_10']:.4f} after {last['device_s']:.0f} s"
            print(f"setting {number}: {said}: {point.params}", flush=True)


if __name__ == "__main__":
    main()
