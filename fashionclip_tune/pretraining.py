"""Pretrains the tiny towers once, so that a default sweep truly fine-tunes: a zero-shot level, something to forget."""

import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from filelock import FileLock

from fashionclip_tune.cache import cache_dir
from fashionclip_tune.checkpoint import newest_weights
from fashionclip_tune.config import ProjectConfig
from fashionclip_tune.model import export_openclip, load_model, load_weights
from fashionclip_tune.synthetic import GarmentRecipe, cached_dataset
from fashionclip_tune.tiny import (
    PRETRAINING_EXAMPLES,
    PRETRAINING_LOSSES,
    PRETRAINING_PRODUCTS,
    PRETRAINING_SEED,
    PRETRAINING_SETTINGS,
    PRETRAINING_VIEWS,
    TINY_MODELS,
    pretrained_tiny_dir,
)
from fashionclip_tune.training import train


def pretrain_missing(models: Sequence[str], say: Callable[[str], None]) -> None:
    """Makes the weights of those tiny models that have none yet, one process a model, about a minute on two cores."""
    missing = [name for name in models if name in TINY_MODELS and not pretrained_tiny_dir(name).is_dir()]
    if not missing:
        return
    say(f"pretraining {' and '.join(missing)} on synthetic garments: once, about a minute on two cores")
    recipe = GarmentRecipe(
        collection="pretraining",
        num_products=PRETRAINING_PRODUCTS,
        views_per_product=PRETRAINING_VIEWS,
        seed=PRETRAINING_SEED,
    )
    data = cached_dataset(recipe, cache_dir())
    # Fresh processes: each has one thread of its own, and none inherits what this one has loaded.
    with ProcessPoolExecutor(len(missing), mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_pretrain, missing, [data] * len(missing)))


def _pretrain(name: str, data: Path) -> None:
    target = pretrained_tiny_dir(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():  # made by another process while this one waited
            return
        config = ProjectConfig(clip_model=name, device="cpu", dataset_root=data).with_overrides(
            {
                **PRETRAINING_SETTINGS,
                "loss_function": PRETRAINING_LOSSES[name],
                "training.budget_examples": PRETRAINING_EXAMPLES,
                "training.stage_examples": PRETRAINING_EXAMPLES,
            }
        )
        run_dir = target.with_name(f"{target.name}.run")
        shutil.rmtree(run_dir, ignore_errors=True)  # of an earlier process that was killed
        train(config, run_dir)
        loaded = load_model(config)
        weights = newest_weights(run_dir)
        assert weights is not None
        load_weights(loaded.network, weights)
        unfinished = target.with_name(f"{target.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        export_openclip(loaded, unfinished)
        unfinished.rename(target)
        shutil.rmtree(run_dir)
