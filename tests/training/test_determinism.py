"""Deterministic kernels, on a CPU: it has an operation without one, too (``put_``), and all of torch's switches."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.training.device import StrictPasses, repeatable
from fashionclip_tune.training.trainer import Trainer
from fashionclip_tune.tuning.backend import worker as trainable
from fashionclip_tune.tuning.trial import TrialPlan
from tests.support.out_of_memory import config_for, trainer_for
from tests.support.trainers import batches, steps, weights

SAID = "not repeatable bit for bit, for want of a deterministic kernel: put_"


def put() -> None:
    torch.zeros(3).put_(torch.tensor([1]), torch.tensor([2.0]))


@pytest.fixture(autouse=True)
def usual_mode() -> None:
    assert torch.get_deterministic_debug_mode() == 0


def test_operations_without_a_deterministic_kernel_are_named_once_at_the_end() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with repeatable(True):
            assert torch.is_deterministic_algorithms_warn_only_enabled()
            put()
            warnings.warn("something else", stacklevel=1)
            warnings.warn("Memory Efficient attention defaults to a non-deterministic algorithm. To explicitly", stacklevel=1)
            put()
            assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    other, line = (str(each.message) for each in seen)
    assert other == "something else"
    assert line.startswith(SAID)
    assert line.endswith(", Memory Efficient attention")


def test_who_does_not_want_it_has_torch_as_it_is() -> None:
    with repeatable(False):
        put()
        assert not torch.are_deterministic_algorithms_enabled()
        with StrictPasses().strictly():
            put()


@pytest.mark.parametrize(
    ("message", "gives_way"),
    [
        ("Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)`, but CuBLAS", True),
        ("Using `num_splits_key > 1` makes the algorithm non-deterministic, and pytorch's deterministic mode is enabled", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)  # fmt: skip
def test_what_counts_as_a_refusal(message: str, gives_way: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        passes = StrictPasses()
        assert passes.give_way(RuntimeError(message)) == gives_way
        assert not passes.give_way(RuntimeError(message)), "no step is done again for ever"


def strict_until_refused(patch: pytest.MonkeyPatch) -> list[bool]:
    """Lets the forward pass do what has no deterministic kernel; returns a list that grows by whether each one was strict."""
    encode, strict = Trainer._encode, list[bool]()

    def with_put(self: Trainer, *arguments: Any) -> Any:
        strict.append(not torch.is_deterministic_algorithms_warn_only_enabled())
        put()
        return encode(self, *arguments)

    patch.setattr(Trainer, "_encode", with_put)
    return strict


def test_a_step_that_is_refused_is_done_again_without_strictness(
    tiny_config: ProjectConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny_config)
    expected = trainer_for(config)
    steps(expected, batches(3))
    strict = strict_until_refused(monkeypatch)
    trainer = trainer_for(config)
    with pytest.warns(UserWarning, match=SAID), repeatable(True):
        steps(trainer, batches(3))
    assert strict == [True, False, False, False]
    assert trainer.step == 3
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, weights(expected)[name])


def test_a_trial_says_which_operation_lacks_one(
    tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the device is all that is left out."""
    wanted: list[bool] = []

    def on_a_gpu(is_wanted: bool, device: torch.device) -> Any:
        assert device.type == "cpu"
        wanted.append(is_wanted)
        return repeatable(True)

    reported: list[dict[str, Any]] = []
    monkeypatch.setattr("fashionclip_tune.training.train.repeatable", on_a_gpu)
    monkeypatch.setattr(trainable, "StopPoll", lambda: lambda: False)
    monkeypatch.setattr(trainable.tune, "report", reported.append)
    strict = strict_until_refused(monkeypatch)
    config = tiny_config.with_overrides({"training.epochs": 1})
    monkeypatch.setattr("warnings.filters", [("default", None, Warning, None, 0)])
    trainable.run_trial(TrialPlan(0, str(tmp_path / "trial"), config.to_dict()).to_ray())
    assert wanted == [False], "this is a CPU"
    assert not any("stop_reason" in row for row in reported), reported
    assert strict[0]
    assert not any(strict[1:])
    (line,) = (line for line in (tmp_path / "trial" / "warnings.log").read_text().splitlines() if "repeatable" in line)
    assert line.startswith(SAID)
    assert line.endswith("attention beside it")
