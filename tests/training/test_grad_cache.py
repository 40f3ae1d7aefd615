"""Gradients through micro-batches against those of the whole batch, in double precision."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fashionclip_tune.losses import info_nce, sigmoid_bce
from fashionclip_tune.training.grad_cache import backward_whole_batch

BATCH = 7


class Towers(nn.Module):
    """Two towers, a scale and a bias; ``largest`` is how many rows were in a graph at a time."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image = nn.Parameter(torch.randn(5, 4, generator=generator, dtype=torch.float64))
        self.text = nn.Parameter(torch.randn(6, 4, generator=generator, dtype=torch.float64))
        self.logit_scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
        self.images_B5 = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64)
        self.texts_B6 = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
        self.calls: list[tuple[int, bool]] = []

    def encode(self, rows: slice) -> tuple[Tensor, Tensor]:
        self.calls.append((len(self.images_B5[rows]), torch.is_grad_enabled()))
        image_BD = nn.functional.normalize((self.images_B5[rows] @ self.image).tanh(), dim=-1)
        return image_BD, nn.functional.normalize((self.texts_B6[rows] @ self.text).tanh(), dim=-1)

    def loss(self, name: str, image_BD: Tensor, text_BD: Tensor) -> Tensor:
        if name == "siglip":
            return sigmoid_bce(image_BD, text_BD, self.logit_scale.exp(), self.logit_bias)
        return info_nce(image_BD, text_BD, self.logit_scale.exp())

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: parameter.grad for name, parameter in self.named_parameters()}


def through(towers: Towers, name: str, micro_batch_size: int, factor: float = 1.0) -> Tensor:
    def loss_of(image_BD: Tensor, text_BD: Tensor) -> Tensor:
        return towers.loss(name, image_BD, text_BD)

    return backward_whole_batch(
        towers.encode, loss_of, lambda loss: factor * loss, batch_size=BATCH, micro_batch_size=micro_batch_size
    )


def assert_equal(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, gradient in expected.items():
        if gradient is None:
            assert ours[name] is None, name
        else:
            torch.testing.assert_close(
                ours[name], gradient, rtol=1e-12, atol=1e-14, msg=lambda text, name=name: f"{name} {text}"
            )


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("name", ["contrastive", "siglip"])
def test_loss_and_all_gradients_are_those_of_the_whole_batch(name: str, micro_batch_size: int) -> None:
    whole, cut = Towers(), Towers()
    expected = whole.loss(name, *whole.encode(slice(0, BATCH)))
    (3 * expected).backward()
    loss = through(cut, name, micro_batch_size, factor=3)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert not loss.requires_grad
    assert_equal(cut.gradients(), whole.gradients())  # the scale's and the bias's among them
    assert (cut.logit_bias.grad is None) == (name == "contrastive")
    with_graph = [rows for rows, graph in cut.calls if graph]
    assert max(with_graph) == micro_batch_size
    assert sum(with_graph) == BATCH


def test_gradients_are_added_to_those_that_are_there() -> None:
    once, twice = Towers(), Towers()
    through(once, "siglip", 2)
    for _ in range(2):
        through(twice, "siglip", 2)
    assert_equal(twice.gradients(), {name: 2 * grad for name, grad in once.gradients().items() if grad is not None})


@pytest.mark.parametrize("frozen", ["image", "text", "both"])
def test_a_tower_that_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: str) -> None:
    whole, cut = Towers(), Towers()
    for towers in (whole, cut):
        towers.image.requires_grad_(frozen == "text")
        towers.text.requires_grad_(frozen == "image")
    whole.loss("siglip", *whole.encode(slice(0, BATCH))).backward()
    through(cut, "siglip", 3)
    assert_equal(cut.gradients(), whole.gradients())
