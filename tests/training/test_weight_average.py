"""The average against its recursion, and where it stands in for the weights."""

import pytest
import torch

from fashionclip_tune.training.optimizer import WeightAverage


def test_the_average_is_its_recursion_and_leaves_the_weights_alone() -> None:
    network = torch.nn.Linear(3, 2).double()
    network.bias.requires_grad_(False)
    average = WeightAverage(network, 0.9)
    expected = network.weight.detach().clone()
    for _ in range(5):
        with torch.no_grad():
            network.weight += torch.randn(2, 3, dtype=torch.float64)
        average.update()
        expected = 0.9 * expected + 0.1 * network.weight.detach()
    raw, storage = network.weight.detach().clone(), network.weight
    with average.in_place():
        torch.testing.assert_close(network.weight.detach(), expected, rtol=0, atol=1e-14)
    assert torch.equal(network.weight, raw)
    assert network.weight is storage
    assert average.raw_weights().keys() == {"weight"}


def test_the_weights_come_back_when_the_evaluation_fails() -> None:
    network = torch.nn.Linear(3, 2)
    average, raw = WeightAverage(network, 0.5), None
    with torch.no_grad():
        network.weight += 1
    raw = network.weight.detach().clone()
    with pytest.raises(KeyError), average.in_place():
        raise KeyError
    assert torch.equal(network.weight, raw)


def test_restored_from_the_average_and_the_raw_weights_it_goes_on() -> None:
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    average = WeightAverage(first, 0.9)
    with torch.no_grad():
        first.weight += 1
    average.update()
    again = WeightAverage(second, 0.9)
    with average.in_place():
        second.load_state_dict(first.state_dict())
    again.restore(average.raw_weights())
    assert torch.equal(second.weight, first.weight)
    for each in (average, again):
        each.update()
    with average.in_place(), again.in_place():
        assert torch.equal(second.weight, first.weight)
