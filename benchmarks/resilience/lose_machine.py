#!/usr/bin/env python
"""Loses the machine in the middle of a sweep, again and again, and compares what another one makes of the durable folder.

    python -m benchmarks lose_machine --times 20

A sweep of tiny towers runs with ``--scratch`` and ``--results``. At a random moment the durable folder is copied away under
way, the processes are killed and everything else is deleted; the sweep is resumed under another path, home folder, user and
(where this user may set one) host name. It is to end with the settings and metrics of a sweep that was never stopped (one
trial at a time, on a CPU). Moments are shares of the time from the first stage to the end that this one took. A sweep that is
over by then was not lost under way: another moment is drawn.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.resilience.sweep_invariants import differences, outcome
from fashionclip_tune.synthetic import GarmentRecipe, render_dataset

ROOT = Path(__file__).parents[2]
SETTINGS = ("model.pretrained=none", "training.batch_size=16")


def start(data: Path, machine: Path, results: Path, sync_every: float, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, ROOT / "sweeps" / "run_sweep.py", "--data", data, "--results", results, "--name", "it"]
    command += ["--num-trials", "4", "--max-concurrent", "1", "--budget-examples", "432", "--scratch", machine / "scratch"]
    command += ["--sync-every", str(sync_every), *(f"--set={setting}" for setting in SETTINGS), *more]
    (machine / "home").mkdir(parents=True)
    environment = {**os.environ, "HOME": str(machine / "home"), "USER": machine.name}
    log = open(machine / "log", "w")  # noqa: SIM115 (the process writes it)
    command = [*named(machine.name), *command]
    return subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, text=True, start_new_session=True, env=environment)


def named(host: str) -> list[str]:
    """Runs what follows under another host name; nothing where this user may not."""
    unshared = ["unshare", "--uts", "sh", "-c", f'hostname {host} && exec "$@"', "sh"]
    may = shutil.which("unshare") and subprocess.run([*unshared, "true"], capture_output=True, check=False).returncode == 0
    return unshared if may else []


def remove(folder: Path) -> None:
    """Workers outlive their driver for seconds, and write."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.2)


def stages(results: Path) -> int:
    return len(list((results / "it").glob("trials/*/evaluations/*.json")))


def wait_for_a_stage(results: Path, process: subprocess.Popen[str]) -> None:
    while not stages(results):
        assert process.poll() is None, "it ended before its first stage"
        time.sleep(0.01)


def copy_under_way(drive: Path, copy: Path) -> None:
    """Files in it may be torn; one that was removed while others were copied is no loss of a machine: once more."""
    try:
        shutil.copytree(drive, copy)
    except shutil.Error:
        remove(copy)
        copy_under_way(drive, copy)


def is_over(results: Path) -> bool:
    """Its last file is there, and says so."""
    summary = results / "it" / "sweep.json"
    try:
        return bool(json.loads(summary.read_text())["state"] == "FINISHED")
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def run_whole(data: Path, work: Path, sync_every: float) -> tuple[dict[str, Any], float]:
    """The outcome of a sweep that is never stopped, and how long it took from its first stage on."""
    results = work / "whole-results"
    process = start(data, work / "whole", results, sync_every)
    wait_for_a_stage(results, process)
    started = time.monotonic()
    assert process.wait(timeout=600) == 0, (work / "whole" / "log").read_text()
    return outcome(results / "it"), time.monotonic() - started


def lose_once(number: int, data: Path, work: Path, sync_every: float, after_s: float, expected: dict[str, Any]) -> bool | None:
    """Whether the sweep that was lost and resumed came out as ``expected``; None where it was over before it was lost."""
    first, second, drive = work / f"{number}-first", work / f"{number}-second", work / f"{number}-drive"
    process = start(data, first, drive, sync_every)
    wait_for_a_stage(drive, process)
    time.sleep(after_s)
    elsewhere = second / "mounted"
    elsewhere.mkdir(parents=True)
    copy_under_way(drive, elsewhere / "results")
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for folder in (drive, first):
        remove(folder)
    if is_over(elsewhere / "results"):
        remove(second)
        return None
    shutil.copytree(data, elsewhere / "shards")
    kept = stages(elsewhere / "results")
    states = [path.name for path in elsewhere.glob("results/it/trials/*/state/*") if (path / "checkpoint.json").exists()]
    process = start(elsewhere / "shards", second / "machine", elsewhere / "results", sync_every, "--resume")
    found = [f"status {process.wait(timeout=600)}"] if process.wait(timeout=600) else []
    found = found or differences(outcome(elsewhere / "results" / "it"), expected)
    found += [str(path) for path in second.rglob("warnings.log") if "otherwise" in path.read_text()]
    total = stages(elsewhere / "results")
    verdict = "; ".join(["DIFFERENT", *found[:3]]) if found else "equal"
    print(f"| {number} | {after_s:.1f} | {kept} of {total} | {', '.join(states) or 'none'} | {verdict} |", flush=True)
    if not found:
        remove(second)
    return not found


def lose_under_way(times: int, seed: int, lose: Callable[[int, float], bool | None]) -> tuple[list[bool], int]:
    """Until as many sweeps were lost before they were over: the outcomes, and how many moments came too late.

    Args:
        lose: loses the sweep of this number at this share of its time; None where it was over.
    """
    moments, equal, num_late = random.Random(seed), list[bool](), 0
    while len(equal) < times:
        came_out = lose(len(equal) + 1, moments.random())
        if came_out is None:
            num_late += 1
        else:
            equal.append(came_out)
    return equal, num_late


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--sync-every", type=float, default=0.02, help="minutes (default: %(default)s)")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="lose-machine-"))
    os.environ["FASHIONCLIP_CACHE"] = str(work / "cache")
    data = work / "shards"
    render_dataset(data, GarmentRecipe(num_products=100, views_per_product=2, image_size=48))
    expected, span_s = run_whole(data, work, arguments.sync_every)
    print(f"never stopped: {span_s:.1f} s from the first stage to the end")
    print("| loss | s after the first stage | stages kept | states kept | outcome |")
    print("|---|---|---|---|---|", flush=True)
    equal, num_late = lose_under_way(
        arguments.times,
        arguments.seed,
        lambda number, share: lose_once(number, data, work, arguments.sync_every, share * span_s, expected),
    )
    print(
        f"{sum(equal)} of {len(equal)} sweeps ended as one that was never stopped; {num_late} more were over, and drawn again"
    )
    if not all(equal):
        print(f"what differs is in {work}")
        sys.exit(1)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
