#!/usr/bin/env python
"""How soon a search finds what is worth finding: whole sweeps replayed over learning curves, beside Ray's stock parts.

    pip install -e '.[benchmarks]'
    python -m benchmarks search --seeds 6
    python -m benchmarks search --record search.jsonl --plot results/search.svg

Worlds are the two recorded tables under three families of surrogates (table_worlds.py), random families of crossing curves
and the five published runs with other rates (worlds.py; where their curves are beside the repository). How a sweep is replayed
and what counts: replay.py. The level is what 32 random trials without stopping end at. ``--record`` keeps what is done: started
again, the command goes on after it.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.search.replay import PausingSearch, Search, StockSearch, random_level, replay
from benchmarks.search.search_plot import plot
from benchmarks.search.table_worlds import SURROGATES, TABLES, table_world
from benchmarks.search.worlds import FAMILIES, PUBLISHED, World, family, published, published_as_run, published_runs

RANDOM_TRIALS = 32
COMPARED = (4, 8, 16)  # whole trials' device time
STOCK, STOCK_POINTS, OURS, BLIND = "stock", "stock, points", "this search", "this search, blind"
ARMS: dict[str, Callable[[World, int], Search]] = {
    "random": lambda world, seed: StockSearch(world, seed, is_random=True, is_stopping=False),
    "random + ASHA": lambda world, seed: StockSearch(world, seed, is_random=True),
    STOCK: StockSearch,
    STOCK_POINTS: lambda world, seed: StockSearch(world, seed, world.points),
    OURS: lambda world, seed: PausingSearch(world, seed, world.points),
    BLIND: PausingSearch,
}


def worlds(folder: Path) -> dict[str, Callable[[int], World]]:
    """By name, each made for a seed; ``folder`` has the published curves, or not."""
    made: dict[str, Callable[[int], World]] = {}
    for surrogate, table in itertools.product(SURROGATES, TABLES):
        made[f"{table}, {surrogate}"] = partial(table_world, table, surrogate)
    if published_runs(folder):
        made["published runs"] = partial(published, folder)
    return made | {f"family: {kind}": partial(family, kind) for kind in FAMILIES}


@lru_cache(maxsize=16)
def _world(folder: Path, name: str, seed: int) -> tuple[World, float]:
    """And what ``RANDOM_TRIALS`` random trials end at in it."""
    world = worlds(folder)[name](seed)
    return world, random_level(world, RANDOM_TRIALS)


Job = tuple[str, str, int]


def grid(num_trials: int) -> np.ndarray:
    """Quarters of whole trials' device time, from 0.25 on."""
    return np.arange(1, 4 * num_trials + 1) / 4


def run(folder: Path, num_trials: int, job: Job) -> dict[str, Any]:
    """One sweep: the winner's true value on the grid, against the level of its world."""
    name, arm, seed = job
    world, level = _world(folder, name, seed)
    search = ARMS[arm](world, seed)
    found = replay(world, search, seed, horizon=num_trials)
    index = np.searchsorted(found.spent, grid(num_trials), side="right") - 1
    true = np.where(index >= 0, found.true[index], 0.0)
    seconds = search.seconds if isinstance(search, PausingSearch) else []
    row = {"world": name, "arm": arm, "seed": seed, "level": round(level, 5), "true": true.round(5).tolist()}
    return {**row, "trials": len(found.params), "suggestion_s": round(max(seconds, default=0.0), 3)}


def orders_kept(folder: Path) -> tuple[float, float]:
    """Shares of all orders in which the five published runs arrive, one slot, at half of all examples.

    In which the best one is the winner by its last report; and the median share of examples at which it came to its end.
    """
    world = published_as_run(folder)
    best = int(world.curves(world.points)[:, -1].argmax())
    wins, ends = [], []
    for order in itertools.permutations(range(len(world.points))):
        search = PausingSearch(world, 0, [world.points[place] for place in order], only_points=True)
        found = replay(world, search, 0, horizon=len(order), num_slots=1)
        half = int(np.searchsorted(found.spent, len(order) / 2, side="right")) - 1
        wins.append(order[found.winner[half]] == best)
        ends.append(found.ended.get(order.index(best), np.inf) / len(order))
    return float(np.mean(wins)), float(np.median(ends))


Rows = Mapping[tuple[str, str], list[dict[str, Any]]]
"""Of each world and arm, by seed."""


def time_to_level(rows: list[dict[str, Any]]) -> float:
    """Whole trials' device time until half of the seeds have the level; infinite where they never have."""
    there = np.flatnonzero(share_there(rows) >= 0.5)
    return float(there[0] + 1) / 4 if len(there) else float("inf")


def share_there(rows: list[dict[str, Any]]) -> np.ndarray:
    """[G] of the seeds that have the level."""
    share_G: np.ndarray = np.mean([np.array(row["true"]) >= row["level"] for row in rows], axis=0)
    return share_G


