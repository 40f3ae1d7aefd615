"""The best fashion image-text retriever that one cheap GPU can give you, and the proof that it is the best."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fashionclip_tune.config import ClipModelOptions, LossFunctionOptions, ProjectConfig, TrainingConfig
    from fashionclip_tune.run import TrainResult
    from fashionclip_tune.training import train, training_prep

__all__ = [
    "ClipModelOptions",
    "LossFunctionOptions",
    "ProjectConfig",
    "TrainResult",
    "TrainingConfig",
    "train",
    "training_prep",
]


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: torch and OpenCLIP take seconds, which a mistyped command should not cost.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fashionclip_tune import config, training

    return getattr(config if hasattr(config, name) else training, name)
