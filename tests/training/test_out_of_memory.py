"""Runs that run out of memory, at every place of a step, against runs that do not."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import OutOfMemoryError
from fashionclip_tune.models.openclip import load_model
from fashionclip_tune.training.device import ran_out_of_memory
from fashionclip_tune.training.trainer import StageStats, Trainer
from tests.support.out_of_memory import MESSAGE, config_for, fails_at, trainer_for
from tests.support.trainers import CPU, batches, steps, weights


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def in_forward(patch: pytest.MonkeyPatch, trainer: Trainer) -> None:
    fails_at(patch, trainer, "_encode_text", [1])


def in_the_second_chunks_backward(patch: pytest.MonkeyPatch, trainer: Trainer) -> None:
    """With a graph the towers are gone through once a micro-batch; the first tensor's gradient comes last."""
    calls = 0

    def hook(gradient: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.cuda.OutOfMemoryError(MESSAGE)

    trainer.network.visual.conv1.weight.register_hook(hook)


def in_clipping(patch: pytest.MonkeyPatch, trainer: Trainer) -> None:
    fails_at(patch, torch.nn.utils, "clip_grad_norm_", [1], after=True)


def in_allocating_adams_moments(patch: pytest.MonkeyPatch, trainer: Trainer) -> None:
    """Half of them are there already."""
    original, calls = torch.zeros_like, 0

    def zeros_like(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += "memory_format" in options  # so asks the optimizer
        if calls == 31:
            calls = 1000
            raise torch.cuda.OutOfMemoryError(MESSAGE)
        return original(*arguments, **options)

    patch.setattr(torch, "zeros_like", zeros_like)


def in_the_update_before_anything_is_done(patch: pytest.MonkeyPatch, trainer: Trainer) -> None:
    fails_at(patch, trainer._optimizer, "step", [2])  # the first call made the moments


PLACES = [
    in_forward,
    in_the_second_chunks_backward,
    in_clipping,
    in_allocating_adams_moments,
    in_the_update_before_anything_is_done,
]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_ran_out_of_memory_is_done_again_with_half_the_micro_batch(
    tiny_config: ProjectConfig, place: Callable[[pytest.MonkeyPatch, Trainer], None], precision: str
) -> None:
    """From then on it equals, bit for bit, a run that had this micro-batch from the start."""
    overrides = {"hardware.precision": precision, "training.micro_batch_size": 4}
    config = config_for(tiny_config, **overrides)
    given = batches(3, side=40)
    expected = trainer_for(config.with_overrides({"training.micro_batch_size": 2}))
    expected_stats = steps(expected, given)
    trainer = trainer_for(config)
    with pytest.MonkeyPatch.context() as patch:
        place(patch, trainer)
        with pytest.warns(UserWarning, match=r"out of memory at step 1 with a micro-batch of 4: the run goes on with 2 \(CUDA"):
            stats = steps(trainer, given)
    assert (stats.micro_batch_size, stats.loss, stats.skipped_steps) == (2, expected_stats.loss, expected_stats.skipped_steps)
    ours, theirs = weights(trainer), weights(expected)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for one, other in zip(trainer._optimizer.state.values(), expected._optimizer.state.values(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert trainer.state_dict()["scaler"] == expected.state_dict()["scaler"]


@pytest.mark.parametrize("loss", ["contrastive", "siglip"])
def test_the_micro_batch_changes_nothing_but_rounding(tiny_config: ProjectConfig, loss: str) -> None:
    given = batches(4, side=40)
    undisturbed = trainer_for(config_for(tiny_config, loss))
    expected: StageStats = steps(undisturbed, given)
    disturbed = trainer_for(config_for(tiny_config, loss))
    with pytest.MonkeyPatch.context() as patch:
        fails_at(patch, disturbed, "_encode_image", [2, 3])  # 6 to 3 to 2, both at the second step
        with pytest.warns(UserWarning, match="out of memory at step 2"):
            stats = steps(disturbed, given)
    assert disturbed.micro_batch_size == 2
    assert stats.loss == pytest.approx(expected.loss, rel=1e-5)
    assert stats.logit_scale == pytest.approx(expected.logit_scale, rel=1e-6)
    ours, theirs = weights(disturbed), weights(undisturbed)
    moved = weights(trainer_for(config_for(tiny_config, loss)))
    for key in ours:
        difference = (ours[key] - theirs[key]).abs().max()
        assert difference <= 1e-3 * max(1e-3, float((moved[key] - theirs[key]).abs().max())), key


def test_a_micro_batch_of_one_photo_that_does_not_fit_ends_the_run(tiny_config: ProjectConfig) -> None:
    trainer = trainer_for(config_for(tiny_config))
    before = weights(trainer)
    with pytest.MonkeyPatch.context() as patch:
        seen = fails_at(patch, trainer, "_encode_image", range(100))
        reason = r"step 1 with a micro-batch of 1, which cannot be halved: CUDA out of memory"
        with (
            pytest.warns(UserWarning, match="out of memory at step 1") as warned,
            pytest.raises(OutOfMemoryError, match=reason) as caught,
        ):
            steps(trainer, batches(1))
    assert [str(warning.message).split(" (")[0][-1] for warning in warned] == ["3", "2", "1"]
    assert len(seen) == 4  # 6, 3, 2, 1
    assert caught.value.__context__ is None  # whose traceback would hold tensors
    assert trainer.step == 0
    after = weights(trainer)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_an_update_that_is_half_done_is_not_done_again(tiny_config: ProjectConfig) -> None:
    trainer = trainer_for(config_for(tiny_config))
    with pytest.MonkeyPatch.context() as patch:
        fails_at(patch, trainer._optimizer, "step", [2], after=True)
        with pytest.raises(OutOfMemoryError, match=r"in the middle of an update.*resume from a checkpoint"):
            steps(trainer, batches(1))


def test_the_tensors_of_a_failed_attempt_are_gone_before_the_next(tiny_config: ProjectConfig) -> None:
    trainer = trainer_for(config_for(tiny_config))
    alive: list[Any] = []
    encode_image = trainer._encode_image

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        assert not alive or alive[0]() is None
        image_BD = encode_image(*arguments, **options)
        if not alive:
            alive.append(weakref.ref(image_BD))
        return image_BD

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_encode_image", watched)
        fails_at(patch, trainer, "_encode_text", [1])
        with pytest.warns(UserWarning, match="goes on with 3"):
            steps(trainer, batches(1))
    assert len(alive) == 1


def test_the_micro_batch_goes_on_with_the_run(tiny_config: ProjectConfig) -> None:
    config = config_for(tiny_config)
    first = trainer_for(config)
    with pytest.MonkeyPatch.context() as patch:
        fails_at(patch, first, "_encode_image", [1])
        with pytest.warns(UserWarning, match="goes on with 3"):
            steps(first, batches(1))
    for asked, expected in ((None, 3), (1, 1), (5, 3), (100, 3)):
        resumed = trainer_for(config.with_overrides({"training.micro_batch_size": asked}))
        resumed.load_state_dict(first.state_dict())
        assert resumed.micro_batch_size == expected


def test_other_dropout_in_the_model_is_said_to_depend_on_the_micro_batch(tiny_config: ProjectConfig) -> None:
    config = config_for(tiny_config, **{"training.micro_batch_size": 3})
    loaded = load_model(config)
    loaded.network.visual.ln_post = torch.nn.Sequential(loaded.network.visual.ln_post, torch.nn.Dropout(0.1))
    with pytest.warns(UserWarning, match=r"has dropout within \(visual\.ln_post\.1\)"):
        Trainer(loaded, config, 8, CPU)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError(MESSAGE), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), True),
        (RuntimeError(f"OutOfMemoryError: {MESSAGE}"), True),  # as torch._inductor.exc.InductorError has it
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        # torch.AcceleratorError since 2.8, which is a RuntimeError; that before
        (getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb`"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), False),
        (RuntimeError("Triton Error [CUDA]: invalid argument"), False),
        (RuntimeError("out of memory at step 3, which cannot be halved"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUBLAS_STATUS_ALLOC_FAILED"), False),
        (OutOfMemoryError("nothing more to halve: CUBLAS_STATUS_ALLOC_FAILED"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert ran_out_of_memory(error) is expected


def test_an_allocation_that_no_machine_can_serve_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out_of_memory(caught.value)
