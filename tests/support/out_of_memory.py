"""Runs that run out of memory where a test wants it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.models.openclip import load_model
from fashionclip_tune.models.precision import plan_precision
from fashionclip_tune.training.trainer import Trainer
from tests.support.trainers import model_config

MESSAGE = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 14.74 GiB\nmore lines"


def trainer_for(config: ProjectConfig) -> Trainer:
    return Trainer(load_model(config), config, total_steps=8, plan=plan_precision(config))


def config_for(tiny_config: ProjectConfig, loss: str = "siglip", **overrides: Any) -> ProjectConfig:
    settings = {
        "training.batch_size": 6,
        "training.budget_examples": None,
        "training.stage_examples": None,
        "training.epsilon": 1e-4,  # else Adam makes a sign of a rounding error, and a step of the sign
        "augmentation.image_strength": 0.5,
        **overrides,
    }
    return model_config(tiny_config, "tiny-clip", loss, **settings)


def fails_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: Sequence[int], *, after: bool = False) -> list[int]:
    """Lets the given calls (from 1) of a function end in out of memory; returns a list that grows with each call."""
    original, seen = getattr(owner, name), list[int]()

    def call(*arguments: Any, **options: Any) -> Any:
        seen.append(len(seen) + 1)
        fatal = seen[-1] in calls
        if fatal and not after:
            raise torch.cuda.OutOfMemoryError(MESSAGE)
        result = original(*arguments, **options)
        if fatal:
            raise torch.cuda.OutOfMemoryError(MESSAGE)
        return result

    monkeypatch.setattr(owner, name, call)
    return seen
