"""Contrastive losses on normalised embeddings.

Shape legend: B photos and as many captions in the batch, D embedding size.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Positives = Literal["all", "mask"]


def info_nce(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    positives_BB: Tensor | None = None,
    positives: Positives = "all",
) -> Tensor:
    """Symmetric InfoNCE: mean of the image-to-text and the text-to-image cross-entropy over the batch.

    Args:
        image_BD: image embeddings, L2-normalised.
        text_BD: text embeddings, L2-normalised; row i belongs to image i.
        logit_scale: the factor on cosine similarities (exponentiated already), a scalar.
        positives_BB: bool, True where image i and text j are relevant to each other, diagonal included. None: the
            diagonal only.
        positives: "all": the target of a row is spread equally over its positives; "mask": positives off the diagonal
            are left out of the row, neither attracted nor repelled.

    Returns:
        A scalar.

    References:
        Radford et al. 2021, CLIP, figure 3. Equal mass on all positives: Yang et al. 2022, UniCL, equations 3 and 4.
    """
    _check(positives)
    logits_BB = logit_scale * image_BD @ text_BD.T
    if positives_BB is not None and positives == "mask":
        logits_BB, positives_BB = logits_BB.masked_fill(_off_diagonal(positives_BB), -torch.inf), None
    if positives_BB is None:
        target_B = torch.arange(len(logits_BB), device=logits_BB.device)
        return (F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B)) / 2
    mass_BB = positives_BB.to(logits_BB.dtype)
    image_to_text = F.cross_entropy(logits_BB, mass_BB / mass_BB.sum(dim=1, keepdim=True))
    text_to_image = F.cross_entropy(logits_BB.T, (mass_BB / mass_BB.sum(dim=0, keepdim=True)).T)
    return (image_to_text + text_to_image) / 2


def sigmoid_bce(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    positives_BB: Tensor | None = None,
    positives: Positives = "all",
) -> Tensor:
    """Sigmoid loss: each of the B x B pairs is a binary classification; summed over the pairs, divided by B.

    Args:
        image_BD, text_BD, logit_scale, positives_BB: as in ``info_nce``.
        logit_bias: added to the scaled similarities, a scalar.
        positives: "all": every positive has label +1; "mask": positives off the diagonal do not count.

    Returns:
        A scalar.

    References:
        Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training, equation 1 and algorithm 1.
    """
    _check(positives)
    logits_BB = logit_scale * image_BD @ text_BD.T + logit_bias
    attract_BB, ignored_BB = _binary_labels(logits_BB, positives_BB, positives)
    pair_losses_BB = -F.logsigmoid(torch.where(attract_BB, logits_BB, -logits_BB))
    return pair_losses_BB.masked_fill(ignored_BB, 0.0).sum() / len(logits_BB)


@torch.no_grad()
def fitted_logit_bias(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    positives_BB: Tensor | None = None,
    positives: Positives = "all",
) -> Tensor:
    """The bias with which ``sigmoid_bce`` of this batch is least, where all else stays as it is; at most 0.

    The derivative by the bias, the sum of sigmoid(logit) over the negatives less that of sigmoid(-logit) over the
    positives, rises with it: its zero is found by bisection, without reading a number back from the device.
    """
    logits_BB = logit_scale.double() * image_BD.double() @ text_BD.double().T
    attract_BB, ignored_BB = _binary_labels(logits_BB, positives_BB, positives)
    signs_BB = torch.where(attract_BB, -1.0, 1.0).double().masked_fill(ignored_BB, 0.0)
    high = logits_BB.new_zeros(())
    low = -logits_BB.abs().max() - len(logits_BB)  # where no negative could outweigh a positive
    for _ in range(60):
        middle = (low + high) / 2
        rises = (signs_BB * torch.sigmoid(signs_BB * (logits_BB + middle))).sum() > 0
        low, high = torch.where(rises, low, middle), torch.where(rises, middle, high)
    return high


def positive_pairs(products_B: Tensor, tokens_BL: Tensor) -> Tensor:
    """Which photos and captions of a batch belong together, for the losses' ``positives_BB``.

    Those of one product do. So do a photo and a caption of another product whose own caption has the same tokens: the text
    tower cannot tell the two captions apart, so neither can be more right than the other.

    Args:
        products_B: [B] int, equal for photos of one product.
        tokens_BL: [B, L] int, the caption of each photo as the text tower sees it, cut to its length.

    Returns:
        [B, B] bool, symmetric, with the diagonal.
    """
    _, captions_B = torch.unique(tokens_BL, dim=0, return_inverse=True)
    together_BB: Tensor = (products_B[:, None] == products_B) | (captions_B[:, None] == captions_B)
    return together_BB


def _check(positives: str) -> None:
    if positives not in get_args(Positives):
        raise ValueError(f"positives = {positives!r} is not allowed: {' or '.join(get_args(Positives))}")


def _off_diagonal(positives_BB: Tensor) -> Tensor:
    return positives_BB & ~torch.eye(len(positives_BB), dtype=torch.bool, device=positives_BB.device)


def _binary_labels(logits_BB: Tensor, positives_BB: Tensor | None, positives: Positives) -> tuple[Tensor, Tensor]:
    """Which pairs have label +1, and which do not count."""
    diagonal_BB = torch.eye(len(logits_BB), dtype=torch.bool, device=logits_BB.device)
    if positives_BB is None:
        return diagonal_BB, torch.zeros_like(diagonal_BB)
    if positives == "mask":
        return diagonal_BB, _off_diagonal(positives_BB)
    return positives_BB, torch.zeros_like(diagonal_BB)
