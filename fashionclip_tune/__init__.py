"""The best fashion image-text retriever that one cheap GPU can give you, and the proof that it is the best."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fashionclip_tune.config.choices import ClipModelOptions, LossFunctionOptions
    from fashionclip_tune.config.options import TrainingConfig
    from fashionclip_tune.config.project import ProjectConfig
    from fashionclip_tune.training.callbacks import TrainResult
    from fashionclip_tune.training.train import train, training_prep

_MODULES = {
    "ClipModelOptions": "config.choices",
    "LossFunctionOptions": "config.choices",
    "ProjectConfig": "config.project",
    "TrainResult": "training.callbacks",
    "TrainingConfig": "config.options",
    "train": "training.train",
    "training_prep": "training.train",
}
__all__ = [
    "ClipModelOptions",
    "LossFunctionOptions",
    "ProjectConfig",
    "TrainResult",
    "TrainingConfig",
    "train",
    "training_prep",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: torch and OpenCLIP take seconds, which a mistyped command should not cost.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
