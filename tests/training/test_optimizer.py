from typing import Any

import open_clip
import pytest
import torch

from fashionclip_tune.config.options import OptimizerConfig, TrainingConfig
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.openclip import load_model
from fashionclip_tune.models.tiny import register_tiny_models
from fashionclip_tune.training.optimizer import build_optimizer, has_fused_adamw


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-sig"])
def test_without_gradients_only_matrices_shrink_and_every_parameter_is_in_one_group(
    name: str, tiny_config: ProjectConfig
) -> None:
    network = load_model(tiny_config.with_overrides({"clip_model": name})).network
    optimizer = build_optimizer(network, TrainingConfig(learning_rate=0.1, weight_decay=0.5), OptimizerConfig())
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in network.parameters())

    before = {key: parameter.detach().clone() for key, parameter in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, parameter in network.named_parameters():
        if key.endswith("bias") or key.startswith("logit_") or ".ln_" in key or key.startswith("ln_") or parameter.ndim == 1:
            assert torch.equal(parameter, before[key]), key
        else:
            torch.testing.assert_close(parameter.detach(), before[key] * (1 - 0.1 * 0.5), msg=key)


def test_frozen_parameters_are_left_to_no_group(tiny_config: ProjectConfig) -> None:
    network = load_model(tiny_config).network
    for parameter in network.visual.parameters():
        parameter.requires_grad_(False)
    optimizer = build_optimizer(network, TrainingConfig(), OptimizerConfig())
    frozen = {id(parameter) for parameter in network.visual.parameters()}
    assert not frozen & {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def test_a_step_is_adamw_as_its_paper_has_it() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, written out."""
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    training = TrainingConfig(learning_rate=0.01, weight_decay=0.1, beta1=0.8, beta2=0.9, epsilon=1e-3)
    optimizer = build_optimizer(network, training, OptimizerConfig())
    expected = {"weight": network.weight.detach().double(), "bias": network.bias.detach().double()}
    moments = {key: (torch.zeros_like(value), torch.zeros_like(value)) for key, value in expected.items()}
    for step in range(1, 5):
        for key, parameter in network.named_parameters():
            parameter.grad = torch.randn(parameter.shape)
            grad = parameter.grad.double()
            first, second = moments[key]
            first = 0.8 * first + 0.2 * grad
            second = 0.9 * second + 0.1 * grad**2
            moments[key] = first, second
            decay = 0.1 if key == "weight" else 0.0
            update = (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-3)
            expected[key] = expected[key] - 0.01 * (update + decay * expected[key])
        optimizer.step()
    for key, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[key], atol=1e-6, rtol=0)


def on_meta(name: str) -> Any:
    register_tiny_models()
    with torch.device("meta"):
        return open_clip.create_model(name, pretrained_text=False, device="meta")


FIRST = {"token_embedding", "positional_embedding", "class_embedding", "conv1", "ln_pre", "patch_embed", "pos_embed"}


def written_out_rate(name: str, blocks: int, base: float) -> float:
    """Names of the three published models and of the tiny ones, looked at word by word."""
    words = name.removeprefix("text.").split(".")
    if name.startswith("logit_"):
        return 0.02
    tower_rate = 0.5 if words[0] == "visual" else 2.0
    numbers = [int(word) for word in words if word.isdigit()]
    if numbers:  # a block, counted from 0
        above = blocks - numbers[0]
    elif {"token_embedding", "positional_embedding", "class_embedding", "conv1", "ln_pre", "patch_embed", "pos_embed"} & set(
        words
    ):
        above = blocks + 1
    else:
        above = 0
    return base * tower_rate * 0.75**above


@pytest.mark.parametrize(
    ("name", "image_blocks", "text_blocks"),
    [("tiny-clip", 3, 2), ("tiny-sig", 3, 2), ("ViT-B-32", 12, 12), ("ViT-B-16", 12, 12), ("ViT-B-16-SigLIP2-256", 12, 12)],
)
@pytest.mark.filterwarnings("ignore")
def test_each_parameter_has_its_towers_and_layers_rate(name: str, image_blocks: int, text_blocks: int) -> None:
    network = on_meta(name)
    rates = OptimizerConfig(image_rate=0.5, text_rate=2.0, layer_decay=0.75, logit_learning_rate=0.02)
    groups = build_optimizer(network, TrainingConfig(learning_rate=1e-3), rates).param_groups
    rate_of = {id(parameter): group["peak_rate"] for group in groups for parameter in group["params"]}
    assert len(rate_of) == len(list(network.parameters()))
    for key, parameter in network.named_parameters():
        blocks = image_blocks if key.startswith("visual.") else text_blocks
        assert rate_of[id(parameter)] == pytest.approx(written_out_rate(key, blocks, 1e-3), rel=1e-12), key


def test_layer_decay_is_refused_where_layers_are_not_known() -> None:
    with pytest.raises(UserError, match=r"^optimizer.layer_decay = 0.5 is not possible: the image tower .* allowed is 1$"):
        build_optimizer(on_meta("RN50"), TrainingConfig(), OptimizerConfig(layer_decay=0.5))


def test_fused_adamw_is_used_where_the_device_has_it_only() -> None:
    network = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(network, TrainingConfig(), OptimizerConfig())
    assert optimizer.param_groups[0]["fused"] is has_fused_adamw("cpu")
    assert not has_fused_adamw("meta")


def test_a_card_that_is_full_is_not_taken_for_one_without_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", full)
        with pytest.raises(RuntimeError, match="out of memory"):
            has_fused_adamw("cpu:0")
    assert has_fused_adamw("cpu:0") is has_fused_adamw("cpu")  # nothing was kept of it
