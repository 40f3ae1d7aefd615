"""Batch norms in training: statistics that stay, that move once a step, and those of runs that began before one could choose.

On a convolutional tower of timm's with statistics that photos have left.
"""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.dataset import cached_index, run_shards, storage_of
from fashionclip_tune.errors import OutOfMemoryError, UserError
from fashionclip_tune.models.batch_norms import batch_norms, evaluating
from fashionclip_tune.models.openclip import export_openclip, load_model, load_random_model
from fashionclip_tune.models.weights import read_weights
from fashionclip_tune.storage.checkpoint import RECORD_NAME, WEIGHTS_NAME
from fashionclip_tune.training.train import train
from fashionclip_tune.training.trainer import Trainer
from tests.support.networks import lite
from tests.support.out_of_memory import fails_at
from tests.support.trainers import CPU, TOTAL_STEPS, batches, steps, weights

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OpenCLIP folder: 13 batch norms, with the statistics of random photos but for what would be the same by chance."""
    folder = tmp_path_factory.mktemp("lite")
    loaded = load_random_model(ProjectConfig(clip_model=lite(folder, "test_efficientnet")))
    network: Any = loaded.network.train()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _ in range(30):
            network.encode_image(torch.randn(16, 3, 32, 32, generator=generator))
        for module in batch_norms(network).values():
            module.running_mean += 0.1 * torch.randn(module.running_mean.shape, generator=generator)
            module.running_var *= 0.8 + 0.4 * torch.rand(module.running_var.shape, generator=generator)
    export_openclip(loaded, folder)
    return folder


@pytest.fixture
def config(tiny_config: ProjectConfig, start: Path) -> ProjectConfig:
    settings = {"model.pretrained": "default", "training.epsilon": 1e-4}
    return replace(tiny_config, clip_model=f"local-dir:{start}").with_overrides(settings)


def trainer_for(config: ProjectConfig, **overrides: Any) -> Trainer:
    config = config.with_overrides(overrides)
    return Trainer(load_model(config), config, TOTAL_STEPS, CPU)


def statistics(trainer: Trainer) -> Tensors:
    return {name: buffer.clone() for name, buffer in trainer.network.named_buffers() if "running_" in name or "num_b" in name}


def moved(before: Tensors, after: Tensors) -> set[str]:
    assert before.keys() == after.keys() != set()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"training.micro_batch_size": 4},
        {"hardware.gradient_checkpointing": True},
        {"optimizer.ema_decay": 0.5},
        {"hardware.compile": True},
        {"model.batch_norm": "update", "freeze.image_tower": True},
        {"freeze.image_tower": True, "training.micro_batch_size": 4},
        {"model.batch_norm": "update", "freeze.image_tower": True, "training.micro_batch_size": 4},
    ],
    ids=str,
)
def test_no_statistics_move_and_evaluations_between_steps_do_not_change_that(
    config: ProjectConfig, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any]
) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend="eager"))
    monkeypatch.setenv("CXX", "true")
    trainer = trainer_for(config, **overrides)
    before, weights_before = statistics(trainer), weights(trainer)
    images_BCHW = torch.randn(2, 3, 32, 32)
    for batch in batches(2):
        steps(trainer, [batch])
        with evaluating(trainer.network), trainer.averaged(), torch.no_grad():
            first_BD = trainer.network.encode_image(images_BCHW)
            assert torch.equal(trainer.network.encode_image(images_BCHW), first_BD)
    assert moved(before, statistics(trainer)) == set()
    scales = [name for name, parameter in trainer.network.visual.named_parameters() if "bn" in name]
    after = weights(trainer)
    are_trained = [not torch.equal(after[f"visual.{name}"], weights_before[f"visual.{name}"]) for name in scales]
    assert are_trained == [not overrides.get("freeze.image_tower", False)] * len(scales) != []


def test_after_an_evaluation_each_module_is_in_its_own_mode(config: ProjectConfig) -> None:
    network = trainer_for(config, **{"freeze.image_blocks": 1}).network
    modes = [module.training for module in network.modules()]
    assert set(modes) == {True, False}
    with pytest.raises(KeyError), evaluating(network):  # noqa: PT012
        assert not any(module.training for module in network.modules())
        raise KeyError
    assert [module.training for module in network.modules()] == modes


def gradients_of_a_step(trainer: Trainer, batch_size: int) -> tuple[float, Tensors]:
    loss = steps(trainer, batches(1, batch_size=batch_size)).loss
    return loss, {name: parameter.grad for name, parameter in trainer.network.named_parameters() if parameter.grad is not None}


def distance(ours: Tensors, theirs: Tensors) -> float:
    """Of two sets of gradients, as a share of their length."""
    assert ours.keys() == theirs.keys()
    square = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in ours)
    return float((square / sum(float(each.double().square().sum()) for each in theirs.values())) ** 0.5)


def test_micro_batches_of_16_in_64_give_the_gradients_of_the_whole_batch(config: ProjectConfig) -> None:
    config = config.with_overrides({"training.batch_size": 64, "training.stage_examples": 64, "training.budget_examples": None})
    loss, whole = gradients_of_a_step(trainer_for(config), 64)
    cut_loss, cut = gradients_of_a_step(trainer_for(config, **{"training.micro_batch_size": 16}), 64)
    assert cut_loss == pytest.approx(loss, rel=1e-5)
    assert distance(cut, whole) < 1e-4
    with pytest.warns(UserWarning, match="statistics of the 13 batch norms"):
        as_ever = trainer_for(config, **{"training.micro_batch_size": 16, "model.batch_norm": "legacy"})
    _, harmed = gradients_of_a_step(as_ever, 64)
    _, updated = gradients_of_a_step(trainer_for(config, **{"model.batch_norm": "update"}), 64)
    assert distance(harmed, updated) > 0.05, "nothing was at stake"


def test_updated_statistics_are_torchs_own_once_a_step(config: ProjectConfig) -> None:
    trainer = trainer_for(config, **{"model.batch_norm": "update"})
    before = statistics(trainer)
    (batch,) = batches(1)
    expected: Any = load_model(config).network.train()
    seen: list[torch.Tensor] = []
    trainer.network.visual.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    steps(trainer, [batch])
    expected.encode_image(seen[0])
    after = statistics(trainer)
    assert moved(before, after) == before.keys()
    assert all(torch.equal(after[name], expected.get_buffer(name)) for name in after)


@pytest.mark.parametrize(
    ("blocks", "still"), [(1, ("bn1", "blocks.0.0.")), (3, ("bn1", "blocks.0.", "blocks.1.", "blocks.2."))]
)
def test_frozen_blocks_keep_their_statistics_where_others_are_updated(config: ProjectConfig, blocks: int, still: Any) -> None:
    trainer = trainer_for(config, **{"model.batch_norm": "update", "freeze.image_blocks": blocks})
    before = statistics(trainer)
    steps(trainer, batches(1))
    prefixes = tuple(f"visual.trunk.{name}" for name in still)
    assert moved(before, statistics(trainer)) == {name for name in before if not name.startswith(prefixes)}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"training.micro_batch_size": 8}, "micro_batch_size = 8: .* has batch norms.*; allowed there is 16 or more, or none"),
        ({"hardware.gradient_checkpointing": True}, "gradient_checkpointing = True: .*; allowed there is false, or set"),
    ],
)
def test_statistics_that_would_move_more_than_once_a_step_are_refused(
    config: ProjectConfig, tiny_config: ProjectConfig, tmp_path: Path, overrides: dict[str, Any], said: str
) -> None:
    updating = {**overrides, "model.batch_norm": "update"}
    with pytest.raises(UserError, match=rf"^model\.batch_norm = update is not possible with \w+\.{said}"):
        train(config.with_overrides(updating), tmp_path)
    assert list(tmp_path.iterdir()) == []
    trainer_for(config, **updating, **{"freeze.image_tower": True})
    trainer_for(tiny_config, **updating)  # which has none
    trainer_for(config, **{**updating, "training.micro_batch_size": 16, "hardware.gradient_checkpointing": False})


def test_where_memory_runs_out_a_batch_whose_statistics_are_updated_is_not_cut(config: ProjectConfig) -> None:
    trainer = trainer_for(config, **{"model.batch_norm": "update"})
    with pytest.MonkeyPatch.context() as patch:
        fails_at(patch, trainer, "_encode_text", [1])
        with pytest.raises(OutOfMemoryError, match=r"step 1 .*model\.batch_norm = update does not let .*set model\.batch_norm"):
            steps(trainer, batches(1))
    fixed = trainer_for(config)
    with pytest.MonkeyPatch.context() as patch:
        fails_at(patch, fixed, "_encode_text", [1])
        with pytest.warns(UserWarning, match="goes on with 8"):
            steps(fixed, batches(1))


def test_random_weights_have_no_statistics_to_keep(config: ProjectConfig) -> None:
    random = config.with_overrides({"model.pretrained": None})
    with pytest.warns(UserWarning, match=r"starts from random weights.* 13 batch norms .*set model\.batch_norm=update"):
        trainer_for(random)
    trainer_for(random, **{"model.batch_norm": "update"})


@pytest.mark.parametrize("mode", ["fixed", "update", "legacy"])
def test_what_is_averaged_is_what_is_evaluated_with(config: ProjectConfig, mode: str) -> None:
    """Updated statistics by the weights' own recursion; counters, and what is older than the choice, as they are."""
    overrides = {"model.batch_norm": mode, "optimizer.ema_decay": 0.7}
    if mode == "legacy":
        with pytest.warns(UserWarning, match="average of the weights leaves them out"):
            trainer = trainer_for(config, **overrides)
    else:
        trainer = trainer_for(config, **overrides)
    expected = {name: buffer.double() for name, buffer in statistics(trainer).items()}
    for batch in batches(3):
        steps(trainer, [batch])
        raw = statistics(trainer)
        for name, buffer in raw.items():
            is_averaged = mode == "update" and "running_" in name
            expected[name] = 0.7 * expected[name] + 0.3 * buffer.double() if is_averaged else buffer.double()
    with trainer.averaged():
        for name, buffer in statistics(trainer).items():
            torch.testing.assert_close(buffer.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert moved(raw, statistics(trainer)) == set()


@pytest.mark.parametrize("mode", ["fixed", "update"])
def test_a_trainer_that_goes_on_has_average_and_statistics_of_one_that_was_not_stopped(
    config: ProjectConfig, mode: str
) -> None:
    overrides = {"model.batch_norm": mode, "optimizer.ema_decay": 0.7}
    whole, given = trainer_for(config, **overrides), batches(4)
    steps(whole, given[:2])
    state = copy.deepcopy(whole.state_dict())
    with whole.averaged():
        saved = weights(whole)
    steps(whole, given[2:])
    resumed = trainer_for(config, **overrides)
    resumed.network.load_state_dict(saved)
    resumed.load_state_dict(state)
    steps(resumed, given[2:])
    assert moved(weights(whole), weights(resumed)) == set()
    with whole.averaged(), resumed.averaged():
        assert moved(weights(whole), weights(resumed)) == set()


class _StopError(Exception):
    pass


def until(examples: int) -> Callable[[dict[str, Any]], None]:
    def on_eval(row: dict[str, Any]) -> None:
        if row["examples_seen"] == examples:
            raise _StopError

    return on_eval


def as_an_older_version_left_it(run: Path, config: ProjectConfig) -> None:
    """Without the setting, and with the fingerprint of all others."""
    shards, storage = run_shards(config), storage_of(config)
    data = ":".join(cached_index(some, storage).fingerprint for some in (shards.train, shards.valid))
    loaded = load_model(config)
    weights = f"{loaded.weights_fingerprint}:{loaded.preprocessing}"
    settings = json.loads((run / "config.json").read_text())
    del settings["model.batch_norm"]
    (run / "config.json").write_text(json.dumps(settings))
    for file in run.glob(f"checkpoints/step_*/{RECORD_NAME}"):
        record = json.loads(file.read_text())
        assert record["fingerprint"] == config.fingerprint(data=data, weights=weights)
        fingerprint = config.fingerprint(data=data, weights=weights, known=settings)
        file.write_text(json.dumps({**record, "config": settings, "fingerprint": fingerprint}))


@pytest.mark.filterwarnings("ignore:the statistics of the 13 batch norms")
@pytest.mark.parametrize("before_its_first_checkpoint", [False, True])
def test_a_run_from_before_the_setting_goes_on_as_it_began_and_what_starts_from_it_does_not(
    config: ProjectConfig, tmp_path: Path, before_its_first_checkpoint: bool
) -> None:
    """Bit for bit, through two more lives: with micro-batches, and an average that knows no statistics."""
    settings = {"training.budget_examples": 48, "training.stage_examples": 16}
    config = config.with_overrides({**settings, "training.micro_batch_size": 8, "optimizer.ema_decay": 0.5})
    legacy, run = config.with_overrides({"model.batch_norm": "legacy"}), tmp_path / "run"
    undisturbed = train(legacy, tmp_path / "undisturbed")
    with pytest.raises(_StopError):
        train(legacy, run, on_eval=until(16))
    as_an_older_version_left_it(run, legacy)
    if before_its_first_checkpoint:
        shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match=r"model\.batch_norm was 'legacy', is 'update'"):
        train(config.with_overrides({"model.batch_norm": "update", "training.micro_batch_size": 16}), run, resume_from=run)
    with pytest.raises(_StopError):
        train(config, run, on_eval=until(32), resume_from=run)
    resumed = train(config, run, resume_from=run)
    found, expected = (load_file(result.checkpoint / WEIGHTS_NAME) for result in (resumed, undisturbed))
    assert moved(found, expected) == set()
    assert [row["step"] for row in resumed.history] == [0, 1, 2, 3]
    anew = config.with_overrides({"should_load_checkpoint": True, "checkpoint_path": resumed.checkpoint})
    after = load_file(train(anew, tmp_path / "anew").checkpoint / WEIGHTS_NAME)
    assert not [name for name in moved(found, after) if "running_" in name or "num_batches" in name]


def test_a_run_of_today_keeps_its_own(config: ProjectConfig, tmp_path: Path) -> None:
    config = config.with_overrides({"training.budget_examples": 32, "training.stage_examples": 16})
    with pytest.raises(_StopError):
        train(config, tmp_path, on_eval=until(16))
    for other in ("update", "legacy"):
        with pytest.raises(UserError, match=rf"model\.batch_norm was 'fixed', is '{other}'"):
            train(config.with_overrides({"model.batch_norm": other}), tmp_path, resume_from=tmp_path)
    last = read_weights(train(config, tmp_path, resume_from=tmp_path).checkpoint / WEIGHTS_NAME)
    first = load_model(config).network.state_dict()
    assert not [name for name in moved(first, last) if "running_" in name or "num_batches" in name]
