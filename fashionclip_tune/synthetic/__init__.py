"""Synthetic garments: the data of a sweep without ``--data``, and what the tiny towers are pretrained on."""

from fashionclip_tune.synthetic.dataset import COLLECTIONS, RENDERER_VERSION, GarmentRecipe, cached_dataset, render_dataset

__all__ = ["COLLECTIONS", "RENDERER_VERSION", "GarmentRecipe", "cached_dataset", "render_dataset"]
