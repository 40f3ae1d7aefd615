"""Fine-tuning one start, the folder in ``SEARCH_START``: the space of search_real.py."""

import os
from typing import Any

import optuna

BASE = {
    "clip_model": f"local-dir:{os.environ.get('SEARCH_START', '')}",
    "training.batch_size": 64,
    "training.num_workers": 0,
    "training.checkpoint_minutes": 0,
    "training.epochs": 1,
}


def space(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "loss_function": trial.suggest_categorical("loss_function", ["contrastive", "siglip"]),
        "training.learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True),
        "optimizer.layer_decay": trial.suggest_categorical("layer_decay", [1.0, 0.75]),
        "augmentation.image_strength": trial.suggest_float("image_strength", 0.0, 1.0),
    }
