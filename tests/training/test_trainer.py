"""One step against a loop written out by hand, and the state that a checkpoint holds."""

import copy
import io
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.batches import TrainBatch
from fashionclip_tune.errors import DivergedError
from fashionclip_tune.losses import info_nce, sigmoid_bce
from fashionclip_tune.models.openclip import load_model, load_random_model
from fashionclip_tune.models.precision import plan_precision
from fashionclip_tune.training.batch_inputs import prepare_inputs
from fashionclip_tune.training.optimizer import learning_rate_factor
from fashionclip_tune.training.trainer import Trainer
from tests.support.networks import lite
from tests.support.trainers import CPU, TOTAL_STEPS, batches, model_config, steps, trainer_for, weights


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def by_hand(config: ProjectConfig, given: Sequence[TrainBatch]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Warm-up of 2 of 8 steps and half a cosine, clipping at 0.5, AdamW, decay on matrices, open_clip's losses."""
    loaded = load_model(config)
    network: Any = loaded.network.train()
    named = list(network.named_parameters())
    moments = {key: (torch.zeros_like(parameter), torch.zeros_like(parameter)) for key, parameter in named}
    rates = [1 / 3, 2 / 3, *((1 + math.cos(math.pi * done / 6)) / 2 for done in range(6))]
    losses = []
    for step, batch in enumerate(given):
        mean, std = (torch.tensor(value)[:, None, None] for value in (loaded.preprocessing.mean, loaded.preprocessing.std))
        image = F.normalize(network.encode_image((batch.images_BCHW / 255 - mean) / std), dim=-1)
        text = F.normalize(network.encode_text(batch.tokens_BL), dim=-1)
        if config.loss_function.value == "siglip":
            loss = SigLipLoss()(image, text, network.logit_scale.exp(), network.logit_bias)
        else:
            loss = ClipLoss()(image, text, network.logit_scale.exp())
        losses.append(float(loss.detach()))
        gradients = dict(
            zip(moments, torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True), strict=True)
        )
        gradients = {key: gradient for key, gradient in gradients.items() if gradient is not None}
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
        with torch.no_grad():
            for key, parameter in named:
                if key not in gradients:
                    continue
                gradient = gradients[key] * min(1.0, 0.5 / norm)
                first = 0.9 * moments[key][0] + 0.1 * gradient
                second = 0.98 * moments[key][1] + 0.02 * gradient**2
                moments[key] = first, second
                unbiased = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.98 ** (step + 1))).sqrt() + 1e-4)
                decay = 0.2 if parameter.ndim > 1 else 0.0
                parameter -= 1e-3 * rates[step] * (unbiased + decay * parameter)
            if "sig" not in config.model_name:
                network.logit_scale.clamp_(max=math.log(100))
    return {key: tensor.detach() for key, tensor in network.state_dict().items()}, losses


@pytest.mark.parametrize(
    ("name", "loss"),
    [("tiny-clip", "contrastive"), ("tiny-clip", "siglip"), ("tiny-sig", "siglip"), ("tiny-sig", "contrastive")],
)
def test_steps_equal_a_loop_written_out_by_hand(tiny_config: ProjectConfig, name: str, loss: str) -> None:
    config = model_config(
        tiny_config,
        name,
        loss,
        **{
            "training.weight_decay": 0.2,
            "training.max_grad_norm": 0.5,
            "training.epsilon": 1e-4,
            "schedule.warmup_ratio": 0.25,
            "model.init_logit_bias": -10.0,
        },
    )
    given = batches(4)
    trainer = trainer_for(config)
    stats = [steps(trainer, [batch]) for batch in given]
    expected, losses = by_hand(config, given)
    assert [each.loss for each in stats] == pytest.approx(losses, abs=1e-5)
    assert [each.learning_rate for each in stats] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3 * (2 + math.sqrt(3)) / 4])
    for key, tensor in weights(trainer).items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-6, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
    assert stats[-1].logit_scale == pytest.approx(math.exp(float(expected["logit_scale"])), rel=1e-6)
    bias = expected.get("logit_bias")
    assert stats[-1].logit_bias == (None if bias is None else pytest.approx(float(bias), abs=1e-6))


