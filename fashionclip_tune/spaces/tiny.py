"""Two tiny towers that fine-tune on a CPU in seconds: the default without a GPU."""

from typing import Any

import optuna

BASE = {
    "training.batch_size": 64,
    "training.num_workers": 0,  # photos of 32 pixels are decoded faster than they are sent between processes
    "training.checkpoint_minutes": 0,
    "training.epochs": 3,
}


def space(trial: optuna.Trial) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "clip_model": trial.suggest_categorical("clip_model", ["tiny-clip", "tiny-sig"]),
        "loss_function": trial.suggest_categorical("loss_function", ["contrastive", "siglip"]),
        "training.learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
        "augmentation.caption": trial.suggest_categorical("caption", ["original", "uniform"]),
    }
    if trial.suggest_categorical("augment_images", [False, True]):
        settings["augmentation.image_strength"] = trial.suggest_float("image_strength", 0.1, 1.0)
    return settings
