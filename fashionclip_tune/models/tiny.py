"""Two tiny OpenCLIP towers that learn on a CPU core, and where their pretrained weights lie.

``tiny-clip`` is built like ViT-B-32 (class token, causal text tower, no logit bias), ``tiny-sig`` after SigLIP (average
pooling, text that sees both ways, a logit bias of its own). Both take photos of 32 x 32 pixels in patches of 8.
(OpenCLIP gives every architecture with "siglip" in its name a tokenizer from the hub: hence the short name.)
"""

import hashlib
import json
from functools import cache
from pathlib import Path

import open_clip

from fashionclip_tune.files import cache_dir
from fashionclip_tune.synthetic import RENDERER_VERSION

TINY_MODELS = ("tiny-clip", "tiny-sig")
# The whole photo: garments are taller than wide, and a centre crop would cut collars and hems off.
TINY_PREPROCESSING = {
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "resize_mode": "squash",
    "interpolation": "bicubic",
}

# Recipe of the weights that a sweep starts from: garments of another collection than those of the sweep.
PRETRAINING_SEED = 2026
PRETRAINING_PRODUCTS = 3_000
PRETRAINING_VIEWS = 2
PRETRAINING_EXAMPLES = 24_576
PRETRAINING_SETTINGS = {
    "model.pretrained": None,
    "training.learning_rate": 1e-3,
    "training.num_workers": 0,
    "training.seed": PRETRAINING_SEED,
    "augmentation.caption": "uniform",
    "augmentation.image_strength": 0.3,
    "hardware.threads": 1,
}
PRETRAINING_LOSSES = {"tiny-clip": "contrastive", "tiny-sig": "siglip"}


@cache
def register_tiny_models() -> None:
    """Makes the tiny towers known to OpenCLIP in this process."""
    open_clip.add_model_config(Path(__file__).parent / "configs")


def pretrained_tiny_dir(model_name: str) -> Path:
    """Folder of the pretrained weights, named by everything that they depend on; may not exist yet."""
    register_tiny_models()
    data = [RENDERER_VERSION, PRETRAINING_SEED, PRETRAINING_PRODUCTS, PRETRAINING_VIEWS]
    training = [PRETRAINING_EXAMPLES, PRETRAINING_SETTINGS, PRETRAINING_LOSSES[model_name]]
    text = json.dumps([open_clip.get_model_config(model_name), TINY_PREPROCESSING, data, training], sort_keys=True)
    return cache_dir() / "pretrained" / f"{model_name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
