#!/usr/bin/env python
"""Real sweeps of real trials, this project's search beside Ray's stock parts: best Recall@10 at equal device seconds.

    python -m benchmarks search_real --record real.jsonl --data SHARDS --start shared/data/starts/lite0-clip
    python -m benchmarks search_real --record real.jsonl --table

Pairs of sweeps, one of each arm side by side, each with one slot and one thread: the same space, seed, points, start weights,
number and budget of trials, rungs and training. Stock is Ray Tune's OptunaSearch, told the same points, with its
ASHAScheduler; rule is ``--scheduler asha-stopping``. A sweep ends by itself, or when its trials have trained on as many
examples as ``--horizon`` whole trials. What counts at any time is the highest of all trials' last reports. Device seconds are
those that trials count themselves (``device_s``: training, evaluation, and loading what a paused trial goes on from).
"""

import argparse
import contextlib
import itertools
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ARMS = ("ours", "rule", "stock")
_SPACE = Path(__file__).with_name("start_space.py")
_POLL_S = 2.0


def settings_of(arguments: argparse.Namespace) -> Any:
    from fashionclip_tune.tuning.planning.settings import SweepSettings

    return SweepSettings(
        data=arguments.data,
        space=str(_SPACE) if arguments.start else "tiny",
        device="cpu",
        num_trials=arguments.trials,
        max_concurrent=1,
        seed=arguments.seed,
        scheduler="asha-stopping" if arguments.here == "rule" else "asha",
        budget_examples=arguments.budget,
        overrides={"hardware.threads": 1},
    )


def run_ours(arguments: argparse.Namespace, folder: Path) -> None:
    """Until the parent stops it: it has more trials than it comes to."""
    from rich.console import Console

    from fashionclip_tune.errors import StoppedError
    from fashionclip_tune.tuning.sweep import sweep

    with contextlib.suppress(StoppedError):
        sweep(settings_of(arguments), results=folder, name="sweep", resume=False, dry_run=False, console=Console(stderr=True))


def draw(trial: Any) -> None:
    """For OptunaSearch, which must be able to pickle it, and wants parameters rather than settings."""
    from fashionclip_tune.tuning.planning.space import load_space

    load_space(os.environ["SEARCH_SPACE"]).draw(trial)


def run_stock(arguments: argparse.Namespace, folder: Path) -> None:
    import optuna
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    from fashionclip_tune.config.project import ProjectConfig
    from fashionclip_tune.training.pretraining import pretrain_missing
    from fashionclip_tune.training.train import train
    from fashionclip_tune.tuning.planning.plan import plan_sweep
    from fashionclip_tune.tuning.planning.space import load_space

    settings = settings_of(arguments)
    plan = plan_sweep(settings)
    pretrain_missing(list(plan.check.config_of_model))
    base, budget = plan.base.with_overrides(plan.space.base).to_dict(), plan.budget_examples
    os.environ["SEARCH_SPACE"] = space = settings.space

    def trainable(config: dict[str, Any]) -> None:
        drawn = load_space(space).draw(optuna.trial.FixedTrial(config))
        trial_dir = folder / "trials" / tune.get_context().get_trial_id()
        wanted = ProjectConfig.from_dict(base).with_overrides({**drawn, **settings.overrides})
        train(wanted, trial_dir, on_eval=lambda row: tune.report(dict(row)))

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    points = [dict(point) for point in plan.space.points]
    searcher = OptunaSearch(draw, metric="recall_at_10", mode="max", seed=arguments.seed, points_to_evaluate=points)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            metric="recall_at_10",
            mode="max",
            search_alg=ConcurrencyLimiter(searcher, 1),
            scheduler=ASHAScheduler(
                "examples_seen", max_t=budget, grace_period=plan.stage_examples, reduction_factor=plan.settings.reduction_factor
            ),
            num_samples=arguments.trials,
        ),
        run_config=tune.RunConfig(storage_path=str(folder), name="stock", verbose=0),
    )
    tuner.fit()
    ray.shutdown()


def events_of(folder: Path) -> list[tuple[float, float, float]]:
    """Of a sweep, whenever a stage was over: examples and device seconds of all trials so far, highest last report."""
    files = sorted(folder.rglob("evaluations/step_*.json"), key=lambda file: file.stat().st_mtime_ns)
    examples, seconds, recall = dict[Path, int](), dict[Path, float](), dict[Path, float]()
    events = []
    for file in files:
        trial, row = file.parents[1], json.loads(file.read_text())
        examples[trial], seconds[trial], recall[trial] = row["examples_seen"], row["device_s"], row["recall_at_10"]
        events.append((sum(examples.values()), sum(seconds.values()), max(recall.values())))
    return events


