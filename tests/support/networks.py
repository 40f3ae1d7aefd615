"""Small networks, networks without numbers, and what is looked at in them."""

import json
from pathlib import Path


def lite(folder: Path, trunk: str = "tf_efficientnet_lite0") -> str:
    """A folder without weights: a convolutional image tower of timm's, small."""
    text = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    image = {"timm_model_name": trunk, "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    described = {"model_cfg": {"embed_dim": 32, "vision_cfg": image, "text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return f"local-dir:{folder}"
