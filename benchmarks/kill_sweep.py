#!/usr/bin/env python
"""Kills sweeps at random moments, resumes them, and compares what comes out with a sweep that was never stopped.

    python benchmarks/kill_sweep.py --toy --kills 50 --out kills-toy
    python benchmarks/kill_sweep.py --kills 5 --out kills-real

A kill is SIGKILL to the driver alone (its workers live on for seconds), to the worker of a trial (the sweep has to go on by
itself), or to the driver with all processes below it. What is started, and started again with ``--resume``, is
sweeps/run_sweep.py with real Ray, the ``tiny`` space and tiny-clip's checkpoints; ``--toy`` trains nothing: a number that
forgets no step takes the place of the loss. Every third toy sweep has two trials side by side, where settings depend on who
comes first, so that only the invariants are checked.

Each sweep's kills are in ``OUT/kills.csv`` as soon as it has ended; started again, whole sweeps are not repeated. Exits 1
where anything was lost, repeated in the records, or came out otherwise.
"""

import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sweep_invariants import differences, outcome, violations

COLUMNS = ("sweep", "slots", "kill", "kind", "after_s", "trials", "stages", "steps_again", "violations")
KINDS = ("driver", "worker", "group")
STAGES = 9
# (trials, steps of a stage, batch): a stage takes about a third of a second, or a second where it is real.
TOY, REAL = (10, 10, 64), (6, 8, 32)
_LONGEST_WAIT_S = 5.0
_BEFORE_FIRST_RECORD_S = 12.0
_EARLY_SHARE = 0.2
# How a trial's process calls itself within a call and between two of them.
_ACTORS = ("ray::ResourceTrainable", "ray::Patient")


