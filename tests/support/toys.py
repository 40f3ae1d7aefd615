"""Trainables without training, for what the engine has to survive. Workers receive this module by value."""

import os
import threading
import time
from pathlib import Path
from typing import Any

from ray import tune

from fashionclip_tune.tuning.trial import TrialPlan

STAGES = (100, 200, 300)


def log(plan: TrialPlan, text: str) -> None:
    folder = Path(plan.trial_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log", "a") as file:
        file.write(f"{text}\n")


def report(plan: TrialPlan, examples_seen: int, value: float) -> None:
    log(plan, f"{examples_seen}")
    tune.report({"examples_seen": examples_seen, "recall_at_10": value})


def slow_to_clean_up(config: dict[str, Any]) -> None:
    """Each trial is worse than the one before, so ASHA stops all but the first, and each takes 4 s to go."""
    plan = TrialPlan.from_ray(config)
    try:
        for examples_seen in STAGES:
            report(plan, examples_seen, 1 / (plan.number + 1))
    except SystemExit:
        time.sleep(4)
        log(plan, "cleaned up")
        raise


def dies_once(config: dict[str, Any]) -> None:
    """The process of trial 1 is gone without a word at its second stage, once; then the trial goes on from there."""
    plan = TrialPlan.from_ray(config)
    folder = Path(plan.trial_dir)
    lines = (folder / "log").read_text().split() if (folder / "log").exists() else []
    for examples_seen in STAGES:
        if str(examples_seen) in lines:
            continue
        if plan.number == 1 and examples_seen == 200 and "died" not in lines:
            log(plan, "died")
            os._exit(1)
        report(plan, examples_seen, 0.5)


def dies_after_its_end(config: dict[str, Any]) -> None:
    """The process of each trial is gone soon after the trial has ended: while another one takes it over, now and then."""
    plan = TrialPlan.from_ray(config)
    reported = (Path(plan.trial_dir) / "log").read_text().split() if (Path(plan.trial_dir) / "log").exists() else []
    for examples_seen in STAGES:
        if str(examples_seen) not in reported:
            report(plan, examples_seen, 0.5)
    if not reported:
        threading.Timer(0.03 * plan.number, os._exit, [1]).start()


def dies_each_time(config: dict[str, Any]) -> None:
    """The process of trial 0, after its first stage."""
    plan = TrialPlan.from_ray(config)
    if plan.number == 0 and (Path(plan.trial_dir) / "log").exists():
        log(plan, "died")
        os._exit(1)
    report(plan, 100, 0.5)
    if plan.number == 0:
        log(plan, "died")
        time.sleep(1)  # what was reported has arrived
        os._exit(1)
    report(plan, 200, 0.5)


def goes_wrong(config: dict[str, Any]) -> None:
    """Trial 0 reports NaN, 1 diverges, 2 fails; the others are well."""
    plan = TrialPlan.from_ray(config)
    for examples_seen in STAGES:
        report(plan, examples_seen, float("nan") if plan.number == 0 else 0.5)
        if plan.number == 1:
            tune.report({"examples_seen": 150, "recall_at_10": 0.5, "stop_reason": "diverged", "message": "the loss is nan"})
        if plan.number == 2:
            tune.report({"examples_seen": 150, "recall_at_10": 0.5, "stop_reason": "error", "message": "ValueError: no"})


def takes_two_seconds(config: dict[str, Any]) -> None:
    """Leaves when it ran."""
    plan = TrialPlan.from_ray(config)
    started = time.time()
    time.sleep(2)
    report(plan, 100, 0.5)
    (Path(plan.trial_dir) / "span").write_text(f"{started} {time.time()}")