@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 100.0])
@pytest.mark.parametrize(("name", "loss"), [("tiny-clip", "contrastive"), ("tiny-sig", "siglip")])
def test_what_began_with_the_first_edition_keeps_every_bit(
    tiny_config: ProjectConfig, name: str, loss: str, max_grad_norm: float | None
) -> None:
    """OpenCLIP's network as it is, whole captions, gradients clipped in place: what the first versions did."""
    settings = {"training.max_grad_norm": max_grad_norm, "schedule.warmup_ratio": 0.0, "model.init_logit_bias": -10.0}
    config = model_config(tiny_config, name, loss, **settings, **{"training.edition": 1})
    given, loaded = batches(3), load_model(config)
    network: Any = loaded.network.train()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in network.parameters() if p.ndim >= 2], "weight_decay": config.training.weight_decay},
            {"params": [p for p in network.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(config.training.beta1, config.training.beta2),
        eps=config.training.epsilon,
        fused=True,
    )
    losses = []
    for step, batch in enumerate(given):
        for group in optimizer.param_groups:
            group["lr"] = config.training.learning_rate * learning_rate_factor(step, TOTAL_STEPS, config.schedule)
        optimizer.zero_grad()
        image_BD = network.encode_image(loaded.preprocessing.normalise(batch.images_BCHW.float() / 255), normalize=True)
        text_BD = network.encode_text(batch.tokens_BL, normalize=True)
        of_loss = (sigmoid_bce, network.logit_bias) if loss == "siglip" else (info_nce,)
        losses.append(of_loss[0](image_BD, text_BD, network.logit_scale.exp(), *of_loss[1:]))
        losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), math.inf if max_grad_norm is None else max_grad_norm)
        optimizer.step()
        if name == "tiny-clip":
            with torch.no_grad():
                network.logit_scale.clamp_(0, math.log(100))
    trainer = trainer_for(config)
    assert [steps(trainer, [batch]).loss for batch in given] == [float(loss.detach()) for loss in losses]
    expected = network.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(trainer).items())
    second = trainer_for(config.with_overrides({"training.edition": 2}))
    steps(second, given)
    assert any(not torch.equal(tensor, expected[key]) for key, tensor in weights(second).items())


@pytest.mark.parametrize(("name", "loss"), [("tiny-clip", "contrastive"), ("tiny-sig", "siglip")])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_batch_that_repeats_is_learnt_in_every_precision(
    tiny_config: ProjectConfig, name: str, loss: str, precision: str
) -> None:
    config = model_config(tiny_config, name, loss, **{"hardware.precision": precision})
    trainer = trainer_for(config, plan=plan_precision(config), total_steps=24)
    (batch,) = batches(1)
    first, last = steps(trainer, [batch] * 2).loss, steps(trainer, [batch] * 20).loss
    assert steps(trainer, [batch] * 2).loss < 0.5 * first
    assert last < first
    assert all(parameter.dtype is torch.float32 for parameter in trainer.network.parameters())


def test_the_loss_is_the_mean_over_the_stage_and_the_callback_sees_each_batch(tiny_config: ProjectConfig) -> None:
    given = batches(3)
    single = trainer_for(tiny_config)
    losses = [steps(single, [batch]).loss for batch in given]
    seen: list[TrainBatch] = []
    stats = trainer_for(tiny_config).run_stage(iter(given), 3, seen.append)
    assert stats.loss == pytest.approx(sum(losses) / 3, abs=1e-6)
    assert [id(batch) for batch in seen] == [id(batch) for batch in given]
    assert stats.samples_per_second > 0


def test_a_stage_takes_no_more_batches_than_its_steps(tiny_config: ProjectConfig) -> None:
    given = batches(3)
    remaining: Iterator[TrainBatch] = iter(given)
    trainer = trainer_for(tiny_config)
    trainer.run_stage(remaining, 2, lambda batch: None)
    assert trainer.step == 2
    assert next(remaining) is given[2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_end_the_run_as_diverged(tiny_config: ProjectConfig, bad: float) -> None:
    trainer = trainer_for(tiny_config)
    steps(trainer, batches(1))
    with torch.no_grad():
        trainer.network.logit_scale.fill_(bad)
    with pytest.raises(DivergedError, match=rf"^the loss is nan at step 2, logit scale {bad}; its batch: 0-0, 0-1, .*0-5$"):
        steps(trainer, batches(2))


@pytest.mark.parametrize(
    ("name", "loss", "kept"),
    [
        ("tiny-clip", "contrastive", math.log(100)),
        ("tiny-clip", "siglip", math.log(100)),
        ("tiny-sig", "siglip", 4.8),
        ("tiny-sig", "contrastive", 4.8),
    ],
)
def test_the_scale_is_held_at_100_for_clip_and_left_alone_for_siglip(
    tiny_config: ProjectConfig, name: str, loss: str, kept: float
) -> None:
    config = model_config(tiny_config, name, loss, **{"training.learning_rate": 1e-9})
    trainer = trainer_for(config)
    with torch.no_grad():
        trainer.network.logit_scale.fill_(4.8)
    stats = steps(trainer, batches(1))
    assert float(trainer.network.logit_scale.detach()) == pytest.approx(kept, abs=1e-6)
    assert stats.logit_scale == pytest.approx(math.exp(kept), rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_state_that_went_through_a_file_continues_bit_for_bit(tiny_config: ProjectConfig, precision: str) -> None:
    config = tiny_config.with_overrides({"hardware.precision": precision, "augmentation.image_strength": 0.5})
    plan = plan_precision(config)
    given = batches(6, side=40)
    whole = trainer_for(config, plan=plan)
    steps(whole, given[:3])
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    at_three = copy.deepcopy(weights(whole))
    expected = steps(whole, given[3:])

    torch.rand(5)  # the global generator is elsewhere after a restart
    file.seek(0)
    resumed = trainer_for(config, plan=plan)
    resumed.network.load_state_dict(at_three)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.step == 3
    stats = steps(resumed, given[3:])
    assert (stats.loss, stats.learning_rate, stats.logit_scale) == (expected.loss, expected.learning_rate, expected.logit_scale)
    one, other = weights(whole), weights(resumed)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert whole.state_dict()["scaler"] == resumed.state_dict()["scaler"]


def test_no_clipping_is_no_clipping(tiny_config: ProjectConfig) -> None:
    """AdamW hardly sees the size of gradients, so they are looked at as the optimizer gets them."""
    norms = []
    for limit in (None, 1e-3):
        trainer = trainer_for(tiny_config.with_overrides({"training.max_grad_norm": limit}))
        steps(trainer, batches(1))
        gradients = [parameter.grad for parameter in trainer.network.parameters() if parameter.grad is not None]
        norms.append(math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients)))
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(1e-3, rel=1e-2)


