"""An average of the weights over the steps of a run, which is evaluated and exported in their place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of the trained parameters: average = decay * average + (1 - decay) * weights.

    It starts at the first weights, so nothing needs to be corrected for. What is frozen has no average of its own.

    References:
        Tarvainen and Valpola 2017, Mean teachers are better role models, section 2.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._decay = decay
        self._trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        self.start()

    def start(self) -> None:
        """Once more from the weights as they are."""
        self._averaged = {name: parameter.detach().clone() for name, parameter in self._trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(list(self._averaged.values()), list(self._trained.values()), 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the network's parameters are the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._trained.items():
            parameter.data, self._averaged[name] = self._averaged[name], parameter.data

    def raw_weights(self) -> dict[str, Tensor]:
        """What the optimizer works on: a checkpoint keeps it beside the average, which is the model's weights there."""
        return {name: parameter.detach() for name, parameter in self._trained.items()}

    @torch.no_grad()
    def restore(self, raw_weights: Mapping[str, Tensor]) -> None:
        """From a network that was loaded with the average."""
        for name, parameter in self._trained.items():
            self._averaged[name].copy_(parameter)
            parameter.copy_(raw_weights[name])
