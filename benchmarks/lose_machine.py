#!/usr/bin/env python
"""Loses the machine in the middle of a sweep, again and again, and compares what another one makes of the durable folder.

    python benchmarks/lose_machine.py --times 20

A sweep of tiny towers runs with ``--scratch`` and ``--results``. At a random moment the durable folder is copied away under
way, the processes are killed and everything else is deleted; the sweep is resumed under another path, home folder, user and
(where this user may set one) host name. It is to end with the settings and metrics of a sweep that was never stopped (one
trial at a time, on a CPU).
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
from pathlib import Path
from typing import Any

from fashionclip_tune.synthetic import GarmentRecipe, render_dataset

ROOT = Path(__file__).parents[1]
SETTINGS = ("model.pretrained=none", "training.batch_size=16")
TIMING = ("duration_s", "samples_per_second", "device_s", "process_memory_bytes")


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


def outcome(results: Path) -> dict[str, Any]:
    content = json.loads((results / "it" / "sweep.json").read_text())
    histories = {}
    for folder in sorted((results / "it" / "trials").iterdir()):
        rows = [json.loads(path.read_text()) for path in sorted((folder / "evaluations").glob("*.json"))]
        histories[folder.name] = [{key: value for key, value in row.items() if key not in TIMING} for row in rows]
    rows = [{key: value for key, value in row.items() if key not in TIMING} for row in content["trials"]]
    return {"state": content["state"], "trials": rows, "histories": histories}


def remove(folder: Path) -> None:
    """Workers outlive their driver for seconds, and write."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.2)


def stages(results: Path) -> int:
    return len(list((results / "it").glob("trials/*/evaluations/*.json")))


def lose_once(number: int, data: Path, work: Path, sync_every: float, after_s: float, expected: dict[str, Any]) -> bool:
    first, second, drive = work / f"{number}-first", work / f"{number}-second", work / f"{number}-drive"
    process = start(data, first, drive, sync_every)
    deadline = time.monotonic() + 120
    while not stages(drive) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(after_s)
    elsewhere = second / "mounted"
    elsewhere.mkdir(parents=True)
    shutil.copytree(drive, elsewhere / "results")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for folder in (drive, first):
        remove(folder)
    shutil.copytree(data, elsewhere / "shards")
    kept = stages(elsewhere / "results")
    states = [path.name for path in elsewhere.glob("results/it/trials/*/state/*") if (path / "checkpoint.json").exists()]
    process = start(elsewhere / "shards", second / "machine", elsewhere / "results", sync_every, "--resume")
    code = process.wait(timeout=600)
    passed_over = [path for path in second.rglob("warnings.log") if "otherwise" in path.read_text()]
    equal = code == 0 and outcome(elsewhere / "results") == expected and not passed_over
    total = stages(elsewhere / "results")
    verdict = "equal" if equal else "DIFFERENT"
    print(f"| {number} | {after_s:.1f} | {kept} of {total} | {', '.join(states) or 'none'} | {verdict} |", flush=True)
    if equal:
        shutil.rmtree(second)
    return equal


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
    started = time.monotonic()
    whole = start(data, work / "whole", work / "whole-results", arguments.sync_every)
    assert whole.wait(timeout=600) == 0, (work / "whole" / "log").read_text()
    expected = outcome(work / "whole-results")
    span_s = 0.6 * (time.monotonic() - started)
    moments = random.Random(arguments.seed)
    print("| loss | s after the first stage | stages kept | states kept | outcome |")
    print("|---|---|---|---|---|")
    equal = [
        lose_once(number, data, work, arguments.sync_every, moments.uniform(0, span_s), expected)
        for number in range(1, arguments.times + 1)
    ]
    print(f"{sum(equal)} of {len(equal)} sweeps ended as one that was never stopped")
    if not all(equal):
        print(f"what differs is in {work}")
        sys.exit(1)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
