"""Gradients of a whole batch through micro-batches that fit the memory.

Shape legend: B photos and as many captions in the batch, D embedding size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Encode = Callable[[slice], tuple[Tensor, Tensor]]


def backward_whole_batch(
    encode: Encode,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    scaled: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    micro_batch_size: int,
) -> Tensor:
    """Adds the gradients of the whole batch's loss to all parameters, with one micro-batch of activations in memory.

    Where the batch is cut, the embeddings are first computed without a graph, the loss of all of them gives its gradient
    by each embedding and by the scale and bias of the logits (once: summed over micro-batches they would come out as
    many times too large), and then each micro-batch is encoded again and its gradients are carried on into the towers.

    Args:
        encode: rows of the batch to their image and text embeddings; the same at each call for the same rows.
        loss_of: [B, D] image and text embeddings to the loss, a scalar.
        scaled: the loss to what is differentiated (fp16 loss scaling).

    Returns:
        The loss, a scalar without a graph.

    References:
        Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, section 3.2 (GradCache).
    """
    cuts = [slice(start, min(start + micro_batch_size, batch_size)) for start in range(0, batch_size, micro_batch_size)]
    if len(cuts) == 1:
        loss = loss_of(*encode(cuts[0]))
        scaled(loss).backward()
        return loss.detach()
    with torch.no_grad():
        images, texts = zip(*(encode(rows) for rows in cuts), strict=True)
    image_BD, text_BD = torch.cat(images).requires_grad_(), torch.cat(texts).requires_grad_()
    loss = loss_of(image_BD, text_BD)
    scaled(loss).backward()
    for rows in cuts:
        towers = zip(encode(rows), (image_BD.grad, text_BD.grad), strict=True)
        # A tower that is frozen as a whole has no graph to go back through.
        carried = [(part, grad_BD[rows]) for part, grad_BD in towers if part.requires_grad and grad_BD is not None]
        torch.autograd.backward([part for part, _ in carried], [grad_BD for _, grad_BD in carried])
    return loss.detach()
