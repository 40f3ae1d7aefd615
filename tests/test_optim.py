import pytest
import torch

from fashionclip_tune.config import ProjectConfig, TrainingConfig
from fashionclip_tune.model import load_model
from fashionclip_tune.optim import build_optimizer
from fashionclip_tune.recipe import OptimizerConfig


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
