"""Numbers that go wrong: updates are left out on the device, counted, and end a run when they must."""

import math
from typing import Any

import pytest
import torch

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import DivergedError
from fashionclip_tune.models.precision import plan_precision
from fashionclip_tune.training.stage_metrics import StageSums
from fashionclip_tune.training.trainer import Trainer
from tests.support.trainers import batches, model_config, steps, trainer_for, weights

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def after(
    steps: list[tuple[float, float]], sums: StageSums | None = None, first_step: int = 1
) -> tuple[StageSums, list[float]]:
    """Sums after steps of (loss, gradient norm), and which were skipped."""
    sums, skipped = sums or StageSums.zero(CPU), []
    for step, (loss, norm) in enumerate(steps, first_step):
        sums, skips = sums.plus(step, torch.tensor(loss), torch.tensor(norm), torch.tensor(10.0 + step))
        skipped.append(float(skips))
    return sums, skipped


def test_steps_are_summed_and_those_without_finite_gradients_skipped() -> None:
    sums, skipped = after([(1.0, 2.0), (3.0, math.inf), (5.0, math.nan), (7.0, 0.0)])
    assert skipped == [0, 1, 1, 0]
    assert (sums.mean_loss, float(sums.skipped), float(sums.skipped_in_a_row)) == (4.0, 2.0, 0.0)
    sums.check(4, {})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_loss_that_is_no_number_is_reported_with_its_step_scale_and_keys(bad: float) -> None:
    sums, skipped = after([(1.0, 1.0), (bad, 1.0), (2.0, 1.0), (math.nan, 1.0)], first_step=101)
    assert skipped == [0, 1, 0, 1]
    with pytest.raises(DivergedError, match=rf"^the loss is {bad} at step 102, logit scale 112; its batch: a, b$"):
        sums.check(104, {101: ("x",), 102: ("a", "b"), 103: ("y",)})
    keys = tuple(f"k{number}" for number in range(100))
    with pytest.raises(DivergedError, match=r"k0, k1, .*, k63 and 36 more$"):
        sums.check(104, {102: keys})


def test_gradients_that_stay_infinite_for_twenty_steps_end_the_run_stages_before_included() -> None:
    sums, _ = after([(1.0, math.inf)] * 12)
    sums.check(12, {})
    sums, _ = after([(1.0, math.inf)] * 7, sums.next_stage())
    assert (sums.num_steps, float(sums.skipped)) == (7, 7.0)
    sums.check(19, {})
    twenty, _ = after([(1.5, math.inf)], sums)
    with pytest.raises(DivergedError, match=r"the last 20 steps up to step 20 are not finite.*\(loss 1\.062\)"):
        twenty.check(20, {})
    one_good, _ = after([(1.0, 1.0)] + [(1.0, math.inf)] * 19, sums)
    one_good.check(20, {})


def test_sums_go_through_a_state(tmp_path: Any) -> None:
    sums, _ = after([(0.1, 1.0), (0.2, math.inf)])
    torch.save(sums.state_dict(), tmp_path / "state")
    again = StageSums.from_state(torch.load(tmp_path / "state", weights_only=True), CPU)
    for one, other in zip(vars(sums).values(), vars(again).values(), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def breaks(monkeypatch: pytest.MonkeyPatch, at_step: int, factor: float) -> None:
    """The loss of one step (from 1), times a factor."""
    original = Trainer._loss

    def loss(self: Any, *arguments: Any) -> torch.Tensor:
        return original(self, *arguments) * (factor if self.step == at_step - 1 else 1)

    monkeypatch.setattr(Trainer, "_loss", loss)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_loss_that_is_no_number_poisons_no_weight(
    tiny_config: ProjectConfig, monkeypatch: pytest.MonkeyPatch, precision: str, micro_batch_size: int | None
) -> None:
    """The step leaves weights, moments and Adam's count as they were; the run ends when the flag is read."""
    overrides = {"hardware.precision": precision, "training.micro_batch_size": micro_batch_size, "training.batch_size": 6}
    config = tiny_config.with_overrides({**overrides, "training.budget_examples": None, "training.stage_examples": None})
    trainer = trainer_for(config, plan=plan_precision(config))
    given = batches(2)
    steps(trainer, given[:1])
    before = weights(trainer)
    moments = [{name: value.clone() for name, value in state.items()} for state in trainer._optimizer.state.values()]
    breaks(monkeypatch, 2, math.nan)
    with pytest.raises(DivergedError, match=r"the loss is nan at step 2, logit scale 14\.\d+; its batch: 1-0, 1-1"):
        steps(trainer, given[1:])
    after_it = weights(trainer)
    assert all(torch.equal(after_it[key], before[key]) for key in before)
    for state, moment in zip(trainer._optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(state[name], moment[name]) for name in moment)


def test_a_step_whose_gradients_overflow_is_left_out_and_counted(
    tiny_config: ProjectConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, where no GradScaler looks: the loss is finite, its gradients are not."""
    trainer, given = trainer_for(tiny_config), batches(3)
    original = Trainer._loss

    def loss(self: Any, *arguments: Any) -> torch.Tensor:
        value = original(self, *arguments)
        # The gradient of the square root at zero is infinite.
        return value + (self.network.logit_scale * 0).sqrt() if self.step == 1 else value

    monkeypatch.setattr(Trainer, "_loss", loss)
    steps(trainer, given[:1])
    before = weights(trainer)
    stats = steps(trainer, given[1:2])
    assert stats.skipped_steps == 1
    assert math.isfinite(stats.loss)
    now = weights(trainer)
    assert all(torch.equal(now[key], before[key]) for key in before)
    assert steps(trainer, given[2:]).skipped_steps == 0
    assert not torch.equal(weights(trainer)["visual.conv1.weight"], before["visual.conv1.weight"])


def test_steps_that_grad_scaler_skips_are_counted_and_the_scale_comes_down(
    tiny_config: ProjectConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss a hundred times as large, times the first scale of 2**16, is beyond fp16's range; halved a few times it fits."""
    config = model_config(tiny_config, "tiny-clip", "contrastive", **{"hardware.precision": "fp16"})
    trainer = trainer_for(config, plan=plan_precision(config))
    original = Trainer._loss
    monkeypatch.setattr(Trainer, "_loss", lambda self, *arguments: original(self, *arguments) * 100)
    stats = steps(trainer, batches(1) * 12)
    scale = trainer.state_dict()["scaler"]["scale"]
    assert 0 < stats.skipped_steps < 12
    assert scale == 2.0 ** (16 - stats.skipped_steps)
    assert all(float(state["step"]) == 12 - stats.skipped_steps for state in trainer._optimizer.state.values())
    assert steps(trainer, batches(1)).skipped_steps == 0


def test_gradients_that_overflow_at_every_scale_end_the_run_as_diverged(
    tiny_config: ProjectConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config.with_overrides({"hardware.precision": "fp16"})
    trainer = trainer_for(config, plan=plan_precision(config), total_steps=100)
    original = Trainer._loss
    monkeypatch.setattr(Trainer, "_loss", lambda self, *arguments: original(self, *arguments) * 1e9)
    steps(trainer, batches(1) * 19)
    with pytest.raises(DivergedError, match="the gradients of the last 20 steps up to step 20 are not finite"):
        steps(trainer, batches(1))
