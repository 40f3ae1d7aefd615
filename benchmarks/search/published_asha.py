#!/usr/bin/env python
"""Which of the five published Fashion-Gen runs would ASHA have stopped, and was it right?

    python -m benchmarks published_asha FOLDER

FOLDER holds ``seed_curves_original.csv`` and ``seed_curves_augmented.csv`` (step, model, loss_function, recall@10_mean, ...);
they are not part of this project. The runs were evaluated every 500 steps of 64 photos: a rung is judged by the first
evaluation at or after it. ASHA goes by the order in which trials arrive, so all orders are tried, one trial after the other.
A stop is right where a run that went on to the end was better there: both at their last common step, by recall@10_mean.
"""

import argparse
import csv
import itertools
from pathlib import Path

from fashionclip_tune.tuning.schedulers import survives_asha

BATCH_SIZE = 64
REDUCTION_FACTOR = 3
RUNGS = {"quick": (16_000, 48_000, 144_000), "one epoch": (29_000, 87_000, 260_000)}
FILES = {"seed_curves_original.csv": "", "seed_curves_augmented.csv": ", 3 captions"}

Curves = dict[str, dict[int, float]]


def read_curves(folder: Path) -> tuple[Curves, dict[str, str]]:
    """Recall@10 by examples seen of each run, and its architecture."""
    curves: Curves = {}
    model_of = {}
    for name, suffix in FILES.items():
        with open(folder / name, newline="") as file:
            for row in csv.DictReader(file):
                run = f"{row['model']} ({row['loss_function'].lower()}{suffix})"
                curves.setdefault(run, {})[int(row["step"]) * BATCH_SIZE] = float(row["recall@10_mean"])
                model_of[run] = row["model"]
    return curves, model_of


def replay(order: tuple[str, ...], rungs: list[int], curves: Curves, model_of: dict[str, str], shared: bool) -> dict[str, int]:
    """The rung (from 1) at which each stopped run was stopped, runs arriving one after the other."""
    reached: dict[tuple[str, int], list[float]] = {}
    stopped = {}
    for run in order:
        for number, rung in enumerate(rungs, start=1):
            value = curves[run][rung]
            earlier = reached.setdefault(("" if shared else model_of[run], rung), [])
            goes_on = survives_asha(value, earlier, REDUCTION_FACTOR)
            earlier.append(value)
            if not goes_on:
                stopped[run] = number
                break
    return stopped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if not all((folder / name).is_file() for name in FILES):
        print(f"skipped: {' and '.join(FILES)} are not in {folder}")
        return
    curves, model_of = read_curves(folder)
    end = min(max(curve) for curve in curves.values())
    orders = list(itertools.permutations(curves))
    for name, wanted in RUNGS.items():
        rungs = [min(seen for seen in next(iter(curves.values())) if seen >= rung) for rung in wanted]
        for shared in (False, True):
            stops = [replay(order, rungs, curves, model_of, shared) for order in orders]
            kind = "shared rungs" if shared else "rungs per architecture"
            print(f"\n{name}, {kind}, judged at {', '.join(f'{rung:,}' for rung in rungs)} examples")
            print(
                f"| run | at rung 1 | after {end:,} | stopped in | there, at rung 2, 3 | wrongly |\n|---|---|---|---|---|---|"
            )
            for run, curve in sorted(curves.items(), key=lambda item: -item[1][end]):
                at = [sum(stop.get(run) == number for stop in stops) for number in (1, 2, 3)]
                wrongly = sum(
                    run in stop and all(curves[other][end] <= curve[end] for other in curves if other not in stop)
                    for stop in stops
                )
                share = [f"{count / len(orders):.0%}" for count in (sum(at), *at, wrongly)]
                print(
                    f"| {run} | {curve[rungs[0]]:.4f} | {curve[end]:.4f} | {share[0]} | {', '.join(share[1:4])} | {share[4]} |"
                )
            spent = [
                sum(rungs[stop[run] - 1] if run in stop else end for run in curves) / (len(curves) * end) for stop in stops
            ]
            kept = [max(curve[end] for run, curve in curves.items() if run not in stop) for stop in stops]
            best = max(curve[end] for curve in curves.values())
            print(
                f"examples spent: {sum(spent) / len(spent):.0%}; best kept in {sum(k == best for k in kept) / len(kept):.0%}"
                f" of orders; best of those kept, worst order: {min(kept):.4f} of {best:.4f}"
            )


if __name__ == "__main__":
    main()
