"""Retrieval recall, exact and by groups.

Shape legend: Q queries, N items of the gallery, C queries of one chunk, D embedding size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Similarities held at a time: 2**24 floats are 64 MB, and a few masks of that shape stand beside them.
_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class RetrievalRecall:
    """Recall@k by direction, and how many queries counted."""

    text_to_image: dict[int, float]
    image_to_text: dict[int, float]
    mean: dict[int, float]
    num_text_queries: int
    num_image_queries: int
    num_left_out: int
    """Queries of both directions without any relevant item: they are in no mean."""


def retrieval_recall(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    image_groups: Tensor,
    text_groups: Tensor,
    ks: Sequence[int] = (1, 5, 10),
) -> RetrievalRecall:
    """Share of queries with a relevant item among the k most similar ones, both ways.

    A query is relevant to every item with the same group id. Items of equal similarity count by the expectation over
    their random orders, so a model that maps everything to one point scores chance. Similarities are computed in
    chunks, never all at once, and a positive's score is the same product that it is compared with.

    Args:
        image_embeddings: [N, D] float, normalised here.
        text_embeddings: [M, D] float, normalised here.
        image_groups: [N] integers.
        text_groups: [M] integers.
        ks: cut-offs, each at least 1.

    Raises:
        ValueError: shapes that do not fit, or no embeddings, or no query with a relevant item in one of the directions.
    """
    if len(image_embeddings) != len(image_groups) or len(text_embeddings) != len(text_groups):
        raise ValueError("one group id is needed for each embedding")
    if image_embeddings.shape[1:] != text_embeddings.shape[1:] or image_embeddings.ndim != 2:
        raise ValueError(f"embeddings are {tuple(image_embeddings.shape)} and {tuple(text_embeddings.shape)}")
    if not len(image_embeddings) or not len(text_embeddings):
        raise ValueError(f"{len(image_embeddings)} images and {len(text_embeddings)} texts: both are needed")
    images, texts = F.normalize(image_embeddings.float(), dim=1), F.normalize(text_embeddings.float(), dim=1)
    text_to_image, num_text_queries = _recall_one_way(texts, images, text_groups, image_groups, ks)
    image_to_text, num_image_queries = _recall_one_way(images, texts, image_groups, text_groups, ks)
    return RetrievalRecall(
        text_to_image=text_to_image,
        image_to_text=image_to_text,
        mean={k: (text_to_image[k] + image_to_text[k]) / 2 for k in ks},
        num_text_queries=num_text_queries,
        num_image_queries=num_image_queries,
        num_left_out=len(images) + len(texts) - num_text_queries - num_image_queries,
    )


def _recall_one_way(
    queries_QD: Tensor, items_ND: Tensor, query_groups_Q: Tensor, item_groups_N: Tensor, ks: Sequence[int]
) -> tuple[dict[int, float], int]:
    chunk = max(1, _CHUNK_ELEMENTS // len(items_ND))
    # At the edges of its tiles a matrix product gives equal items unequal scores: each distinct one is multiplied once.
    distinct_UD, distinct_of_N = torch.unique(items_ND, dim=0, return_inverse=True)
    all_differ = len(distinct_UD) == len(items_ND)
    hits = dict.fromkeys(ks, 0.0)
    num_queries = 0
    for queries_CD, groups_C in zip(queries_QD.split(chunk), query_groups_Q.split(chunk), strict=True):
        scores_CN = queries_CD @ items_ND.T if all_differ else (queries_CD @ distinct_UD.T)[:, distinct_of_N]
        relevant_CN = groups_C[:, None] == item_groups_N[None, :]
        best_C = scores_CN.masked_fill(~relevant_CN, -torch.inf).amax(dim=1)
        tied_CN = scores_CN == best_C[:, None]
        # The best relevant item is hit if it, or a relevant one tied with it, is among the k first.
        num_better_C = (scores_CN > best_C[:, None]).sum(dim=1)
        num_tied_C = tied_CN.sum(dim=1)
        num_tied_relevant_C = (tied_CN & relevant_CN).sum(dim=1)
        has_relevant_C = relevant_CN.any(dim=1)
        num_queries += int(has_relevant_C.sum())
        for k in ks:
            chance_C = _tie_hit_probability(k - num_better_C, num_tied_C, num_tied_relevant_C)
            hits[k] += float(chance_C[has_relevant_C].sum())
    if num_queries == 0:
        raise ValueError("no query has a relevant item: do the group ids of images and texts match?")
    return {k: hits[k] / num_queries for k in ks}, num_queries


def _tie_hit_probability(places: Tensor, num_tied: Tensor, num_relevant: Tensor) -> Tensor:
    """Chance that ``places`` drawn without replacement from ``num_tied`` items include one of ``num_relevant``.

    1 - C(tied - relevant, places) / C(tied, places), through log-gamma; exact 0 and 1 where it is certain.
    """
    tied, relevant = num_tied.double(), num_relevant.double()
    drawn = places.double().clamp(min=0).minimum(tied)
    others = tied - relevant
    misses_possible = drawn <= others

    def log_choose(n: Tensor, k: Tensor) -> Tensor:
        return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma((n - k).clamp(min=0) + 1)

    log_miss = log_choose(others, drawn) - log_choose(tied, drawn)
    probability = torch.where(misses_possible, -torch.expm1(log_miss), 1.0)
    return torch.where(drawn == 0, 0.0, probability)
