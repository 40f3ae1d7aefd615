"""What must hold of a sweep's folder after every kill, read from its files alone."""

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from fashionclip_tune.storage.checkpoint import newest_checkpoint
from fashionclip_tune.storage.folder import RemoteFolder, read_journal
from fashionclip_tune.training.history import TIMING

# Of Optuna's journal.
_SET_OF_STUDY, _SET_STAGE, _SET_ATTRIBUTE = 2, 7, 8


def journal_of(sweep_dir: Path) -> list[dict[str, Any]]:
    """What is in the journal, an unfinished last line left out; on a durable side it is in pieces."""
    path = sweep_dir / "study.journal"
    content = path.read_bytes() if path.exists() else read_journal(RemoteFolder(sweep_dir))
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]


def histories_of(sweep_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """The rows that each trial recorded, without what says how long it took."""
    histories = {}
    for folder in sorted(sweep_dir.glob("trials/*")):
        rows = [json.loads(path.read_text()) for path in sorted((folder / "evaluations").glob("step_*.json"))]
        histories[int(folder.name[:4])] = [{k: v for k, v in row.items() if k not in TIMING} for row in rows]
    return histories


def study_of(sweep_dir: Path) -> list[dict[str, Any]]:
    """Each trial as Optuna reads it from a copy of the journal: state, draws, settings, rungs, end and stages."""
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
            # Points that no trial has begun with are left out; what was decided on has to begin.
            if t.state != TrialState.WAITING or "decision" in t.user_attrs
        ]


def violations(sweep_dir: Path, stage_steps: int, *, ended: bool) -> list[str]:
    """What must hold after every kill: each trial and each stage once, in the journal and in the trials' folders."""
    found: list[str] = []
    study, histories = study_of(sweep_dir), histories_of(sweep_dir)
    if [trial["number"] for trial in study] != list(range(len(study))):
        found.append("numbers in the study")
    folders = Counter(folder.name[:4] for folder in sweep_dir.glob("trials/*"))
    if any(count > 1 for count in folders.values()) or not set(histories) <= set(range(len(study))):
        found.append(f"folders of trials: {sorted(folders)}")
    once: Counter[tuple[Any, ...]] = Counter()
    for line in journal_of(sweep_dir):
        if line["op_code"] == _SET_STAGE:
            once["stage", line["trial_id"], line["step"]] += 1
        if line["op_code"] == _SET_ATTRIBUTE and "end" in line["user_attr"]:
            once["end", line["trial_id"]] += 1
        if line["op_code"] == _SET_OF_STUDY:
            once.update(("decision", name) for name in line["user_attr"] if name.startswith("decision "))
    found += [f"twice in the journal: {key}" for key, count in once.items() if count > 1]
    for trial in study:
        rows, number = histories.get(trial["number"], []), trial["number"]
        if [row["step"] for row in rows] != [stage_steps * k for k in range(len(rows))]:
            found.append(f"trial {number} has evaluations at {[row['step'] for row in rows]}")
        recorded = {row["examples_seen"]: row["recall_at_10"] for row in rows[: len(trial["stages"])]}
        if recorded != {int(examples): value for examples, value in trial["stages"].items()}:
            found.append(f"trial {number}: the journal has {trial['stages']}, its folder {recorded}")
        if len(rows) - len(trial["stages"]) > 1 or (ended and len(rows) != len(trial["stages"])):
            found.append(f"trial {number}: {len(rows)} evaluations, {len(trial['stages'])} of them in the journal")
        if trial["state"] == "RUNNING" and len(rows) > 1:
            (folder,) = sweep_dir.glob(f"trials/{number:04d}-*")
            whole, refused = newest_checkpoint(folder)
            if whole is None or refused or whole.step < rows[-1]["step"]:
                found.append(f"trial {number}: checkpoints {refused or 'behind its evaluations'}")
    if ended and any(trial["state"] not in ("COMPLETE", "PRUNED") or "end" not in trial for trial in study):
        found.append(f"ended with {[trial['state'] for trial in study]}")
    return found


def outcome(sweep_dir: Path) -> dict[str, Any]:
    """All that a sweep which was killed has in common with one that never was."""
    content = json.loads((sweep_dir / "sweep.json").read_text())
    rows = [{name: value for name, value in row.items() if name not in TIMING} for row in content["trials"]]
    return {
        "state": content["state"],
        "rows": rows,
        "best": content["best"],
        "decisions": content.get("decisions"),
        "study": study_of(sweep_dir),
        "histories": histories_of(sweep_dir),
    }


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*one, *other])
        return [line for key in keys for line in differences(one.get(key), other.get(key), f"{path}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [line for i, pair in enumerate(zip(one, other, strict=True)) for line in differences(*pair, f"{path}/{i}")]
    return [] if one == other else [f"{path}: {other} without kills, {one} with them"]
