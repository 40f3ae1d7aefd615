"""Losses against OpenCLIP's own, and against sums written out pair by pair."""

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from fashionclip_tune.losses import Positives, fitted_logit_bias, info_nce, positive_pairs, sigmoid_bce


class Inputs:
    """Leaves of a graph; ``image`` and ``text`` are their normalised embeddings."""

    def __init__(self, batch_size: int, dtype: torch.dtype, scale: float = 20.0, bias: float = -10.0) -> None:
        generator = torch.Generator().manual_seed(batch_size)
        self.raw_image = torch.randn(batch_size, 12, generator=generator, dtype=dtype).requires_grad_()
        self.raw_text = torch.randn(batch_size, 12, generator=generator, dtype=dtype).requires_grad_()
        self.scale = torch.tensor(scale, dtype=dtype, requires_grad=True)
        self.bias = torch.tensor(bias, dtype=dtype, requires_grad=True)
        self.image, self.text = F.normalize(self.raw_image, dim=1), F.normalize(self.raw_text, dim=1)

    def gradients(self, loss: Tensor, *, with_bias: bool) -> list[Tensor]:
        leaves = [self.raw_image, self.raw_text, self.scale, *([self.bias] if with_bias else [])]
        return list(torch.autograd.grad(loss, leaves, retain_graph=True))


def random_positives(batch_size: int, share: float = 0.3) -> Tensor:
    """Not symmetric on purpose: image i may go with text j without image j going with text i."""
    generator = torch.Generator().manual_seed(batch_size)
    return (torch.rand(batch_size, batch_size, generator=generator) < share) | torch.eye(batch_size, dtype=torch.bool)


def logits_of(inputs: Inputs, bias: float = 0.0) -> list[list[float]]:
    images, texts = inputs.image.tolist(), inputs.text.tolist()
    return [
        [inputs.scale.item() * sum(a * b for a, b in zip(image, text, strict=True)) + bias for text in texts]
        for image in images
    ]


def slow_info_nce(logits: list[list[float]], relevant: list[list[bool]], positives: Positives) -> float:
    num_pairs = len(logits)
    total = 0.0
    for direction in ("image to text", "text to image"):
        for i in range(num_pairs):
            others = [(i, j) if direction == "image to text" else (j, i) for j in range(num_pairs)]
            if positives == "mask":
                others = [(a, b) for a, b in others if a == b or not relevant[a][b]]
                wanted = [(i, i)]
            else:
                wanted = [(a, b) for a, b in others if relevant[a][b]]
            log_sum = math.log(sum(math.exp(logits[a][b]) for a, b in others))
            total += sum(log_sum - logits[a][b] for a, b in wanted) / len(wanted) / num_pairs / 2
    return total


def slow_sigmoid_bce(logits: list[list[float]], relevant: list[list[bool]], positives: Positives) -> float:
    num_pairs = len(logits)
    total = 0.0
    for i in range(num_pairs):
        for j in range(num_pairs):
            if positives == "mask" and relevant[i][j] and i != j:
                continue
            label = 1 if i == j or (positives == "all" and relevant[i][j]) else -1
            total += math.log1p(math.exp(-label * logits[i][j]))
    return total / num_pairs


