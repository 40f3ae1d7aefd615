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
import functools
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
COLUMNS = ("sweep", "slots", "kill", "kind", "after_s", "trials", "stages", "steps_again", "violations")
KINDS = ("driver", "worker", "group")
STAGES = 9
# (trials, steps of a stage, batch): a stage takes about a third of a second, or a second where it is real.
TOY, REAL = (10, 10, 64), (6, 8, 32)
_TOY_STEP_S = 0.02
_LONGEST_WAIT_S = 5.0
_BEFORE_FIRST_RECORD_S = 12.0
_EARLY_SHARE = 0.2
# How a trial's process calls itself within a call and between two of them.
_ACTORS = ("ray::ResourceTrainable", "ray::Patient")
_TIMING = ("duration_s", "samples_per_second")


def toy_train(config: Any, out_dir: Path, *, on_eval: Any, resume_from: Path, should_stop: Any) -> None:
    """In place of ``train``: the same files in the same order, but a step is one of a chaotic map instead of the model."""
    from fashionclip_tune.checkpoint import newest_checkpoint, save_checkpoint
    from fashionclip_tune.files import write_json
    from fashionclip_tune.history import History
    from fashionclip_tune.model import load_model

    started, training = time.perf_counter(), config.training
    stage_steps, total_steps = (n // training.batch_size for n in (training.stage_examples, training.budget_examples))
    weights = dict(load_model(config).network.state_dict())
    found, refused = newest_checkpoint(resume_from)
    assert not refused, refused
    state = found.training_state() if found else {"step": 0, "optimizer": torch.tensor(0.3 + training.learning_rate).double()}
    rows = list(found.record["history"]) if found else []
    step, value = state["step"], state["optimizer"]

    def row() -> dict[str, Any]:
        recall = float(value) * 0.1 - abs(float(torch.tensor(training.learning_rate).log10()) + 3) / 5 + 0.8
        figures = {"recall_at_10": recall, "recall_at_5": recall / 2, "protocol": "instance"}
        counts = {"num_gallery_images": 1, "num_gallery_texts": 1, "duration_s": time.perf_counter() - started}
        return {"step": step, "examples_seen": step * training.batch_size, **figures, **counts}

    write_json(out_dir / "config.json", config.to_dict())
    history = History(out_dir, first_new_examples=rows[-1]["examples_seen"] if rows else 0)
    rows = rows or [row()]
    while True:
        difference = history.record(rows[-1])
        assert difference is None, difference
        on_eval(dict(rows[-1]))
        if step == total_steps:
            break
        for _ in range(stage_steps):
            time.sleep(_TOY_STEP_S)
            value = 3.99 * value * (1 - value)
            step += 1
            log_step(out_dir, step)
        rows.append(row())
        state = {"step": step, "micro_batch_size": 1, "stage": {}, "optimizer": value, "scaler": {}, "raw_weights": {}}
        record = {"step": step, "fingerprint": "toy", "config": {}, "history": rows, "duration_s": 0.0}
        save_checkpoint(out_dir / "checkpoints", weights, state, record)
    history.close()


def log_step(trial_dir: Path, step: int) -> None:
    """Beside the sweep, one short line: appended whole or not at all."""
    with open(trial_dir.parents[1].with_suffix(".steps"), "a") as file:
        file.write(f"{time.time()} {trial_dir.name[:4]} {step}\n")


def toy_trial(ray_config: dict[str, Any]) -> None:
    from fashionclip_tune.tuning import trainable

    trainable.train = toy_train  # type: ignore[assignment]
    trainable.run_trial(ray_config)


def real_trial(ray_config: dict[str, Any]) -> None:
    """The trial as it is, its steps noted down."""
    from fashionclip_tune.trainer import Trainer
    from fashionclip_tune.tuning import trainable

    trial_dir = Path(json.loads(ray_config["plan"])["trial_dir"])
    attempt_step = Trainer._attempt_step

    def noted(self: Trainer, batch: Any) -> None:
        attempt_step(self, batch)
        log_step(trial_dir, self.step)

    Trainer._attempt_step = noted  # type: ignore[method-assign]
    try:
        trainable.run_trial(ray_config)
    finally:
        Trainer._attempt_step = attempt_step  # type: ignore[method-assign]


def drive(toy: bool, arguments: list[str]) -> None:
    """sweeps/run_sweep.py in this process, with a trainable whose steps are counted."""
    from fashionclip_tune.tuning import sweep
    from fashionclip_tune.tuning.execution import run_trials

    sweep.run_trials = functools.partial(run_trials, trainable=toy_trial if toy else real_trial)
    script = importlib.util.spec_from_file_location("run_sweep", ROOT / "sweeps" / "run_sweep.py")
    assert script is not None
    assert script.loader is not None
    module = importlib.util.module_from_spec(script)
    script.loader.exec_module(module)
    sys.argv = ["run_sweep.py", *arguments]
    module.main()


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
        flag = ["--drive-toy"] if toy else ["--drive-real"]
        self.command = [str(part) for part in [sys.executable, Path(__file__), *flag, *where, *sizes, *fixed]]
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


def journal_of(sweep_dir: Path) -> list[dict[str, Any]]:
    """What is in the journal, an unfinished last line left out."""
    path = sweep_dir / "study.journal"
    content = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]


