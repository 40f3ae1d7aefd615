#!/usr/bin/env python
"""Kills sweeps at random moments, resumes them, and compares what comes out with a sweep that was never stopped.

    python -m benchmarks kill_sweep --toy --kills 50 --out kills-toy
    python -m benchmarks kill_sweep --kills 20 --workers 2 --out kills-real

A kill is SIGKILL to the driver alone (its workers live on for seconds), to the worker of a trial (the sweep has to go on by
itself), or to the driver with all processes below it. What is started, and started again with ``--resume``, is
sweeps/run_sweep.py with real Ray, the ``tiny`` space and tiny-clip's checkpoints; ``--workers N`` gives each trial N loader
processes, however few the cores. ``--toy`` trains nothing: a number that forgets no step takes the place of the loss. Every
third toy sweep has two trials side by side, where settings depend on who comes first, so that only the invariants are checked.

What was killed, and what ends by itself, may leave nothing running: all that a driver has started carries a mark in its
environment, and all that is below a worker is listed before that one is killed. ``gone_after_s`` says when the last of it was
gone, ``left`` how many were there after ten seconds, which is a violation.

Each sweep's kills are in ``OUT/kills.csv`` as soon as it has ended; started again, whole sweeps are not repeated. Exits 1
where anything was lost, repeated in the records, or came out otherwise.
"""

import argparse
import csv
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.resilience.started_processes import Leaving, Processes, marked, running, running_below, still_there
from benchmarks.resilience.sweep_invariants import differences, outcome, violations

COLUMNS = (
    *("sweep", "slots", "workers", "kill", "kind", "after_s", "trials", "stages"),
    *("steps_again", "gone_after_s", "left", "violations"),
)
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

    def __init__(
        self,
        folder: Path,
        *,
        toy: bool,
        slots: int,
        seed: int,
        workers: int = 0,
        num_trials: int | None = None,
        data: Path | None = None,
    ) -> None:
        self.folder, self.toy, self.slots, self.workers = folder, toy, slots, workers
        self._lives = 0
        trials, self.stage_steps, batch = TOY if toy else REAL
        stage = self.stage_steps * batch
        fixed = ["--set", "model.pretrained=none", "--set", f"training.batch_size={batch}", "--set", "hardware.threads=1"]
        sizes = [
            "--num-trials",
            num_trials or trials,
            "--max-concurrent",
            slots,
            "--budget-examples",
            STAGES * stage,
            "--grace-examples",
            stage,
        ]
        fixed += ["--samples-per-second", 100]  # stated: nothing is measured before
        where = ["--data", data] if data else []
        where += ["--results", folder.parent, "--name", folder.name, "--seed", seed, "--device", "cpu", "--space", "tiny"]
        script = [Path(__file__).parent / "counted_sweep.py", "toy" if toy else "real", workers]
        self.command = [str(part) for part in [sys.executable, *script, *where, *sizes, *fixed]]
        self.output = folder.with_suffix(".out")

    def start(self, *more: str) -> "subprocess.Popen[bytes]":
        self._lives += 1
        environment = {**os.environ, **marked(self._mark())}
        with open(self.output, "ab") as output:
            return subprocess.Popen(
                [*self.command, *more], stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
            )

    def _mark(self) -> str:
        return f"{self.folder} {self._lives}"

    def leaving(self) -> Leaving:
        """To be called when the driver has ended: what it had started ends too."""
        return Leaving(functools.partial(running, self._mark()))

    def num_evaluations(self) -> int:
        return len(list(self.folder.glob("trials/*/evaluations/step_*.json")))

    def progress(self) -> tuple[int, int]:
        """Trials that were started, stages that were evaluated."""
        return len(list(self.folder.glob("trials/*"))), len(list(self.folder.glob("trials/*/evaluations/step_*[1-9]?*.json")))