@pytest.mark.parametrize("batch_size", [1, 2, 7, 33, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
def test_info_nce_is_open_clips_in_value_and_gradient(batch_size: int, dtype: torch.dtype, tolerance: float) -> None:
    inputs = Inputs(batch_size, dtype)
    ours, theirs = info_nce(inputs.image, inputs.text, inputs.scale), ClipLoss()(inputs.image, inputs.text, inputs.scale)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for our, their in zip(inputs.gradients(ours, with_bias=False), inputs.gradients(theirs, with_bias=False), strict=True):
        torch.testing.assert_close(our, their, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 33, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("bias", [-10.0, 0.0, 3.0])
def test_sigmoid_bce_is_open_clips_in_value_and_gradient(
    batch_size: int, dtype: torch.dtype, tolerance: float, bias: float
) -> None:
    inputs = Inputs(batch_size, dtype, bias=bias)
    ours = sigmoid_bce(inputs.image, inputs.text, inputs.scale, inputs.bias)
    theirs = SigLipLoss()(inputs.image, inputs.text, inputs.scale, inputs.bias)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for our, their in zip(inputs.gradients(ours, with_bias=True), inputs.gradients(theirs, with_bias=True), strict=True):
        torch.testing.assert_close(our, their, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("positives", ["all", "mask"])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
def test_several_positives_are_the_sum_written_out_pair_by_pair(batch_size: int, positives: Positives) -> None:
    inputs, relevant = Inputs(batch_size, torch.float64), random_positives(batch_size)
    ours = info_nce(inputs.image, inputs.text, inputs.scale, relevant, positives)
    assert ours.item() == pytest.approx(slow_info_nce(logits_of(inputs), relevant.tolist(), positives), abs=1e-12)
    ours = sigmoid_bce(inputs.image, inputs.text, inputs.scale, inputs.bias, relevant, positives)
    expected = slow_sigmoid_bce(logits_of(inputs, inputs.bias.item()), relevant.tolist(), positives)
    assert ours.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("positives", ["all", "mask"])
def test_the_diagonal_alone_equals_no_positives_given(positives: Positives) -> None:
    inputs, diagonal = Inputs(9, torch.float64), torch.eye(9, dtype=torch.bool)
    torch.testing.assert_close(
        info_nce(inputs.image, inputs.text, inputs.scale, diagonal, positives),
        info_nce(inputs.image, inputs.text, inputs.scale),
        rtol=0,
        atol=1e-13,
    )
    torch.testing.assert_close(
        sigmoid_bce(inputs.image, inputs.text, inputs.scale, inputs.bias, diagonal, positives),
        sigmoid_bce(inputs.image, inputs.text, inputs.scale, inputs.bias),
        rtol=0,
        atol=1e-13,
    )


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid_bce"])
def test_a_masked_pair_gets_no_gradient_and_every_other_pair_gets_some(loss: str) -> None:
    # With the identity as text embeddings, and scale 1, image embeddings are the logits themselves.
    logits_BB = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    texts_BB, one, relevant = torch.eye(8, dtype=torch.float64), torch.tensor(1.0), random_positives(8)
    if loss == "info_nce":
        value = info_nce(logits_BB, texts_BB, one, relevant, "mask")
    else:
        value = sigmoid_bce(logits_BB, texts_BB, one, torch.tensor(0.5), relevant, "mask")
    (gradient_BB,) = torch.autograd.grad(value, logits_BB)
    masked = relevant & ~torch.eye(8, dtype=torch.bool)
    assert masked.sum() > 5
    assert torch.equal(gradient_BB == 0, masked)


def test_all_positives_attract_and_negatives_repel() -> None:
    """The sign of each pair's gradient where all logits are equal."""
    logits_BB, relevant = torch.zeros(8, 8, requires_grad=True), random_positives(8)
    (gradient_BB,) = torch.autograd.grad(
        sigmoid_bce(logits_BB, torch.eye(8), torch.tensor(1.0), torch.tensor(0.0), relevant), logits_BB
    )
    torch.testing.assert_close(gradient_BB, torch.where(relevant, -0.5, 0.5) / 8)


def test_a_whole_batch_of_one_product_is_finite_with_gradients() -> None:
    """Everything masked but the diagonal: nothing is left to tell apart, so InfoNCE is 0, not NaN."""
    inputs, everything = Inputs(4, torch.float32), torch.ones(4, 4, dtype=torch.bool)
    masked = info_nce(inputs.image, inputs.text, inputs.scale, everything, "mask")
    assert masked.item() == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in inputs.gradients(masked, with_bias=False))
    spread = info_nce(inputs.image, inputs.text, inputs.scale, everything, "all")
    assert all(gradient.isfinite().all() for gradient in inputs.gradients(spread, with_bias=False))


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid_bce"])
@pytest.mark.parametrize("positives", ["all", "mask"])
def test_gradients_of_several_positives_are_the_slopes_of_the_slow_sum(loss: str, positives: Positives) -> None:
    """Of each logit, by central differences of the sum written out pair by pair."""
    relevant = random_positives(5)
    logits_BB = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    texts_BB, one, zero = torch.eye(5, dtype=torch.float64), torch.tensor(1.0), torch.tensor(0.0)
    if loss == "info_nce":
        slow, value = slow_info_nce, info_nce(logits_BB, texts_BB, one, relevant, positives)
    else:
        slow, value = slow_sigmoid_bce, sigmoid_bce(logits_BB, texts_BB, one, zero, relevant, positives)
    (gradient_BB,) = torch.autograd.grad(value, logits_BB)
    for i in range(5):
        for j in range(5):
            values = []
            for step in (1e-5, -1e-5):
                moved = logits_BB.tolist()
                moved[i][j] += step
                values.append(slow(moved, relevant.tolist(), positives))
            assert gradient_BB[i, j].item() == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-8)


def test_photos_of_a_product_and_captions_of_the_same_tokens_belong_together() -> None:
    products_B = torch.tensor([7, 3, 7, 5, 9])
    tokens_BL = torch.tensor([[1, 2, 0], [4, 5, 0], [1, 3, 0], [4, 5, 0], [4, 5, 6]])
    together = {(0, 2), (2, 0), (1, 3), (3, 1), *((i, i) for i in range(5))}
    expected = [[(i, j) in together for j in range(5)] for i in range(5)]
    assert positive_pairs(products_B, tokens_BL).tolist() == expected


@pytest.mark.parametrize("positives", [None, "all", "mask"])
@pytest.mark.parametrize("scale", [1.0, 16.0, 100.0])
def test_the_fitted_bias_has_the_least_loss(scale: float, positives: Positives | None) -> None:
    inputs = Inputs(16, torch.float64, scale=scale)
    given: tuple[Tensor, Positives] | tuple[()] = (random_positives(16, 0.05), positives) if positives else ()
    bias = fitted_logit_bias(inputs.image, inputs.text, inputs.scale, *given)
    assert -200 < bias.item() < 0
    least = sigmoid_bce(inputs.image, inputs.text, inputs.scale, bias, *given).item()
    for step in (-3.0, -0.01, 0.01, 3.0):
        assert sigmoid_bce(inputs.image, inputs.text, inputs.scale, bias + step, *given).item() > least


def test_the_fitted_bias_stays_finite_where_there_is_nothing_to_repel() -> None:
    inputs = Inputs(4, torch.float32)
    everything = torch.ones(4, 4, dtype=torch.bool)
    for given in ((everything, "all"), (everything, "mask")):
        assert fitted_logit_bias(inputs.image, inputs.text, inputs.scale, *given).item() == 0
