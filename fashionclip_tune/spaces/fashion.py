"""Five starts for fashion: the three published models, and two that Marqo trained on a million products (Apache-2.0)."""

from typing import Any

import optuna

STARTS = [
    "ViT-B-32",
    "ViT-B-16",
    "ViT-B-16-SigLIP2-256",
    "hf-hub:Marqo/marqo-fashionCLIP",
    "hf-hub:Marqo/marqo-fashionSigLIP",
]
BASE = {"training.batch_size": 64, "training.epochs": 1}
# Each start once with a middling setting, before the sampler draws.
POINTS = [
    {"clip_model": start, "loss_function": "contrastive", "learning_rate": 1e-5, "caption": "original", "image_strength": 0.0}
    for start in STARTS
]


def space(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "clip_model": trial.suggest_categorical("clip_model", STARTS),
        "loss_function": trial.suggest_categorical("loss_function", ["contrastive", "siglip"]),
        # Weights that know fashion already want less: the lowest rate hardly moves them.
        "training.learning_rate": trial.suggest_float("learning_rate", 3e-7, 1e-4, log=True),
        "augmentation.caption": trial.suggest_categorical("caption", ["original", "uniform"]),
        "augmentation.image_strength": trial.suggest_float("image_strength", 0.0, 0.5),
    }
