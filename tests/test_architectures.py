"""The three published architectures, from random weights: a step runs, is saved, resumed and exported."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from fashionclip_tune import model as model_module
from fashionclip_tune.checkpoint import newest_checkpoint, save_checkpoint
from fashionclip_tune.config import ClipModelOptions, ProjectConfig
from fashionclip_tune.data import TrainBatch
from fashionclip_tune.model import export_openclip, load_model, load_weights
from fashionclip_tune.precision import plan_precision
from fashionclip_tune.trainer import Trainer


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No second copy of the weights stays in memory; the tokenizer, of the hub for SigLIP2, is OpenCLIP's own."""
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=64)
    monkeypatch.setattr(model_module, "_tokenizer", lambda *_: tokenizer)
    model_module._load_cached.cache_clear()
    yield
    model_module._load_cached.cache_clear()
    gc.collect()


@pytest.mark.slow
@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize("option", list(ClipModelOptions), ids=lambda option: option.value)
def test_a_step_runs_is_saved_resumed_and_exported(option: ClipModelOptions, tmp_path: Path) -> None:
    loss = "siglip" if option is ClipModelOptions.ViT_SigLIP_2_16 else "contrastive"
    config = ProjectConfig(clip_model=option, loss_function=loss, device="cpu").with_overrides(
        {"model.pretrained": None, "training.batch_size": 2, "training.micro_batch_size": 1, "hardware.threads": 1}
    )
    loaded = load_model(config)
    model_module._load_cached.cache_clear()
    network: Any = loaded.network
    side, length = loaded.preprocessing.size, network.context_length
    tokens_BL = torch.randint(1, 1000, (2, length), generator=torch.Generator().manual_seed(0))
    images_BCHW = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    batch = TrainBatch(images_BCHW, tokens_BL, torch.arange(2), ("a", "b"), ())
    trainer = Trainer(loaded, config, 2, plan_precision(config))
    stats = trainer.run_stage(iter([batch]), 1, lambda batch: None)
    assert stats is not None
    assert 0 < stats.loss < 100
    record = {"step": 1, "fingerprint": "f", "config": config.to_dict(), "history": []}
    save_checkpoint(tmp_path / "checkpoints", network.state_dict(), trainer.state_dict(), record)

    found, refused = newest_checkpoint(tmp_path)
    assert found is not None, refused
    expected = network.logit_scale.detach().clone()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    load_weights(network, found.weights_file)
    trainer.load_state_dict(found.training_state())
    assert torch.equal(network.logit_scale, expected)
    assert trainer.step == 1
    second = trainer.run_stage(iter([batch]), 1, lambda batch: None)
    assert second is not None
    assert second.loss > 0
    del trainer
    export_openclip(loaded, tmp_path / "best")
    assert sum(path.stat().st_size for path in (tmp_path / "best").iterdir()) > 4e8
    again = open_clip.factory.load_state_dict(str(tmp_path / "best" / "open_clip_model.safetensors"))
    assert all(torch.equal(again[key], tensor) for key, tensor in network.state_dict().items())
