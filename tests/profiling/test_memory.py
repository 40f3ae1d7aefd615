"""The estimate against what is known of it, on networks without storage; there is no GPU to measure on."""

import copy
from typing import Any

import pytest
import torch

from fashionclip_tune.cli.main import main
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.openclip import load_model
from fashionclip_tune.profiling.memory import MemoryEstimate, estimate_memory
from fashionclip_tune.profiling.probe import probe


def estimate(network: Any, micro_batch_size: int = 8, **options: Any) -> MemoryEstimate:
    settings = {"batch_size": 8, "micro_batch_size": micro_batch_size, "autocast_dtype": None, **options}
    return estimate_memory(network, **settings)


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-sig"])
def test_static_bytes_follow_from_the_weights_and_what_is_frozen(tiny_config: ProjectConfig, name: str) -> None:
    network = load_model(tiny_config.with_overrides({"clip_model": name})).network
    size = 4 * sum(parameter.numel() for parameter in network.parameters())
    whole = estimate(network)
    assert whole.gradients_bytes == size
    assert whole.optimizer_bytes == 2 * size
    assert size <= whole.weights_bytes < 1.1 * size  # the mask of causal attention is a buffer
    assert whole.average_bytes == 0
    assert estimate(network, averages_weights=True).average_bytes == size
    assert whole.total_bytes == sum(vars(whole).values())
    vision = 4 * sum(parameter.numel() for parameter in network.visual.parameters())
    for parameter in network.visual.parameters():
        parameter.requires_grad_(False)
    frozen = estimate(network)
    assert frozen.gradients_bytes == size - vision
    assert estimate(network, averages_weights=True).average_bytes == size - vision
    assert frozen.activations_bytes < 0.8 * whole.activations_bytes


def test_activations_grow_with_the_micro_batch_and_shrink_with_fp16_and_checkpointing(tiny_config: ProjectConfig) -> None:
    network = load_model(tiny_config).network
    before = copy.deepcopy(network.state_dict())
    eight, sixteen = estimate(network).activations_bytes, estimate(network, 16, batch_size=16).activations_bytes
    assert sixteen == pytest.approx(2 * eight, rel=0.02)
    assert estimate(network, autocast_dtype=torch.float16).activations_bytes < 0.95 * eight
    assert estimate(network, gradient_checkpointing=True).activations_bytes < 0.6 * eight
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert not torch.is_autocast_enabled("cuda")


def test_activations_are_what_a_pass_on_the_cpu_keeps(tiny_config: ProjectConfig) -> None:
    """Counted on true tensors of the CPU, whose attention kernel keeps the same."""
    network: Any = load_model(tiny_config).network.train()
    known = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _ = network(torch.rand(8, 3, 32, 32), torch.randint(1, 100, (8, 32)))
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert estimate(network).activations_bytes == pytest.approx(total, rel=0.05)


def test_without_a_gpu_probe_estimates_and_says_so(
    tiny_config: ProjectConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = probe(tiny_config.with_overrides({"training.batch_size": 10, "training.budget_examples": 160} | NO_STAGES))
    assert [each.micro_batch_size for each in report.probes] == [10, 5, 3, 2, 1]
    assert (report.card, report.best) == (None, None)
    totals = [each.estimate.total_bytes for each in report.probes]
    assert totals == sorted(totals, reverse=True)
    main(["probe", "--set", "clip_model=tiny-clip", "--set", "model.pretrained=none", "--set", "training.batch_size=4"])
    lines = capsys.readouterr().out.splitlines()
    assert "nothing was measured" in lines[0]
    assert [line.split()[1] for line in lines[1:]] == ["4", "2", "1"]


def test_probe_estimates_what_is_configured(tiny_config: ProjectConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option moves the part of the estimate that it concerns, and no other static one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def of(**settings: Any) -> MemoryEstimate:
        options = {path.replace("__", "."): value for path, value in settings.items()}
        return probe(tiny_config.with_overrides(options)).probes[0].estimate

    plain = of()
    vision = 4 * sum(parameter.numel() for parameter in load_model(tiny_config).network.visual.parameters())
    frozen = of(freeze__image_tower=True)
    assert frozen.gradients_bytes == plain.gradients_bytes - vision
    assert frozen.optimizer_bytes == 2 * frozen.gradients_bytes
    assert frozen.activations_bytes < 0.8 * plain.activations_bytes
    averaged = of(freeze__image_tower=True, optimizer__ema_decay=0.9)
    assert (plain.average_bytes, averaged.average_bytes) == (0, frozen.gradients_bytes)
    assert of(hardware__gradient_checkpointing=True).activations_bytes < 0.6 * plain.activations_bytes
    # Half of the image tower's 16 patches and its class token: 9 tokens for 17.
    dropped = of(model__patch_dropout=0.5)
    assert dropped.gradients_bytes == plain.gradients_bytes
    assert dropped.activations_bytes < 0.9 * plain.activations_bytes
    with pytest.raises(UserError, match=r"freeze.image_blocks = 99"):
        of(freeze__image_blocks=99)


NO_STAGES = {"training.stage_examples": None, "training.budget_examples": None}