class Sweep:
    """One sweep and its drivers, one after the other."""

    def __init__(self, folder: Path, *, toy: bool, slots: int, seed: int) -> None:
        self.folder, self.toy, self.slots = folder, toy, slots
        trials, self.stage_steps, batch = TOY if toy else REAL
        stage = self.stage_steps * batch
        fixed = ["--set", "model.pretrained=none", "--set", f"training.batch_size={batch}", "--set", "hardware.threads=1"]
        sizes = [
            "--num-trials",
            trials,
            "--max-concurrent",
            slots,
            "--budget-examples",
            STAGES * stage,
            "--grace-examples",
            stage,
        ]
        where = ["--results", folder.parent, "--name", folder.name, "--seed", seed, "--device", "cpu", "--space", "tiny"]
        script = [Path(__file__).parent / "counted_sweep.py", "toy" if toy else "real"]
        self.command = [str(part) for part in [sys.executable, *script, *where, *sizes, *fixed]]
        self.output = folder.with_suffix(".out")

    def start(self, *more: str) -> "subprocess.Popen[bytes]":
        with open(self.output, "ab") as output:
            return subprocess.Popen([*self.command, *more], stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def num_evaluations(self) -> int:
        return len(list(self.folder.glob("trials/*/evaluations/step_*.json")))

    def progress(self) -> tuple[int, int]:
        """Trials that were started, stages that were evaluated."""
        return len(list(self.folder.glob("trials/*"))), len(list(self.folder.glob("trials/*/evaluations/step_*[1-9]?*.json")))


def processes_below(pid: int) -> dict[int, str]:
    """All descendants of a process: their ids and how they call themselves."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has just ended
            continue
    found, border = {}, [pid]
    while border:
        border = [child for child, parent in parents.items() if parent in border]
        found |= {child: names.get(child, "") for child in border}
    return found


def kill(process: "subprocess.Popen[bytes]", kind: str, rng: random.Random) -> bool:
    """False where there was nothing of that kind to be killed."""
    below = processes_below(process.pid)
    if kind == "worker":
        workers = sorted(pid for pid, name in below.items() if name.startswith(_ACTORS))
        targets = [rng.choice(workers)] if workers else []
    else:
        targets = [process.pid, *(below if kind == "group" else ())]
    for pid in targets:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    if kind != "worker":
        process.wait()
    return bool(targets)


def steps_again(sweep: Sweep, kill_times: list[float]) -> list[int]:
    """How many steps were trained again after each kill: the latest one before such a step is to blame."""
    counts, seen = [0] * len(kill_times), set()
    for line in sweep.folder.with_suffix(".steps").read_text().splitlines():
        when, *step = line.split()
        if tuple(step) in seen:
            counts[sum(killed < float(when) for killed in kill_times) - 1] += 1
        seen.add(tuple(step))
    return counts


def wait(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """False if the driver ended before."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def until_recorded(sweep: Sweep, process: "subprocess.Popen[bytes]") -> bool:
    """Until this driver's trials have evaluated something; False if it ended before."""
    before = sweep.num_evaluations()
    while process.poll() is None:
        if sweep.num_evaluations() > before:
            return True
        time.sleep(0.05)
    return False


def attack(sweep: Sweep, number: int, seed: int, most_kills: int) -> list[dict[str, Any]]:
    """Runs one sweep to its end, killing it up to ``most_kills`` times."""
    rng = random.Random(f"{seed} {number}")
    rows: list[dict[str, Any]] = []
    kill_times: list[float] = []
    for old in (sweep.folder.with_suffix(".steps"), sweep.output):
        old.unlink(missing_ok=True)
    shutil.rmtree(sweep.folder, ignore_errors=True)
    process, started = sweep.start("--resume"), time.monotonic()
    while len(rows) < most_kills:
        early = rng.random() < _EARLY_SHARE
        delay = rng.uniform(0, _BEFORE_FIRST_RECORD_S if early else _LONGEST_WAIT_S)
        kind = rng.choice(KINDS)
        if not (early or until_recorded(sweep, process)) or not wait(process, delay):
            break  # it has come to its end
        after_s, (trials, stages) = time.monotonic() - started, sweep.progress()
        if not kill(process, kind, rng):
            continue  # no worker yet
        kill_times.append(time.time())
        found = violations(sweep.folder, sweep.stage_steps, ended=False) if kind != "worker" else []
        rows.append(
            {"sweep": number, "slots": sweep.slots, "kill": len(rows) + 1, "kind": kind, "after_s": f"{after_s:.1f}"}
            | {"trials": trials, "stages": stages, "violations": "; ".join(found)}
        )
        print(
            f"sweep {number}: {kind} killed {after_s:.1f} s after its start, at trial {trials}, stage {stages} {found}",
            flush=True,
        )
        if kind != "worker":
            process, started = sweep.start("--resume"), time.monotonic()
    code = process.wait()
    found = (
        violations(sweep.folder, sweep.stage_steps, ended=True)
        if code == 0
        else [f"the driver ended with status {code}: {sweep.output}"]
    )
    for row, again in zip(rows, steps_again(sweep, kill_times), strict=True):
        row["steps_again"] = again
    end = {"sweep": number, "slots": sweep.slots, "kill": 0, "kind": "end", "violations": "; ".join(found)}
    return [*rows, end]


def compared(sweep: Sweep, reference: Sweep) -> str:
    return "; ".join(differences(outcome(sweep.folder), outcome(reference.folder))[:5])


def show(rows: list[dict[str, Any]]) -> bool:
    """The table; False if anything was violated."""
    print("| kill | number | before the first stage | steps trained again, median | most | violations |")
    print("|---|---|---|---|---|---|")
    for kind in KINDS:
        of_kind = [row for row in rows if row["kind"] == kind]
        again = sorted(int(row["steps_again"]) for row in of_kind) or [0]
        early, bad = sum(int(row["stages"]) == 0 for row in of_kind), sum(bool(row["violations"]) for row in of_kind)
        print(f"| {kind} | {len(of_kind)} | {early} | {again[len(again) // 2]} | {again[-1]} | {bad} |")
    ends = [row for row in rows if row["kind"] == "end"]
    single = sum(row["slots"] == "1" for row in ends)
    wrong = [row for row in rows if row["violations"]]
    print(f"{len(ends)} sweeps, {single} with one slot and compared with one that was never stopped; {len(wrong)} violations")
    for row in wrong:
        print(f"sweep {row['sweep']}, {row['kind']} {row['kill']}: {row['violations']}")
    return not wrong


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a trainable that trains nothing")
    parser.add_argument("--kills", type=int, default=50, metavar="N")
    parser.add_argument("--kills-per-sweep", type=int, default=6, metavar="N", help="at most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and kinds (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    reference = Sweep(out / "never-stopped", toy=arguments.toy, slots=1, seed=0)
    if not (reference.folder / "best").is_dir():
        shutil.rmtree(reference.folder, ignore_errors=True)
        reference.folder.with_suffix(".steps").unlink(missing_ok=True)
        if reference.start().wait() != 0:
            sys.exit(f"the sweep that nobody kills failed: see {reference.output}")
    rows = read_rows(out / "kills.csv")
    number = 1 + max((int(row["sweep"]) for row in rows), default=0)
    while (done := sum(row["kind"] != "end" for row in rows)) < arguments.kills:
        slots = 2 if arguments.toy and number % 3 == 0 else 1
        sweep = Sweep(out / f"sweep-{number}", toy=arguments.toy, slots=slots, seed=0)
        new = attack(sweep, number, arguments.seed, min(arguments.kills_per_sweep, arguments.kills - done))
        if slots == 1 and not new[-1]["violations"]:
            new[-1]["violations"] = compared(sweep, reference)
        is_new = not (out / "kills.csv").exists()
        with open(out / "kills.csv", "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            if is_new:
                writer.writeheader()
            writer.writerows(new)
        rows, number = read_rows(out / "kills.csv"), number + 1
        if not new[-1]["violations"]:
            shutil.rmtree(sweep.folder)
    sys.exit(0 if show(rows) else 1)


if __name__ == "__main__":
    main()