def ahead(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[tuple[float, float, float]]:
    """At each of ``COMPARED``: the share of seeds in which the first are ahead, level ones by halves, and its interval."""
    at = [4 * time - 1 for time in COMPARED if 4 * time <= min(len(row["true"]) for row in [*rows, *others])]
    mine, theirs = (np.array([row["true"] for row in each])[:, at] for each in (rows, others))
    share = ((mine > theirs) + (mine == theirs) / 2).mean(axis=0)
    return [(float(each), *wilson(float(each), len(rows))) for each in share]


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of ``count`` (Wilson 1927)."""
    z = 1.96
    middle, half = share + z**2 / (2 * count), z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return float((middle - half) / (1 + z**2 / count)), float((middle + half) / (1 + z**2 / count))


def table(rows: Rows, names: Iterable[str]) -> list[str]:
    """Markdown."""
    after = " / ".join(map(str, COMPARED))
    head = [*ARMS, *(f"{arm}: ahead of {than} after {after}, % (interval)" for arm, than in _PAIRS)]
    lines = ["| world | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name in names:
        times = [time_to_level(rows[name, arm]) if (name, arm) in rows else float("nan") for arm in ARMS]
        cells = ["-" if np.isnan(time) else "later" if np.isinf(time) else f"{time:.1f}" for time in times]
        for arm, than in _PAIRS:
            pairs = ahead(rows[name, arm], rows[name, than]) if (name, arm) in rows and (name, than) in rows else []
            cells.append(
                " / ".join(f"{100 * share:.0f} ({100 * low:.0f}-{100 * high:.0f})" for share, low, high in pairs) or "-"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


_PAIRS = ((OURS, STOCK), (OURS, STOCK_POINTS), (BLIND, STOCK))


def recorded(path: Path | None) -> list[dict[str, Any]]:
    """Rows of an earlier call; a line that a kill has torn is left out."""
    if path is None or not path.exists():
        return []
    content = path.read_text()
    whole = content[: content.rfind("\n") + 1]
    path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=60, help="sweeps of each arm in each world (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=16, help="device time of a sweep, in whole trials (default: %(default)s)")
    parser.add_argument("--worlds", default="", metavar="TEXT", help="only those whose name holds it; several with |")
    parser.add_argument("--arms", default="", metavar="NAMES", help="only these, with |")
    parser.add_argument("--processes", type=int, default=1, help="replays side by side (default: %(default)s)")
    parser.add_argument(
        "--published", type=Path, default=PUBLISHED, metavar="DIR", help="the published curves (default: %(default)s)"
    )
    parser.add_argument("--record", type=Path, metavar="JSONL")
    parser.add_argument("--plot", type=Path, metavar="SVG")
    arguments = parser.parse_args()
    folder = arguments.published.absolute()
    names = [name for name in worlds(folder) if any(part in name for part in arguments.worlds.split("|"))]
    arms = [arm for arm in ARMS if not arguments.arms or arm in arguments.arms.split("|")]
    done = recorded(arguments.record)
    done = [{**row, "true": row["true"][: 4 * arguments.trials]} for row in done if len(row["true"]) >= 4 * arguments.trials]
    known = {(row["world"], row["arm"], row["seed"]) for row in done}
    jobs = [(name, arm, seed) for seed in range(arguments.seeds) for name in names for arm in arms]
    jobs = [job for job in jobs if job not in known]
    with ProcessPoolExecutor(arguments.processes) as pool:
        for row in pool.map(partial(run, folder, arguments.trials), jobs):
            done.append(row)
            if arguments.record is not None:
                with open(arguments.record, "a") as file:
                    file.write(json.dumps(row) + "\n")
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(done, key=lambda row: row["seed"]):
        if row["seed"] < arguments.seeds:
            rows.setdefault((row["world"], row["arm"]), []).append(row)
    print(
        f"{arguments.seeds} seeds; whole trials' device time until half of them have the {RANDOM_TRIALS} random trials' level\n"
    )
    print(*table(rows, [name for name in names if any(world == name for world, _ in rows)]), sep="\n")
    slowest = max((row["suggestion_s"] for row in done), default=0.0)
    print(f"\nslowest suggestion: {slowest:.2f} s of the processor, the space's draws by a stand-in of Optuna's trial")
    if published_runs(folder):
        wins, ends = orders_kept(folder)
        print(f"published runs as they are: at half of all examples the best one is the winner in {wins:.0%} of the orders of")
        print(f"arrival; it comes to its end after {ends:.0%} of them (median)")
    else:
        print(f"published runs: skipped, {folder} does not have them")
    if arguments.plot:
        panels = {name: {arm: share_there(rows[name, arm]) for arm in ARMS if (name, arm) in rows} for name in names}
        plot(arguments.plot, grid(arguments.trials), panels)


if __name__ == "__main__":
    main()
