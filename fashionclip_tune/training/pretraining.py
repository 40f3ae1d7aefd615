"""Pretrains the tiny towers once, so that a default sweep truly fine-tunes: a zero-shot level, something to forget."""

import logging
import multiprocessing
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from filelock import FileLock

from fashionclip_tune.config.options import TrainingConfig
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.files import cache_dir
from fashionclip_tune.machine.child_processes import call_ending_with_parent
from fashionclip_tune.models.openclip import export_openclip, load_model, load_weights
from fashionclip_tune.models.tiny import (
    PRETRAINING_EXAMPLES,
    PRETRAINING_LOSSES,
    PRETRAINING_PRODUCTS,
    PRETRAINING_SEED,
    PRETRAINING_SETTINGS,
    PRETRAINING_VIEWS,
    TINY_MODELS,
    pretrained_tiny_dir,
)
from fashionclip_tune.progress import progress_bar
from fashionclip_tune.storage.checkpoint import newest_weights
from fashionclip_tune.synthetic import GarmentRecipe, cached_dataset
from fashionclip_tune.training.callbacks import RunCallbacks
from fashionclip_tune.training.train import run_training

_log = logging.getLogger(__name__)

_SHOWN_EVERY_S = 0.5
_COUNT_STEPS_IN = f"{__name__}:_count_steps_in"


def pretrain_missing(models: Sequence[str]) -> None:
    """Makes the weights of those tiny models that have none yet, one process a model, about a minute on two cores."""
    missing = [name for name in models if name in TINY_MODELS and not pretrained_tiny_dir(name).is_dir()]
    if not missing:
        return
    what = f"pretraining {' and '.join(missing)}"
    _log.info(f"{what} on synthetic garments: once, about a minute on two cores")
    recipe = GarmentRecipe(
        collection="pretraining",
        num_products=PRETRAINING_PRODUCTS,
        views_per_product=PRETRAINING_VIEWS,
        seed=PRETRAINING_SEED,
    )
    with progress_bar("rendering garments to pretrain on") as on_progress:
        data = cached_dataset(recipe, cache_dir(), on_progress=on_progress)
    # Fresh processes: each has one thread of its own, and none inherits what this one has loaded.
    context = multiprocessing.get_context("spawn")
    steps_begun = context.Value("l", 0)
    with (
        ProcessPoolExecutor(
            len(missing), mp_context=context, initializer=call_ending_with_parent, initargs=(_COUNT_STEPS_IN, steps_begun)
        ) as pool,
        progress_bar(what) as on_progress,
    ):
        running = [pool.submit(_pretrain, name, data) for name in missing]
        while wait(running, _SHOWN_EVERY_S).not_done:
            on_progress(steps_begun.value, len(missing) * PRETRAINING_EXAMPLES // TrainingConfig().batch_size)
        for each in running:
            each.result()


_steps_begun: Any = None


def _count_steps_in(counter: Any) -> None:
    """In a process that pretrains: where its steps are counted, with those of the others."""
    global _steps_begun
    _steps_begun = counter


def _count_step(what: str, done: int, total: int) -> None:
    if what == "training" and _steps_begun is not None:
        with _steps_begun.get_lock():
            _steps_begun.value += 1


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
                "training.edition": 1,  # weights of the same name are the same bits
            }
        )
        run_dir = target.with_name(f"{target.name}.run")
        shutil.rmtree(run_dir, ignore_errors=True)  # of an earlier process that was killed
        run_training(config, run_dir, RunCallbacks(on_progress=_count_step))
        loaded = load_model(config)
        weights = newest_weights(run_dir)
        assert weights is not None
        load_weights(loaded.network, weights)
        unfinished = target.with_name(f"{target.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        export_openclip(loaded, unfinished)
        unfinished.rename(target)
        shutil.rmtree(run_dir)
