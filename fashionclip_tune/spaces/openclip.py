"""The three pretrained OpenCLIP models: the default on a GPU. The five published settings come first."""

from typing import Any

import optuna

BASE = {"training.batch_size": 64, "training.epochs": 1}
_PUBLISHED = {"positives": "pair", "learning_rate": 1e-5, "layer_decay": 1.0, "augment_images": False}
POINTS = [
    {"clip_model": model, "loss_function": loss, "caption": caption, **_PUBLISHED}
    for model, loss, caption in (
        ("ViT-B-32", "contrastive", "original"),
        ("ViT-B-16", "contrastive", "original"),
        ("ViT-B-16-SigLIP2-256", "contrastive", "original"),
        ("ViT-B-16-SigLIP2-256", "siglip", "original"),
        ("ViT-B-16-SigLIP2-256", "siglip", "uniform"),
    )
]


def space(trial: optuna.Trial) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "clip_model": trial.suggest_categorical("clip_model", ["ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP2-256"]),
        "loss_function": trial.suggest_categorical("loss_function", ["contrastive", "siglip"]),
        # Several photos of a product in a batch are common in shops: about four in Fashion-Gen.
        "loss.positives": trial.suggest_categorical("positives", ["pair", "all", "mask"]),
        "training.learning_rate": trial.suggest_float("learning_rate", 1e-6, 1e-4, log=True),
        "optimizer.layer_decay": trial.suggest_categorical("layer_decay", [1.0, 0.75]),
        "augmentation.caption": trial.suggest_categorical("caption", ["original", "uniform", "weighted"]),
    }
    if settings["augmentation.caption"] == "weighted":
        probability = trial.suggest_float("original_caption_probability", 0.1, 0.9)
        settings["augmentation.original_caption_probability"] = probability
    if trial.suggest_categorical("augment_images", [False, True]):
        settings["augmentation.image_strength"] = trial.suggest_float("image_strength", 0.1, 1.0)
        settings["augmentation.rand_augment"] = trial.suggest_categorical("rand_augment", [False, True])
        settings["augmentation.erasing"] = trial.suggest_categorical("erasing", [False, True])
    return settings
