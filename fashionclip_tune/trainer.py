"""The fine-tuning loop: one step, one stage, and the state that a checkpoint holds. Knows no files and no callers."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fashionclip_tune.augment import augment, draw_augmentation
from fashionclip_tune.compilation import encoders
from fashionclip_tune.config import LossFunctionOptions, ProjectConfig
from fashionclip_tune.data import TrainBatch
from fashionclip_tune.errors import DivergedError
from fashionclip_tune.losses import Positives, fitted_logit_bias, info_nce, positive_pairs, sigmoid_bce
from fashionclip_tune.model import LoadedModel
from fashionclip_tune.optim import build_optimizer
from fashionclip_tune.precision import PrecisionPlan
from fashionclip_tune.recipe import PositivePairs
from fashionclip_tune.schedules import learning_rate_factor
from fashionclip_tune.seeds import Stream, torch_seed
from fashionclip_tune.towers import prepare_towers
from fashionclip_tune.weight_average import WeightAverage

# CLIP kept its scale at or below 100 in training, "to prevent training instability" (Radford et al. 2021, section 2.5).
_MAX_LOG_SCALE = math.log(100)


@dataclass(frozen=True)
class StageStats:
    """Of the steps since the last evaluation."""

    loss: float
    """Mean over the steps."""
    learning_rate: float
    """Of the last step: ``training.learning_rate`` on its schedule."""
    logit_scale: float
    logit_bias: float | None
    samples_per_second: float


class Trainer:
    """Trains one model; what step k does depends on (configuration, seed, k, state) only.

    The network, optimizer and scaler live on the plan's device. ``step`` counts finished optimizer steps.

    Raises:
        UserError: the model or the machine lacks what an option needs.
    """

    def __init__(self, loaded: LoadedModel, config: ProjectConfig, total_steps: int, plan: PrecisionPlan) -> None:
        self.network: Any = loaded.network.to(plan.device).train()
        self.step = 0
        self._loaded = loaded
        self._config = config
        self._total_steps = total_steps
        self._plan = plan
        prepare_towers(self.network, config)
        self._optimizer = build_optimizer(self.network, config.training, config.optimizer)
        decay = config.optimizer.ema_decay
        self._average = WeightAverage(self.network, decay) if decay is not None else None
        self._encode_image, self._encode_text = encoders(self.network, plan.device, compiled=config.hardware.compile)
        self._scaler = torch.amp.GradScaler(plan.device.type, enabled=plan.needs_grad_scaler)

    def run_stage(self, batches: Iterator[TrainBatch], num_steps: int, on_batch: Callable[[TrainBatch], None]) -> StageStats:
        """Trains ``num_steps`` steps.

        Raises:
            DivergedError: the loss became NaN or infinite in this stage.
        """
        started = time.perf_counter()
        # Summed on the device: reading each loss would make the GPU wait for the CPU at each step.
        loss_sum = torch.zeros((), device=self._plan.device)
        num_examples = 0
        for _ in range(num_steps):
            batch = next(batches)
            on_batch(batch)
            loss_sum += self._train_step(batch)
            num_examples += len(batch.keys)
        loss = float(loss_sum) / num_steps
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} within the {num_steps} steps up to step {self.step}")
        bias = getattr(self.network, "logit_bias", None)
        return StageStats(
            loss=loss,
            learning_rate=self._config.training.learning_rate * self._rate_factor(self.step - 1),
            logit_scale=float(self.network.logit_scale.detach().exp()),
            logit_bias=None if bias is None else float(bias.detach()),
            samples_per_second=num_examples / (time.perf_counter() - started),
        )

    def _train_step(self, batch: TrainBatch) -> Tensor:
        training = self._config.training
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_rate"] * self._rate_factor(self.step)
        # Dropout and the like draw from the global generator: tie it to the step, so that a resumed run draws the same.
        torch.manual_seed(torch_seed(training.seed, Stream.MODEL, self.step))

        images_BCHW = self._model_input(batch)
        tokens_BL = batch.tokens_BL.to(self._plan.device, non_blocking=True)
        with self._plan.autocast():
            image_BD = self._encode_image(images_BCHW, normalize=True)
            text_BD = self._encode_text(tokens_BL, normalize=True)
        loss = self._loss(image_BD.float(), text_BD.float(), self._positives(batch))

        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        if training.max_grad_norm is not None:
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), training.max_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._loaded.clamps_logit_scale:
            with torch.no_grad():
                self.network.logit_scale.clamp_(0, _MAX_LOG_SCALE)
        if self._average is not None:
            self._average.update()
        self.step += 1
        return loss.detach()

    def _model_input(self, batch: TrainBatch) -> Tensor:
        preprocessing, wanted = self._loaded.preprocessing, self._config.augmentation
        canvases_BCHW = batch.images_BCHW.to(self._plan.device, non_blocking=True)
        if wanted.image_strength == 0:
            return preprocessing.normalise(preprocessing.resize_canvas(canvases_BCHW).float() / 255)
        draws = draw_augmentation(
            len(canvases_BCHW),
            wanted.image_strength,
            torch.Generator().manual_seed(torch_seed(self._config.training.seed, Stream.AUGMENTATION, self.step)),
            rand_augment=wanted.rand_augment,
            erasing=wanted.erasing,
        )
        return preprocessing.normalise(augment(canvases_BCHW, draws, preprocessing.size))

    def _rate_factor(self, step: int) -> float:
        return learning_rate_factor(step, self._total_steps, self._config.schedule)

    def _positives(self, batch: TrainBatch) -> Tensor | None:
        if self._config.loss.positives is PositivePairs.PAIR:
            return None
        return positive_pairs(batch.products_B, batch.tokens_BL).to(self._plan.device, non_blocking=True)

    def _loss(self, image_BD: Tensor, text_BD: Tensor, positives_BB: Tensor | None) -> Tensor:
        scale = self.network.logit_scale.exp()
        treatment: Positives = "mask" if self._config.loss.positives is PositivePairs.MASK else "all"
        if self._config.loss_function is LossFunctionOptions.SIGLIP:
            if self._loaded.fits_logit_bias and self.step == 0:
                with torch.no_grad():
                    bias = fitted_logit_bias(image_BD, text_BD, scale, positives_BB, treatment)
                    self.network.logit_bias.copy_(bias)
                if self._average is not None:
                    self._average.start()
            return sigmoid_bce(image_BD, text_BD, scale, self.network.logit_bias, positives_BB, treatment)
        return info_nce(image_BD, text_BD, scale, positives_BB, treatment)

    def averaged(self) -> AbstractContextManager[None]:
        """Within the block the network has the weights that count: the average of ``optimizer.ema_decay``, if there is one."""
        return self._average.in_place() if self._average is not None else nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """All but the weights that count; where those are an average, the trained ones too."""
        return {
            "step": self.step,
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "raw_weights": self._average.raw_weights() if self._average is not None else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Into a trainer whose network was loaded with the weights that count."""
        self.step = state["step"]
        self._optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the run had none: it may go on, scaled, on a card without bf16
            self._scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            self._average.restore(state["raw_weights"])
