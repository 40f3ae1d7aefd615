"""A sweep whose trials wait for one another, made without a run."""

import json
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from fashionclip_tune.tuning.persistence.record import SweepRecord
from fashionclip_tune.tuning.study.decisions import Candidate, Decision
from fashionclip_tune.tuning.study.study import SweepStudy
from fashionclip_tune.tuning.trial import trial_dir

RUNGS, BUDGET = [32, 96], 288
TERMS = {"num_trials": 4, "rungs": RUNGS, "budget_examples": BUDGET}
HEADER = {"space": "small", "settings": {"num_trials": 4, "budget_examples": BUDGET}, "search": TERMS}
NEW = {"clip_model": "tiny-sig", "loss_function": "siglip", "learning_rate": 2e-3, "augment": True}
OTHER = {"clip_model": "tiny-clip", "loss_function": "contrastive", "learning_rate": 4e-4, "augment": False}


def space(trial: Any) -> dict[str, Any]:
    drawn = {
        "clip_model": trial.suggest_categorical("clip_model", ["tiny-clip", "tiny-sig"]),
        "loss_function": trial.suggest_categorical("loss_function", ["contrastive", "siglip"]),
        "training.learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
    }
    trial.suggest_categorical("augment", [False, True])
    return drawn


class Driver:
    """Does with journal and folders what a sweep's driver and workers do, without either."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        points = [{**OTHER, "clip_model": model} for model in ("tiny-clip", "tiny-sig")]
        self.folder, self.study = folder, SweepStudy(folder / "study.journal", seed=3, num_startup_trials=None, points=points)
        self.record = SweepRecord(folder, self.study, {"name": folder.name, **HEADER})
        self._config = dict[int, dict[str, Any]]()

    def begin(self) -> None:
        number, settings = self.study.suggest(space)
        assert settings is not None
        self._config[number] = settings
        self.reach(number, 0, 0.1)

    def reach(self, number: int, examples_seen: int, recall: float) -> None:
        config = self._config[number]
        folder = trial_dir(self.folder, number, config["clip_model"], config["loss_function"]) / "evaluations"
        folder.mkdir(parents=True, exist_ok=True)
        row = {"step": examples_seen // 16, "examples_seen": examples_seen, "recall_at_10": recall, "recall_at_5": recall / 2}
        row |= {"recall_at_10_low": recall - 0.01, "recall_at_10_high": recall + 0.01, "protocol": "instance"}
        row |= {"num_gallery_images": 20, "num_gallery_texts": 20, "duration_s": examples_seen / 10, "device_s": 1.0}
        (folder / f"step_{row['step']:08d}.json").write_text(json.dumps(row))
        self.study.record_stage(number, examples_seen, recall)


def make_waiting_sweep(folder: Path, state: str = "FINISHED") -> Path:
    """0 and 1 are points. 1 is given up, 0 is thawed and goes on to its budget, 2 pauses for good, 3 diverges.

    ``state``: RUNNING: as it is before the end, when 2 waits and 3 runs.
    """
    driver = Driver(folder)
    study = driver.study
    driver.begin()
    driver.reach(0, 32, 0.2)
    study.decide(Decision(0, 32, None))
    driver.begin()
    driver.reach(1, 32, 0.15)
    study.decide(Decision(1, 32, Candidate(None, NEW, 0.6, 0.05, 0.02), Candidate(0, OTHER, 0.5, 0.1, 0.01)))
    driver.begin()
    driver.reach(2, 32, 0.18)
    study.decide(Decision(2, 32, Candidate(0, OTHER, 0.5, 0.1, 0.02), Candidate(2, NEW, 0.55, 0.02, 0.005)))
    driver.reach(0, 96, 0.3)
    study.decide(Decision(0, 96, Candidate(0, OTHER, 0.4, 0.1, 0.04), Candidate(None, OTHER, 0.3, 0.2, 0.03)))
    driver.reach(0, 288, 0.45)
    study.end(0, TrialState.COMPLETE, "budget")
    study.decide(Decision(None, 0, Candidate(None, NEW, 0.4, 0.1, 0.02), Candidate(2, NEW, 0.4, 0.1, 0.01), {1: "rung_1"}))
    driver.begin()
    if state == "FINISHED":
        study.end(3, TrialState.PRUNED, "diverged", "the loss is nan")
        study.end(2, TrialState.PRUNED, "rung_1")
    driver.record.write(state)
    return folder
