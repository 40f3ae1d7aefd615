"""The five published settings, with the published recipe: no warm-up or schedule, no clipping, no sample shuffling."""

from typing import Any

import optuna

BASE = {
    "training.batch_size": 64,
    "training.learning_rate": 1e-5,
    "training.weight_decay": 0.01,
    "training.beta2": 0.999,
    "training.epsilon": 1e-8,
    "training.max_grad_norm": None,
    "training.shuffle_buffer": 0,
    "training.epochs": 5,
    "schedule.name": "constant",
    "schedule.warmup_ratio": 0.0,
}
SETTINGS = {
    "ViT-B-32 InfoNCE": ("ViT-B-32", "contrastive", "original"),
    "ViT-B-16 InfoNCE": ("ViT-B-16", "contrastive", "original"),
    "SigLIP2 InfoNCE": ("ViT-B-16-SigLIP2-256", "contrastive", "original"),
    "SigLIP2 sigmoid": ("ViT-B-16-SigLIP2-256", "siglip", "original"),
    "SigLIP2 sigmoid, 3 captions": ("ViT-B-16-SigLIP2-256", "siglip", "uniform"),
}
POINTS = [{"setting": name} for name in SETTINGS]


def space(trial: optuna.Trial) -> dict[str, Any]:
    model, loss, caption = SETTINGS[trial.suggest_categorical("setting", list(SETTINGS))]
    return {"clip_model": model, "loss_function": loss, "augmentation.caption": caption}
