"""The fine-tuning loop: one step, one stage, and the state that a checkpoint holds. Knows no files and no callers."""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fashionclip_tune.config.choices import LossFunctionOptions, PositivePairs
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.batches import TrainBatch
from fashionclip_tune.errors import OutOfMemoryError
from fashionclip_tune.losses import Positives, fitted_logit_bias, info_nce, sigmoid_bce
from fashionclip_tune.models.batch_norms import check_one_pass, moving_statistics, needs_one_pass, warn_of_statistics
from fashionclip_tune.models.openclip import LoadedModel
from fashionclip_tune.models.precision import PrecisionPlan
from fashionclip_tune.models.sequences import causal_text, share_patch_draws, tied_to_micro_batch
from fashionclip_tune.models.towers import encoders, is_vision_transformer, prepare_towers
from fashionclip_tune.seeds import Stream, torch_seed
from fashionclip_tune.training.batch_inputs import BatchInputs, Transfer, prepare_inputs
from fashionclip_tune.training.device import StrictPasses, free_memory, ran_out_of_memory
from fashionclip_tune.training.grad_cache import backward_whole_batch
from fashionclip_tune.training.optimizer import WeightAverage, build_optimizer, learning_rate_factor
from fashionclip_tune.training.stage_metrics import StageSums

# CLIP kept its scale at or below 100 in training, "to prevent training instability" (Radford et al. 2021, section 2.5).
_MAX_LOG_SCALE = math.log(100)


@dataclass(frozen=True)
class StageStats:
    """Statistics of one stage."""

    loss: float
    """Mean over the steps."""
    learning_rate: float
    """Of the last step: ``training.learning_rate`` on its schedule."""
    logit_scale: float
    logit_bias: float | None
    micro_batch_size: int
    """At the end: halved whenever memory ran out."""
    skipped_steps: int
    """Updates left out because a gradient was not finite; now and then, fp16's loss scaling does so."""
    samples_per_second: float


