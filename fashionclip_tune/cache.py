"""Where things that can be made again are kept between runs: shard indexes, embedded data, pretrained tiny towers."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$FASHIONCLIP_CACHE``, else ``fashionclip_tune`` below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if chosen := os.environ.get("FASHIONCLIP_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "fashionclip_tune"