def model_input(trainer: Trainer, batch: TrainBatch, rows: slice) -> torch.Tensor:
    inputs = prepare_inputs(batch, trainer._config, trainer._loaded.preprocessing, trainer.step, trainer._transfer)
    return inputs.images(rows)


def test_augmentation_depends_on_the_step_and_the_seed_only(tiny_config: ProjectConfig) -> None:
    config = tiny_config.with_overrides({"augmentation.image_strength": 0.5})
    (batch,) = batches(1, side=40)
    trainer, again = trainer_for(config), trainer_for(config)
    torch.manual_seed(99)
    first = model_input(trainer, batch, slice(0, 6))
    assert first.shape == (6, 3, 32, 32)
    assert torch.equal(model_input(again, batch, slice(0, 6)), first)
    cut = [model_input(again, batch, rows) for rows in (slice(0, 4), slice(4, 6))]
    torch.testing.assert_close(torch.cat(cut), first, atol=1e-5, rtol=0)
    again.step = 1
    assert not torch.equal(model_input(again, batch, slice(0, 6)), first)
    other = trainer_for(config.with_overrides({"training.seed": 1}))
    assert not torch.equal(model_input(other, batch, slice(0, 6)), first)
    for part in ("augmentation.rand_augment", "augmentation.erasing"):
        assert not torch.equal(model_input(trainer_for(config.with_overrides({part: True})), batch, slice(0, 6)), first)
        without = trainer_for(tiny_config.with_overrides({part: True}))  # no strength
        assert torch.equal(model_input(without, batch, slice(0, 6)), model_input(trainer_for(tiny_config), batch, slice(0, 6)))


def test_a_run_without_loss_scaling_goes_on_with_it(tiny_config: ProjectConfig) -> None:
    """Begun in fp32 or bf16 and resumed on a card that has fp16 only: the saved scaler is empty."""
    state = trainer_for(tiny_config).state_dict()
    assert state["scaler"] == {}
    config = tiny_config.with_overrides({"hardware.precision": "fp16"})
    scaled = trainer_for(config, plan=plan_precision(config))
    scaled.load_state_dict(state)
    steps(scaled, batches(2))
    assert scaled.state_dict()["scaler"]["scale"] > 0


def test_what_is_frozen_has_no_optimizer_state_and_does_not_move(tiny_config: ProjectConfig) -> None:
    config = tiny_config.with_overrides({"freeze.image_tower": True, "freeze.text_blocks": 1})
    trainer = trainer_for(config)
    before = weights(trainer)
    steps(trainer, batches(2))
    names = {name for name, parameter in trainer.network.named_parameters() if parameter.requires_grad}
    moved = {key for key, tensor in weights(trainer).items() if not torch.equal(tensor, before[key])}
    assert moved == names
    assert not any(name.startswith(("visual.", "token_embedding", "transformer.resblocks.0.")) for name in names)
    assert len(trainer.state_dict()["optimizer"]["state"]) == len(names)