class Trainer:
    """Trains one model; what step k does depends on (configuration, seed, k, state) only.

    The network, optimizer and scaler live on the plan's device. ``step`` counts finished optimizer steps.
    ``micro_batch_size``: photos encoded at a time; it changes nothing but rounding, and is halved when memory runs out.

    Raises:
        UserError: the model or the machine lacks what an option needs.
    """

    def __init__(self, loaded: LoadedModel, config: ProjectConfig, total_steps: int, plan: PrecisionPlan) -> None:
        self.network: Any = loaded.network.to(plan.device).train()
        self.step = 0
        training = config.training
        self.micro_batch_size = min(training.micro_batch_size or training.batch_size, training.batch_size)
        self._loaded = loaded
        self._config = config
        self._total_steps = total_steps
        self._plan = plan
        prepare_towers(self.network, config)
        check_one_pass(self.network, config)
        self._patches = share_patch_draws(self.network)
        # Photos come pixel by pixel, and keep that order. Convolutions would go on in it, in which depthwise ones of torch
        # corrupt memory on a CPU.
        self._takes_any_layout = is_vision_transformer(self.network)
        self._optimizer: Any = build_optimizer(self.network, training, config.optimizer)
        decay, statistics = config.optimizer.ema_decay, moving_statistics(self.network, config)
        self._average = WeightAverage(self.network, decay, statistics) if decay is not None else None
        self._causal_text = text = causal_text(self.network) if training.edition >= 2 else None
        compiled = config.hardware.compile
        self._encode_image, self._encode_text = encoders(self.network, plan.device, compiled=compiled, text=text)
        self._scaler = self._new_scaler()
        self._passes = StrictPasses()
        self._transfer = Transfer(plan.device)
        self._sums = StageSums.zero(plan.device)
        self._keys_of_step: dict[int, tuple[str, ...]] = {}
        if self.micro_batch_size < training.batch_size:
            self._warn_of_chance()
        warn_of_statistics(self.network, config)

    def run_stage(
        self,
        batches: Iterator[TrainBatch],
        num_steps: int,
        on_batch: Callable[[TrainBatch], None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> StageStats | None:
        """Trains ``num_steps`` steps, the rest of a stage.

        Returns:
            Statistics of the whole stage; None if ``should_stop`` ended it before, at a step's border: ``state_dict``
            then holds what has been summed up.

        Raises:
            DivergedError: the loss became NaN or infinite in this stage, or no update is possible any more.
            OutOfMemoryError: there is not enough memory for one photo at a time.
        """
        started = time.perf_counter()
        last_step, num_examples = self.step + num_steps, 0
        while self.step < last_step and not should_stop():
            batch = next(batches)
            on_batch(batch)
            self._train_step(batch)
            num_examples += len(batch.keys)
        self._sums.check(self.step, self._keys_of_step)
        self._keys_of_step.clear()
        if self.step < last_step:
            return None
        bias = getattr(self.network, "logit_bias", None)
        stats = StageStats(
            loss=self._sums.mean_loss,
            learning_rate=self._config.training.learning_rate * self._rate_factor(self.step - 1),
            logit_scale=float(self.network.logit_scale.detach().exp()),
            logit_bias=None if bias is None else float(bias.detach()),
            micro_batch_size=self.micro_batch_size,
            skipped_steps=int(self._sums.skipped),
            samples_per_second=num_examples / (time.perf_counter() - started),
        )
        self._sums = self._sums.next_stage()
        return stats

    def _train_step(self, batch: TrainBatch) -> None:
        """One optimizer step; where memory runs out, the same one with half the micro-batch; where a GPU has no deterministic
        kernel, the same one with what it has.

        Everything before the update can be done again as if it had not been, and the update itself needs no memory.
        """
        while True:
            try:
                self._attempt_step(batch)
                return
            except RuntimeError as error:
                if self._passes.give_way(error):
                    continue
                if not ran_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            # Here the error is gone, and with its traceback the tensors of the failed attempt.
            self._shrink_micro_batch(reason)

    def _attempt_step(self, batch: TrainBatch) -> None:
        training = self._config.training
        if not self._optimizer.state:
            self._allocate_optimizer_state()
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_rate"] * self._rate_factor(self.step)
        self._patches.begin_step(torch_seed(training.seed, Stream.PATCHES, self.step), len(batch.keys))
        inputs = prepare_inputs(batch, self._config, self._loaded.preprocessing, self.step, self._transfer, self._causal_text)
        self._optimizer.zero_grad(set_to_none=True)
        with self._passes.strictly():
            loss = backward_whole_batch(
                lambda rows: self._encode(inputs, rows),
                lambda image_BD, text_BD: self._loss(image_BD, text_BD, inputs.positives_BB),
                self._scaler.scale,
                batch_size=len(batch.keys),
                micro_batch_size=self.micro_batch_size,
            )
        self._scaler.unscale_(self._optimizer)
        max_norm = math.inf if training.max_grad_norm is None else training.max_grad_norm
        grad_norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), max_norm)
        logit_scale = self.network.logit_scale.detach().float().exp()
        sums, skips = self._sums.plus(self.step + 1, loss, grad_norm, logit_scale)
        self._update(skips)
        self.step += 1
        self._sums = sums
        self._keys_of_step[self.step] = batch.keys

    def _update(self, skips: Tensor) -> None:
        """A flag on the device leaves the update out: AdamW's kernel reads it there, and nothing waits for it."""
        if not self._scaler.is_enabled():  # an enabled one sets the same two attributes
            if not self._optimizer.defaults["fused"] and bool(skips):
                return  # other kernels know no flag: this waits for the device
            self._optimizer.grad_scale, self._optimizer.found_inf = None, skips
        first_state = next(iter(self._optimizer.state.values()))
        updates_before = first_state["step"].clone()
        try:
            self._scaler.step(self._optimizer)
            self._scaler.update()
            if self._loaded.clamps_logit_scale:
                with torch.no_grad():
                    self.network.logit_scale.clamp_(0, _MAX_LOG_SCALE)
            if self._average is not None:
                self._average.update()
        except RuntimeError as error:
            if not ran_out_of_memory(error) or torch.equal(first_state["step"], updates_before):
                raise
            message = "out of memory in the middle of an update: the weights are neither old nor new, resume from a checkpoint"
            raise OutOfMemoryError(message) from None

    def _allocate_optimizer_state(self) -> None:
        """Adam's moments are made before the first step, so that memory cannot run out within an update.

        A step with zero gradients at rate zero makes them and changes no weight.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        try:
            self._optimizer.step()
        except RuntimeError:
            self._optimizer.state.clear()
            raise
        for state in self._optimizer.state.values():
            state["step"].zero_()

    def _shrink_micro_batch(self, reason: str) -> None:
        self.free_gradients()
        # The old one may be in the middle of a step.
        scaler_state = self._scaler.state_dict()
        self._scaler = self._new_scaler()
        self._scaler.load_state_dict(scaler_state)
        where = f"out of memory at step {self.step + 1} with a micro-batch of {self.micro_batch_size}"
        if self.micro_batch_size == 1:
            raise OutOfMemoryError(f"{where}, which cannot be halved: {reason}")
        if needs_one_pass(self.network, self._config):
            cure = "set model.batch_norm=fixed, or a smaller training.batch_size"
            raise OutOfMemoryError(f"{where}, which model.batch_norm = update does not let be halved ({reason}): {cure}")
        self.micro_batch_size = (self.micro_batch_size + 1) // 2
        warnings.warn(f"{where}: the run goes on with {self.micro_batch_size} ({reason})", stacklevel=4)
        self._warn_of_chance()

    def free_gradients(self) -> None:
        """Gives back what is not needed between steps."""
        self._optimizer.zero_grad(set_to_none=True)
        free_memory()

    def _warn_of_chance(self) -> None:
        if names := tied_to_micro_batch(self.network):
            warnings.warn(
                f"{self._loaded.name} has dropout within ({', '.join(names[:3])}): what it computes depends on the micro-batch",
                stacklevel=5,
            )

    def _new_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self._plan.device.type, enabled=self._plan.needs_grad_scaler)

    def _encode(self, inputs: BatchInputs, rows: slice) -> tuple[Tensor, Tensor]:
        """Image and text embeddings, normalised, float32: [B, D] each for the B rows."""
        # Dropout and the like draw from the global generator: tie it to the step, so that a resumed run draws the same,
        # and to the rows, so that they do when they are encoded again.
        torch.manual_seed(torch_seed(self._config.training.seed, Stream.MODEL, self.step, rows.start))
        self._patches.choose(rows)
        images_BCHW, tokens_BL = inputs.images(rows), inputs.tokens_BL[rows]
        if not self._takes_any_layout:
            images_BCHW = images_BCHW.contiguous()
        with self._plan.autocast():
            image_BD = self._encode_image(images_BCHW, normalize=True)
            text_BD = self._encode_text(tokens_BL, normalize=True)
        return image_BD.float(), text_BD.float()

    def _rate_factor(self, step: int) -> float:
        return learning_rate_factor(step, self._total_steps, self._config.schedule)

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
        if self._config.loss_function is LossFunctionOptions.CONTRASTIVE:
            return info_nce(image_BD, text_BD, scale, positives_BB, treatment)
        raise NotImplementedError(self._config.loss_function)

    def averaged(self) -> AbstractContextManager[None]:
        """Within the block the network has the weights that count: the average of ``optimizer.ema_decay``, if there is one."""
        return self._average.in_place() if self._average is not None else nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """All but the weights that count; where those are an average, the trained ones too. Valid after any step."""
        return {
            "step": self.step,
            "micro_batch_size": self.micro_batch_size,
            "stage": self._sums.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "raw_weights": self._average.raw_weights() if self._average is not None else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Into a trainer whose network was loaded with the weights that count."""
        self.step = state["step"]
        # What fitted goes on, but for a smaller one that is asked for now (a smaller card).
        self.micro_batch_size = min(self.micro_batch_size, state["micro_batch_size"])
        self._sums = StageSums.from_state(state["stage"], self._plan.device)
        self._optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the run had none: it may go on, scaled, on a card without bf16
            self._scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            self._average.restore(state["raw_weights"])
