"""Small trainers, the batches that they are given, and their steps and weights."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.batches import TrainBatch
from fashionclip_tune.models.openclip import load_model
from fashionclip_tune.models.precision import PrecisionPlan
from fashionclip_tune.training.trainer import Trainer

CPU = PrecisionPlan(torch.device("cpu"), None)
TOTAL_STEPS = 8


def batches(count: int, *, batch_size: int = 6, side: int = 32) -> list[TrainBatch]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for number in range(count):
        images_BCHW = torch.randint(0, 256, (batch_size, 3, side, side), generator=generator, dtype=torch.uint8)
        tokens_BL = torch.randint(1, 40_000, (batch_size, 32), generator=generator)
        tokens_BL[:, 0], tokens_BL[:, 20], tokens_BL[:, 21:] = 49406, 49407, 0
        keys = tuple(f"{number}-{slot}" for slot in range(batch_size))
        made.append(TrainBatch(images_BCHW, tokens_BL, torch.arange(batch_size), keys, ()))
    return made


def trainer_for(config: ProjectConfig, **changes: Any) -> Trainer:
    return Trainer(load_model(config), config, **{"total_steps": TOTAL_STEPS, "plan": CPU, **changes})


def steps(trainer: Trainer, given: Sequence[TrainBatch]) -> Any:
    return trainer.run_stage(iter(given), len(given), lambda batch: None)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().clone() for key, tensor in trainer.network.state_dict().items()}


def model_config(tiny_config: ProjectConfig, name: str, loss: str, **overrides: Any) -> ProjectConfig:
    return replace(tiny_config, clip_model=name, loss_function=loss).with_overrides(overrides)
