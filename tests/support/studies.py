"""A small space, and the study and the job of a sweep over it, without Ray."""

from pathlib import Path
from typing import Any

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.tuning.backend.hooks import SweepJob
from fashionclip_tune.tuning.planning.slots import Slots
from fashionclip_tune.tuning.study.study import SweepStudy

MODELS = ("tiny-clip", "tiny-sig")


def space(trial: Any) -> dict[str, Any]:
    return {
        "clip_model": trial.suggest_categorical("clip_model", list(MODELS)),
        "loss_function": "contrastive",
        "training.learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-1, log=True),
    }


def open_study(folder: Path, **changed: Any) -> SweepStudy:
    return SweepStudy(folder / "study.journal", **{"seed": 5, "num_startup_trials": 4, **changed})


def job(sweep_dir: Path, at_a_time: int = 1, **more: Any) -> SweepJob:
    return SweepJob(
        **{"space": space, "build": ProjectConfig().with_overrides, "slots": Slots(at_a_time, 1.0, 0.0), **more},
        sweep_dir=sweep_dir,
    )