def histories_of(sweep_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """The rows that each trial recorded, without what says how long it took."""
    histories = {}
    for folder in sorted(sweep_dir.glob("trials/*")):
        rows = [json.loads(path.read_text()) for path in sorted((folder / "evaluations").glob("step_*.json"))]
        histories[int(folder.name[:4])] = [{k: v for k, v in row.items() if k not in _TIMING} for row in rows]
    return histories


def study_of(sweep_dir: Path) -> list[dict[str, Any]]:
    """Each trial as Optuna reads it from a copy of the journal: state, draws, settings, rungs, end and stages."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "journal"
        copy.write_text("".join(json.dumps(line) + "\n" for line in journal_of(sweep_dir)))
        try:
            study = optuna.load_study(study_name="sweep", storage=JournalStorage(JournalFileBackend(str(copy))))
        except KeyError:  # killed before it was there
            return []
        return [
            {"number": t.number, "state": t.state.name, "params": t.params, "stages": t.intermediate_values, **t.user_attrs}
            for t in study.get_trials()
        ]


def violations(sweep: Sweep, *, ended: bool) -> list[str]:
    """What must hold after every kill: each trial and each stage once, in the journal and in the trials' folders."""
    from fashionclip_tune.checkpoint import newest_checkpoint

    found: list[str] = []
    study, histories = study_of(sweep.folder), histories_of(sweep.folder)
    if [trial["number"] for trial in study] != list(range(len(study))):
        found.append("numbers in the study")
    folders = Counter(folder.name[:4] for folder in sweep.folder.glob("trials/*"))
    if any(count > 1 for count in folders.values()) or not set(histories) <= set(range(len(study))):
        found.append(f"folders of trials: {sorted(folders)}")
    once: Counter[tuple[Any, ...]] = Counter()
    for line in journal_of(sweep.folder):
        if line["op_code"] == 7:
            once["stage", line["trial_id"], line["step"]] += 1
        if line["op_code"] == 8 and "end" in line["user_attr"]:
            once["end", line["trial_id"]] += 1
    found += [f"twice in the journal: {key}" for key, count in once.items() if count > 1]
    for trial in study:
        rows, number = histories.get(trial["number"], []), trial["number"]
        if [row["step"] for row in rows] != [sweep.stage_steps * k for k in range(len(rows))]:
            found.append(f"trial {number} has evaluations at {[row['step'] for row in rows]}")
        recorded = {row["examples_seen"]: row["recall_at_10"] for row in rows[: len(trial["stages"])]}
        if recorded != {int(examples): value for examples, value in trial["stages"].items()}:
            found.append(f"trial {number}: the journal has {trial['stages']}, its folder {recorded}")
        if len(rows) - len(trial["stages"]) > 1 or (ended and len(rows) != len(trial["stages"])):
            found.append(f"trial {number}: {len(rows)} evaluations, {len(trial['stages'])} of them in the journal")
        if trial["state"] == "RUNNING" and len(rows) > 1:
            (folder,) = sweep.folder.glob(f"trials/{number:04d}-*")
            whole, refused = newest_checkpoint(folder)
            if whole is None or refused or whole.step < rows[-1]["step"]:
                found.append(f"trial {number}: checkpoints {refused or 'behind its evaluations'}")
    if ended and any(trial["state"] not in ("COMPLETE", "PRUNED") or "end" not in trial for trial in study):
        found.append(f"ended with {[trial['state'] for trial in study]}")
    return found


def outcome(sweep: Sweep) -> dict[str, Any]:
    """All that a sweep which was killed has in common with one that never was."""
    content = json.loads((sweep.folder / "sweep.json").read_text())
    rows = [{name: value for name, value in row.items() if name != "duration_s"} for row in content["trials"]]
    return {
        "state": content["state"],
        "rows": rows,
        "best": content["best"],
        "study": study_of(sweep.folder),
        "histories": histories_of(sweep.folder),
    }


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*one, *other])
        return [line for key in keys for line in differences(one.get(key), other.get(key), f"{path}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [line for i, pair in enumerate(zip(one, other, strict=True)) for line in differences(*pair, f"{path}/{i}")]
    return [] if one == other else [f"{path}: {other} without kills, {one} with them"]


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
        found = violations(sweep, ended=False) if kind != "worker" else []
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
    found = violations(sweep, ended=True) if code == 0 else [f"the driver ended with status {code}: {sweep.output}"]
    for row, again in zip(rows, steps_again(sweep, kill_times), strict=True):
        row["steps_again"] = again
    end = {"sweep": number, "slots": sweep.slots, "kill": 0, "kind": "end", "violations": "; ".join(found)}
    return [*rows, end]


def compared(sweep: Sweep, reference: Sweep) -> str:
    return "; ".join(differences(outcome(sweep), outcome(reference))[:5])


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
    if sys.argv[1:2] in (["--drive-toy"], ["--drive-real"]):
        drive(sys.argv[1] == "--drive-toy", sys.argv[2:])
    else:
        main()