def start(arguments: argparse.Namespace, arm: str, seed: int, folder: Path) -> "subprocess.Popen[bytes]":
    own = ["--here", arm, "--folder", folder, "--seed", seed, "--budget", arguments.budget, "--trials", arguments.trials]
    own += [item for name in ("data", "start") if (value := getattr(arguments, name)) for item in (f"--{name}", value)]
    environment = {**os.environ, "SEARCH_START": str(Path(arguments.start).absolute()) if arguments.start else ""}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    folder.mkdir()
    with open(folder / "log", "w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks", "search_real", *map(str, own)],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def run_pair(arguments: argparse.Namespace, arms: Sequence[str], seed: int) -> None:
    """Appends a line for each arm to the record."""
    wanted = arguments.horizon * arguments.budget
    with tempfile.TemporaryDirectory(prefix="search-real-") as made:
        folders = {arm: Path(made) / arm for arm in arms}
        running = {arm: start(arguments, arm, seed, folder) for arm, folder in folders.items()}
        while running:
            time.sleep(_POLL_S)
            for arm, process in list(running.items()):
                events = events_of(folders[arm])
                is_there = bool(events) and events[-1][0] >= wanted
                if process.poll() not in (None, 0):
                    sys.exit(f"{(folders[arm] / 'log').read_text()[-3000:]}\n{arm}, seed {seed}, failed")
                if is_there or process.poll() == 0:
                    del running[arm]
                    end(process)
                    line = {"task": arguments.task, "arm": arm, "seed": seed, "budget": arguments.budget, "events": events}
                    with open(arguments.record, "a") as file:
                        file.write(json.dumps(line) + "\n")
                    examples, seconds, recall = events[-1]
                    said = f"{arguments.task}, seed {seed}, {arm}: {recall:.4f}"
                    print(f"{said} after {examples:,} examples, {seconds:.0f} s", flush=True)


def end(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def table(record: Path, horizon: float) -> None:
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    of_task: dict[str, dict[str, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        of_task[line["task"]][line["arm"]][line["seed"]] = line
    marks = [share * horizon for share in (1 / 4, 1 / 2, 1)]
    print(f"| task, arms | seeds | {' | '.join(f'after {mark:g} trials' for mark in marks)} |")
    print("|---" * (2 + len(marks)) + "|")
    for task, arms in of_task.items():
        for arm, other in itertools.combinations([arm for arm in ARMS if arm in arms], 2):
            seeds = sorted(set(arms[arm]) & set(arms[other]))
            # A whole trial's device seconds: the mean of all sweeps of the task.
            unit = statistics.mean(
                line["events"][-1][1] / line["events"][-1][0] * line["budget"] for by in arms.values() for line in by.values()
            )
            cells = []
            for mark in marks:
                ours, theirs = ([_best(arms[name][seed], mark * unit) for seed in seeds] for name in (arm, other))
                differences = np.subtract(ours, theirs)
                ahead = int((differences > 0).sum()) + int((differences == 0).sum()) / 2
                cells.append(f"{np.mean(ours):.4f}, {np.mean(theirs):.4f} ({differences.mean():+.4f}; {ahead:g} ahead)")
            print(f"| {task}: {arm}, {other} | {len(seeds)} | {' | '.join(cells)} |")


def _best(line: dict[str, Any], seconds: float) -> float:
    return max((event[2] for event in line["events"] if event[1] <= seconds), default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, metavar="JSONL", help="a line a sweep; started again, it goes on after them")
    parser.add_argument("--task", default="garments", help="its name in the record (default: %(default)s)")
    parser.add_argument("--data", metavar="DIR", help="folder of shards (default: synthetic garments)")
    parser.add_argument("--start", metavar="DIR", help="folder of an OpenCLIP model (default: the space tiny)")
    parser.add_argument("--arms", default="ours,stock", help=f"of {', '.join(ARMS)} (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=16, help="of a sweep, at most (default: %(default)s)")
    parser.add_argument("--budget", type=int, default=3456, help="photos that a trial trains on (default: %(default)s)")
    parser.add_argument("--horizon", type=float, default=6, help="of a sweep, in whole trials (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print what the record has")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--here", choices=ARMS, help=argparse.SUPPRESS)  # run this arm in this process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        run = run_stock if arguments.here == "stock" else run_ours
        run(arguments, arguments.folder)
        return
    if arguments.record is None:
        parser.error("--record JSONL is missing")
    if arguments.table:
        table(arguments.record, arguments.horizon)
        return
    known = [json.loads(line) for line in arguments.record.read_text().splitlines()] if arguments.record.exists() else []
    done = {(line["task"], line["seed"], line["arm"]) for line in known}
    for seed in range(arguments.seeds):
        arms = [arm for arm in arguments.arms.split(",") if (arguments.task, seed, arm) not in done]
        if arms:
            run_pair(arguments, arms, seed)


if __name__ == "__main__":
    main()
