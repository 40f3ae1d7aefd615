#!/usr/bin/env python
"""What a sweep's machinery costs: wall time over (seconds of training and evaluation / slots), beside stock Ray Tune.

    python -m benchmarks sweep_overhead --trials 16 --slots 2 --budget 5120

The same short trials of the ``tiny`` space on synthetic garments, a process an engine: this project's sweep, and the same
``train`` as a function trainable under Ray Tune's OptunaSearch and ASHA, with its settings as they come and with
reuse_actors=True. ASHA's only rung is the budget: no trial is stopped early, so that all engines have the same work. "Engine"
is from before Ray starts until the last trial has ended and Ray is down; "command" is the whole process: imports, the check
of space and data, and for this project's sweep tables, checkpoints and the exported winner, which the others do not make.
Seconds of training and evaluation are those that each trial counts itself (``device_s``), so what the machine's other work
adds to them cancels out in part. "In steps" is the goodput: the share of the slots' time in the engine that trials spent in
training steps.
"""

import argparse
import json
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.speed.harness import in_own_process

ENGINES = ("ours", "stock", "stock, reuse_actors")


def settings_of(arguments: argparse.Namespace) -> Any:
    from fashionclip_tune.tuning.planning.settings import SweepSettings

    return SweepSettings(
        space="tiny",
        device="cpu",
        num_trials=arguments.trials,
        max_concurrent=arguments.slots,
        seed=arguments.seed,
        scheduler="none",
        budget_examples=arguments.budget,
        grace_examples=arguments.stage,
        overrides={"hardware.threads": 1},
    )


def step_s(folder: Path) -> float:
    """Seconds that all trials below a folder spent in training steps, by what each stage says of its rate."""
    total = 0.0
    for trial in folder.rglob("evaluations"):
        before = 0
        for row in (json.loads(file.read_text()) for file in sorted(trial.glob("step_*.json"))):
            if rate := row.get("samples_per_second"):
                total += (row["examples_seen"] - before) / rate
            before = row["examples_seen"]
    return total


def run_ours(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from rich.console import Console

    from fashionclip_tune.tuning import session as driver
    from fashionclip_tune.tuning.sweep import sweep

    run_trials, engine_s = driver.run_trials, []  # type: ignore[attr-defined]

    def timed(*args: Any, **kwargs: Any) -> bool:
        started = time.perf_counter()
        try:
            return run_trials(*args, **kwargs)
        finally:
            engine_s.append(time.perf_counter() - started)

    driver.run_trials = timed  # type: ignore[attr-defined]
    settings = settings_of(arguments)
    result = sweep(settings, results=folder, name="ours", resume=False, dry_run=False, console=Console(file=sys.stderr))
    assert result is not None
    device_s = [trial["device_s"] for trial in result["trials"]]
    return {"engine_s": engine_s[0], "device_s": device_s, "step_s": step_s(folder)}


def draw(trial: Any) -> None:
    """For OptunaSearch, which must be able to pickle it, and wants parameters rather than settings."""
    from fashionclip_tune.tuning.planning.space import load_space

    load_space("tiny").draw(trial)


def run_stock(arguments: argparse.Namespace, folder: Path, reuse_actors: bool) -> dict[str, Any]:
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    from fashionclip_tune.config.project import ProjectConfig
    from fashionclip_tune.training.train import train
    from fashionclip_tune.tuning.planning.plan import plan_sweep

    plan = plan_sweep(settings_of(arguments))
    base = plan.base.to_dict()

    def trainable(config: dict[str, Any]) -> None:
        changes = {
            {"learning_rate": "training.learning_rate", "caption": "augmentation.caption"}.get(
                name, "augmentation.image_strength" if name == "image_strength" else name
            ): value
            for name, value in config.items()
            if name != "augment_images"
        }
        trial_dir = folder / "trials" / tune.get_context().get_trial_id()
        train(ProjectConfig.from_dict(base).with_overrides(changes), trial_dir, on_eval=lambda row: tune.report(dict(row)))

    started = time.perf_counter()
    ray.init(address="local", num_cpus=arguments.slots, include_dashboard=False, log_to_driver=False)
    search = ConcurrencyLimiter(OptunaSearch(draw, metric="recall_at_10", mode="max", seed=arguments.seed), arguments.slots)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            metric="recall_at_10",
            mode="max",
            search_alg=search,
            scheduler=ASHAScheduler("examples_seen", max_t=arguments.budget, grace_period=arguments.budget),
            num_samples=arguments.trials,
            reuse_actors=reuse_actors,
        ),
        run_config=tune.RunConfig(storage_path=str(folder), name="stock", verbose=0),
    )
    results = tuner.fit()
    ray.shutdown()
    engine_s = time.perf_counter() - started
    assert not results.errors, results.errors
    device_s = [result.metrics["device_s"] for result in results if result.metrics]  # type: ignore[attr-defined]
    return {"engine_s": engine_s, "device_s": device_s, "step_s": step_s(folder)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--budget", type=int, default=5120, help="photos that a trial trains on (default: %(default)s)")
    parser.add_argument("--stage", type=int, help="photos between evaluations and checkpoints (default: a ninth of the budget)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", action="append", choices=ENGINES, help="default: all")
    parser.add_argument("--here", choices=ENGINES, help=argparse.SUPPRESS)  # run it in this process and print its figures
    arguments = parser.parse_args()
    if arguments.here:
        with tempfile.TemporaryDirectory(prefix="sweep-overhead-") as folder:
            if arguments.here == "ours":
                figures = run_ours(arguments, Path(folder))
            else:
                figures = run_stock(arguments, Path(folder), reuse_actors="reuse" in arguments.here)
        print(json.dumps(figures))
        return
    print(f"{arguments.trials} trials of {arguments.budget:,} examples on {arguments.slots} slots, seed {arguments.seed}")
    heads = ("engine", "trials' seconds", "ideal, s", "engine, s", "over ideal", "in steps", "command, s", "over ideal", "load")
    print(f"\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    nobody_else = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # gets into a stock Ray
    for engine in arguments.engine or ENGINES:
        own = ["--trials", arguments.trials, "--slots", arguments.slots, "--budget", arguments.budget, "--seed", arguments.seed]
        own += ["--stage", arguments.stage] if arguments.stage else []
        started = time.perf_counter()
        environment = {"RAY_USAGE_STATS_ENABLED": "0", **nobody_else}
        figures = in_own_process(__file__, "--here", engine, *own, environment=environment)
        command_s = time.perf_counter() - started
        trials_s = sum(figures["device_s"])
        ideal, engine_s = trials_s / arguments.slots, figures["engine_s"]
        cells = [f"{trials_s:.1f}", f"{ideal:.1f}", f"{engine_s:.1f}", f"{engine_s / ideal:.2f}"]
        cells += [f"{figures['step_s'] / arguments.slots / engine_s:.0%}", f"{command_s:.1f}"]
        print(f"| {engine} | {' | '.join(cells)} | {command_s / ideal:.2f} | {os.getloadavg()[0]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