def kill(process: "subprocess.Popen[bytes]", kind: str, rng: random.Random) -> Processes | None:
    """What was below the process that was killed; None where there was nothing of that kind."""
    below = running_below(process.pid)
    targets = [process.pid]
    if kind == "worker":
        workers = sorted(pid for (pid, _), name in below.items() if name.startswith(_ACTORS))
        if not workers:
            return None
        targets = [rng.choice(workers)]
        below = running_below(targets[0])
    elif kind == "group":
        targets += [pid for pid, _ in below]
    for pid in targets:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if kind != "worker":
        process.wait()
    return below


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
    leaving: list[Leaving] = []
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
        below = kill(process, kind, rng)
        if below is None:
            continue  # no worker yet
        kill_times.append(time.time())
        leaving.append(Leaving(functools.partial(still_there, below)) if kind == "worker" else sweep.leaving())
        found = violations(sweep.folder, sweep.stage_steps, ended=False) if kind != "worker" else []
        rows.append(
            {"sweep": number, "slots": sweep.slots, "workers": sweep.workers, "kill": len(rows) + 1, "kind": kind}
            | {"after_s": f"{after_s:.1f}", "trials": trials, "stages": stages, "violations": "; ".join(found)}
        )
        print(
            f"sweep {number}: {kind} killed {after_s:.1f} s after its start, at trial {trials}, stage {stages} {found}",
            flush=True,
        )
        if kind != "worker":
            process, started = sweep.start("--resume"), time.monotonic()
    code = process.wait()
    leaving.append(sweep.leaving())
    found = (
        violations(sweep.folder, sweep.stage_steps, ended=True)
        if code == 0
        else [f"the driver ended with status {code}: {sweep.output}"]
    )
    for row, again in zip(rows, steps_again(sweep, kill_times), strict=True):
        row["steps_again"] = again
    rows.append(
        {"sweep": number, "slots": sweep.slots, "workers": sweep.workers, "kill": 0, "kind": "end"}
        | {"violations": "; ".join(found)}
    )
    for row, each in zip(rows, leaving, strict=True):
        row["violations"] = "; ".join(filter(None, [row["violations"], each.violation()]))
        row["left"] = len(each.left)
        row["gone_after_s"] = "" if each.gone_after_s is None else f"{each.gone_after_s:.1f}"
    return rows


def compared(sweep: Sweep, reference: Sweep) -> str:
    return "; ".join(differences(outcome(sweep.folder), outcome(reference.folder))[:5])


def show(rows: list[dict[str, Any]]) -> bool:
    """The table; False if anything was violated."""
    print(
        "| kill | number | before the first stage | steps trained again, median | most | gone after, most | left | violations |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for kind in (*KINDS, "end"):
        of_kind = [row for row in rows if row["kind"] == kind]
        again = sorted(int(row["steps_again"] or 0) for row in of_kind) or [0]
        early, bad = sum(row["stages"] == "0" for row in of_kind), sum(bool(row["violations"]) for row in of_kind)
        gone_s = max((float(row["gone_after_s"]) for row in of_kind if row["gone_after_s"]), default=0.0)
        left = sum(int(row["left"]) for row in of_kind)
        steps = f"{again[len(again) // 2]} | {again[-1]}" if kind in KINDS else " | "
        print(f"| {kind} | {len(of_kind)} | {early} | {steps} | {gone_s:.1f} s | {left} | {bad} |")
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
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="loader processes of a trial (default: none)")
    parser.add_argument("--trials", type=int, metavar="N", help=f"of a sweep (default: {TOY[0]} toys, {REAL[0]} real ones)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="of shards (default: the embedded garments)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and kinds (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    if arguments.toy and arguments.workers:
        parser.error("--workers is for real trials: toys read no photos")
    kind = {
        "toy": arguments.toy,
        "seed": 0,
        "workers": arguments.workers,
        "num_trials": arguments.trials,
        "data": arguments.data,
    }
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    reference = Sweep(out / "never-stopped", slots=1, **kind)
    if not (reference.folder / "best").is_dir():
        shutil.rmtree(reference.folder, ignore_errors=True)
        reference.folder.with_suffix(".steps").unlink(missing_ok=True)
        if reference.start().wait() != 0:
            sys.exit(f"the sweep that nobody kills failed: see {reference.output}")
    rows = read_rows(out / "kills.csv")
    number = 1 + max((int(row["sweep"]) for row in rows), default=0)
    while (done := sum(row["kind"] != "end" for row in rows)) < arguments.kills:
        slots = 2 if arguments.toy and number % 3 == 0 else 1
        sweep = Sweep(out / f"sweep-{number}", slots=slots, **kind)
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