@pytest.mark.parametrize(("name", "treatment"), [("tiny-clip", "all"), ("tiny-clip", "mask"), ("tiny-sig", "mask")])
def test_the_products_of_a_batch_reach_the_loss(tiny_config: ProjectConfig, name: str, treatment: Any) -> None:
    loss = "siglip" if name == "tiny-sig" else "contrastive"
    config = model_config(tiny_config, name, loss, **{"loss.positives": treatment})
    (batch,) = batches(1)
    batch = replace(batch, products_B=torch.tensor([0, 0, 1, 2, 3, 3]))
    network: Any = load_model(config).network.train()
    preprocessing = load_model(config).preprocessing
    image_BD = network.encode_image(preprocessing.normalise(batch.images_BCHW / 255), normalize=True)
    text_BD = network.encode_text(batch.tokens_BL, normalize=True)
    together_BB = batch.products_B[:, None] == batch.products_B
    if loss == "siglip":
        expected = sigmoid_bce(image_BD, text_BD, network.logit_scale.exp(), network.logit_bias, together_BB, treatment)
    else:
        expected = info_nce(image_BD, text_BD, network.logit_scale.exp(), together_BB, treatment)
    assert steps(trainer_for(config), [batch]).loss == pytest.approx(float(expected.detach()), abs=1e-5)


def test_a_bias_of_its_own_is_kept_and_a_missing_one_is_fitted_to_the_first_batch(tiny_config: ProjectConfig) -> None:
    own = trainer_for(model_config(tiny_config, "tiny-sig", "siglip", **{"optimizer.logit_learning_rate": 0.0}))
    assert steps(own, batches(2)).logit_bias == -10.0
    fitted = trainer_for(model_config(tiny_config, "tiny-clip", "siglip", **{"optimizer.logit_learning_rate": 0.0}))
    first = steps(fitted, batches(1))
    assert steps(fitted, batches(1)).logit_bias == first.logit_bias, "of the first batch only"
    given = trainer_for(
        model_config(
            tiny_config, "tiny-clip", "siglip", **{"optimizer.logit_learning_rate": 0.0, "model.init_logit_bias": -10.0}
        )
    )
    before = steps(given, batches(1))
    assert before.logit_bias == -10.0
    assert first.loss < before.loss


def test_the_average_goes_through_a_checkpoint_bit_for_bit(tiny_config: ProjectConfig) -> None:
    config = tiny_config.with_overrides({"optimizer.ema_decay": 0.7})
    given = batches(4)
    whole = trainer_for(config)
    steps(whole, given[:2])
    state = copy.deepcopy(whole.state_dict())
    with whole.averaged():
        saved = weights(whole)
    assert any(not torch.equal(saved[key], tensor) for key, tensor in weights(whole).items())
    steps(whole, given[2:])

    resumed = trainer_for(config)
    resumed.network.load_state_dict(saved)
    resumed.load_state_dict(state)
    steps(resumed, given[2:])
    for one, other in ((whole.averaged, resumed.averaged), (nullcontext, nullcontext)):
        with one(), other():
            first, second = weights(whole), weights(resumed)
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("image_strength", [0.0, 0.5])
@pytest.mark.parametrize(("name", "is_kept"), [("tiny-clip", True), ("tiny-sig", True), ("lite", False)])
def test_convolutions_get_photos_colour_by_colour_and_patches_as_they_come(
    tiny_config: ProjectConfig, tmp_path: Path, name: str, is_kept: bool, image_strength: float
) -> None:
    clip_model = lite(tmp_path) if name == "lite" else name
    settings = {"augmentation.image_strength": image_strength, "model.batch_norm": "update"}
    config = model_config(tiny_config, clip_model, "contrastive", **settings)
    trainer = Trainer(load_random_model(config), config, TOTAL_STEPS, CPU)
    seen: list[torch.Tensor] = []
    trainer.network.visual.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    (batch,) = batches(1)
    images_BCHW = batch.images_BCHW.contiguous(memory_format=torch.channels_last)  # as loaders make them
    steps(trainer, [replace(batch, images_BCHW=images_BCHW)])
    assert [images.is_contiguous() for images in seen] == [not is_kept or image_strength > 0] * len(seen) != []


@pytest.mark.slow
def test_a_convolutional_tower_trains_on_a_cpu() -> None:
    """In a process of its own: with photos as loaders make them, torch corrupts its memory."""
    code = """
import torch
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.batches import TrainBatch
from fashionclip_tune.models.openclip import load_random_model
from fashionclip_tune.models.precision import plan_precision
from fashionclip_tune.training.trainer import Trainer
torch.set_num_threads(1)
config = ProjectConfig(clip_model="MobileCLIP2-S0", device="cpu").with_overrides({"training.batch_size": 2})
loaded = load_random_model(config)
side, length = loaded.preprocessing.size, loaded.network.context_length
images = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
batch = TrainBatch(images, torch.randint(1, 1000, (2, length)), torch.arange(2), ("a", "b"), ())
print(Trainer(loaded, config, 2, plan_precision(config)).run_stage(iter([batch] * 2), 2, lambda batch: None).loss)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-500:]
    assert 0 < float(done.stdout) < 100
