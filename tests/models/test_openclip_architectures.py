"""The three published architectures, from random weights: a step runs, is saved, resumed and exported."""

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch

from fashionclip_tune.config.choices import ClipModelOptions
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.batches import TrainBatch
from fashionclip_tune.models import openclip as model_module
from fashionclip_tune.models.openclip import export_openclip, load_model, load_weights
from fashionclip_tune.models.precision import plan_precision
from fashionclip_tune.storage.checkpoint import newest_checkpoint, save_checkpoint
from fashionclip_tune.training.trainer import Trainer

# Gigabytes pass through memory and disk here. What costs time and is tested with small models is left out: cutting the batch
# (but for one model).
SETTINGS: dict[ClipModelOptions, dict[str, Any]] = {
    ClipModelOptions.ViT_B_32: {"training.micro_batch_size": 1},
    ClipModelOptions.ViT_B_16: {},
    ClipModelOptions.ViT_SigLIP_2_16: {"loss_function": "siglip"},
}


@pytest.fixture
def one_copy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No second copy of the weights is made or hashed; the tokenizer, of the hub for SigLIP2, is OpenCLIP's own.

    One thread: two that wait for each other on a busy machine take three times the CPU time of one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=64)
    monkeypatch.setattr(model_module, "_tokenizer", lambda *_: tokenizer)
    monkeypatch.setattr(model_module, "copy", SimpleNamespace(deepcopy=lambda network: network))
    monkeypatch.setattr(model_module, "_fingerprint", lambda network: "")
    model_module._load_cached.cache_clear()
    yield
    torch.set_num_threads(threads)
    model_module._load_cached.cache_clear()
    gc.collect()


@pytest.mark.slow
@pytest.mark.usefixtures("one_copy")
@pytest.mark.parametrize("option", list(ClipModelOptions), ids=lambda option: option.value)
def test_a_step_runs_is_saved_resumed_and_exported(option: ClipModelOptions, tmp_path: Path) -> None:
    config = ProjectConfig(clip_model=option, device="cpu").with_overrides(
        {"model.pretrained": None, "training.batch_size": 2, "hardware.threads": 1, **SETTINGS[option]}
    )
    loaded = load_model(config)
    network: Any = loaded.network
    side, length = loaded.preprocessing.size, network.context_length
    tokens_BL = torch.randint(1, 1000, (2, length), generator=torch.Generator().manual_seed(0))
    images_BCHW = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    batch = TrainBatch(images_BCHW, tokens_BL, torch.arange(2), ("a", "b"), ())
    trainer = Trainer(loaded, config, 2, plan_precision(config))
    before = samples(network)
    stats = trainer.run_stage(iter([batch]), 1, lambda batch: None)
    assert stats is not None
    assert 0 < stats.loss < 100
    after = samples(network)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    # Keys' biases have no gradient but rounding.
    moved = {name for name in trained if not torch.equal(before[name], after[name])}
    assert len(moved) > 0.9 * len(trained)
    record = {"step": 1, "fingerprint": "f", "config": config.to_dict(), "history": []}
    save_checkpoint(tmp_path / "checkpoints", network.state_dict(), trainer.state_dict(), record)

    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    resumed = Trainer(loaded, config, 2, plan_precision(config))
    del trainer
    found, refused = newest_checkpoint(tmp_path)
    assert found is not None, refused
    load_weights(network, found.weights_file)
    resumed.load_state_dict(found.training_state())
    assert all(torch.equal(sample, after[name]) for name, sample in samples(network).items())
    assert resumed.step == 1
    second = resumed.run_stage(iter([batch]), 1, lambda batch: None)
    assert second is not None
    assert 0 < second.loss != stats.loss
    shutil.rmtree(tmp_path / "checkpoints")
    export_openclip(loaded, tmp_path / "best")
    again = open_clip.factory.load_state_dict(str(tmp_path / "best" / "open_clip_model.safetensors"))
    assert again.keys() == network.state_dict().keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in network.state_dict().items())


def samples(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A few numbers of each parameter."""
    return {name: parameter.detach().flatten()[:64].clone() for name, parameter in network.named_parameters()}
