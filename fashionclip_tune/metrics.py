"""Retrieval recall and ranks, exact and by groups.

Shape legend: Q queries, N images, M texts, D embedding size, U and V distinct images and texts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Similarities are computed in square tiles of this side: one fits the cache of a core (1 MB), or fills a GPU (64 MB).
_CPU_TILE, _GPU_TILE = 512, 4096


@dataclass(frozen=True)
class QueryRanks:
    """Where the best relevant item of each query stands among all items: three [Q] int64 tensors on the CPU.

    Items of equal similarity are in random order, so a query has a probability of a hit and an expected rank.
    """

    num_better: Tensor
    """Items that are more similar to the query than its best relevant item."""
    num_tied: Tensor
    """Items exactly as similar as that one, itself included."""
    num_tied_relevant: Tensor
    """Relevant ones among the tied; 0 where a query has no relevant item at all."""

    @property
    def counted(self) -> Tensor:
        """[Q] bool: has a relevant item."""
        return self.num_tied_relevant > 0

    def hit_probability(self, k: int) -> Tensor:
        """[Q] float64: chance that a relevant item is among the k first; exact 0 and 1 where it is certain."""
        return _tie_hit_probability(k - self.num_better, self.num_tied, self.num_tied_relevant)

    def expected_rank(self) -> Tensor:
        """[Q] float64, from 1: the first of r relevant among t tied items in random order stands at (t + 1) / (r + 1)."""
        return self.num_better + (self.num_tied + 1).double() / (self.num_tied_relevant + 1)

    def recall(self, k: int) -> float:
        """Mean hit probability of the queries that have a relevant item."""
        return float(self.hit_probability(k)[self.counted].mean())

    def median_rank(self) -> float:
        return float(np.median(self.expected_rank()[self.counted].numpy()))

    def mean_rank(self) -> float:
        return float(self.expected_rank()[self.counted].mean())


@dataclass(frozen=True)
class RetrievalRecall:
    """Recall@k and ranks by direction, and how many queries counted."""

    text_to_image: dict[int, float]
    image_to_text: dict[int, float]
    mean: dict[int, float]
    median_rank_text_to_image: float
    median_rank_image_to_text: float
    mean_rank_text_to_image: float
    mean_rank_image_to_text: float
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
    """Share of queries with a relevant item among the k most similar ones, both ways, and the ranks of those items.

    A query is relevant to every item with the same group id. Items of equal similarity count by the expectation over
    their random orders, so a model that maps everything to one point scores chance. See ``retrieval_ranks``.

    Args:
        image_embeddings: [N, D] float, normalised here.
        text_embeddings: [M, D] float, normalised here.
        image_groups: [N] integers.
        text_groups: [M] integers.
        ks: cut-offs, each at least 1.

    Raises:
        ValueError: shapes that do not fit, or no embeddings, or no query with a relevant item in one of the directions.
    """
    texts, images = retrieval_ranks(image_embeddings, text_embeddings, image_groups, text_groups)
    text_to_image = {k: texts.recall(k) for k in ks}
    image_to_text = {k: images.recall(k) for k in ks}
    num_text_queries, num_image_queries = int(texts.counted.sum()), int(images.counted.sum())
    return RetrievalRecall(
        text_to_image=text_to_image,
        image_to_text=image_to_text,
        mean={k: (text_to_image[k] + image_to_text[k]) / 2 for k in ks},
        median_rank_text_to_image=texts.median_rank(),
        median_rank_image_to_text=images.median_rank(),
        mean_rank_text_to_image=texts.mean_rank(),
        mean_rank_image_to_text=images.mean_rank(),
        num_text_queries=num_text_queries,
        num_image_queries=num_image_queries,
        num_left_out=len(image_embeddings) + len(text_embeddings) - num_text_queries - num_image_queries,
    )


def retrieval_ranks(
    image_embeddings: Tensor, text_embeddings: Tensor, image_groups: Tensor, text_groups: Tensor
) -> tuple[QueryRanks, QueryRanks]:
    """Ranks of the texts' best images and of the images' best texts: (text to image, image to text).

    Each similarity is computed once, in a tile, and counted for both directions; never all at once, so that memory is
    linear in N and M. Only tiles with relevant pairs are computed a second time, before, to know what to count against:
    the same product of the same numbers, so a positive has the score that it is compared with. Arguments and errors are
    those of ``retrieval_recall``; the device is that of the embeddings.
    """
    if len(image_embeddings) != len(image_groups) or len(text_embeddings) != len(text_groups):
        raise ValueError("one group id is needed for each embedding")
    if image_embeddings.shape[1:] != text_embeddings.shape[1:] or image_embeddings.ndim != 2:
        raise ValueError(f"embeddings are {tuple(image_embeddings.shape)} and {tuple(text_embeddings.shape)}")
    if not len(image_embeddings) or not len(text_embeddings):
        raise ValueError(f"{len(image_embeddings)} images and {len(text_embeddings)} texts: both are needed")
    device = image_embeddings.device
    tile = _CPU_TILE if device.type == "cpu" else _GPU_TILE
    images, texts = _Side(image_embeddings, image_groups, tile), _Side(text_embeddings, text_groups, tile)
    relevant_tiles = _tiles_with_relevant_pairs(images, texts)
    if not relevant_tiles:
        raise ValueError("no query has a relevant item: do the group ids of images and texts match?")
    buffer, marks = torch.empty(2, tile * tile, device=device)
    for row, column in relevant_tiles:
        for block in _blocks(images, texts, row, column, buffer):
            block.raise_best()
    for row in range(images.num_tiles):
        for column in range(texts.num_tiles):
            for block in _blocks(images, texts, row, column, buffer):
                block.count(marks)
                if (row, column) in relevant_tiles:
                    block.count_relevant()
    return texts.ranks(), images.ranks()


class _Side:
    """The images or the texts: distinct embeddings in tiles, and per item what has been counted against it as a query.

    Items are sorted by their distinct embedding, those by the first group that has them, so that relevant pairs lie in
    few tiles. At the edges of its tiles a matrix product gives equal items unequal scores: each is multiplied once.
    """

    def __init__(self, embeddings: Tensor, groups: Tensor, tile: int) -> None:
        normal = F.normalize(embeddings.float(), dim=1).nan_to_num() + 0.0  # -0.0 becomes 0.0: equal is equal in bytes, too
        first, distinct = distinct_rows(normal)
        groups = groups.cpu().long()
        lowest_group = torch.full((len(first),), torch.iinfo(torch.long).max).scatter_reduce(0, distinct, groups, "amin")
        by_group = torch.argsort(lowest_group, stable=True)
        place_of = torch.empty_like(by_group)
        place_of[by_group] = torch.arange(len(by_group))
        self.distinct_UD = normal[first[by_group].to(normal.device)]
        self.tile = tile
        self.num_tiles = -(-len(first) // tile)
        place, self._order = torch.sort(place_of[distinct], stable=True)
        bounds = torch.arange(self.num_tiles + 1) * tile
        self._bounds: list[int] = torch.searchsorted(place, bounds).tolist()
        device = normal.device
        self._all_differ = len(first) == len(normal)
        self._place = place.to(device)
        self.groups = groups[self._order].to(device)
        self.tile_of = (place // tile).tolist()
        self.best = torch.full((len(normal),), -torch.inf, device=device)
        self.num_better, self.num_tied, self.num_tied_relevant = torch.zeros(3, len(normal), dtype=torch.long, device=device)

    def embeddings_of(self, tile: int) -> Tensor:
        return self.distinct_UD[tile * self.tile : (tile + 1) * self.tile]

    def parts(self, tile: int) -> Iterator[tuple[slice, Tensor | None]]:
        """Items of a tile, at most a tile's side at a time: where they are, and where their embedding is in the tile."""
        begin, end = self._bounds[tile], self._bounds[tile + 1]
        for start in range(begin, end, self.tile):
            items = slice(start, min(start + self.tile, end))
            yield items, None if self._all_differ else self._place[items] - tile * self.tile

    def ranks(self) -> QueryRanks:
        counts = torch.empty(3, len(self._order), dtype=torch.long)
        counts[:, self._order] = torch.stack([self.num_better, self.num_tied, self.num_tied_relevant]).cpu()
        has_relevant = torch.empty(len(self._order), dtype=torch.bool)
        has_relevant[self._order] = (self.best > -torch.inf).cpu()
        num_better, num_tied, num_tied_relevant = counts.where(has_relevant, 0)
        # At least itself, even on a device that does not give the same product twice to the last bit.
        return QueryRanks(num_better, num_tied.maximum(has_relevant), num_tied_relevant.maximum(has_relevant))


def distinct_rows(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Of [N, D]: the first row of each distinct value, [U], and for each row the number of its value, [N]."""
    array = np.ascontiguousarray(embeddings.detach().cpu().numpy())
    as_bytes = array.view(np.dtype((np.void, array.shape[1] * array.itemsize))).ravel()
    _, first, distinct = np.unique(as_bytes, return_index=True, return_inverse=True)
    return torch.from_numpy(first), torch.from_numpy(distinct.reshape(-1))


def _tiles_with_relevant_pairs(images: _Side, texts: _Side) -> set[tuple[int, int]]:
    columns: dict[int, set[int]] = {}
    for group, column in zip(texts.groups.tolist(), texts.tile_of, strict=True):
        columns.setdefault(group, set()).add(column)
    rows = set(zip(images.groups.tolist(), images.tile_of, strict=True))
    return {(row, column) for group, row in rows for column in columns.get(group, ())}


@dataclass(frozen=True)
class _Block:
    """Similarities of some images with some texts: those of a tile, spread to the items that share an embedding."""

    scores_NM: Tensor
    images: _Side
    texts: _Side
    rows: slice
    columns: slice

    def raise_best(self) -> None:
        """The highest score of a relevant item so far, both ways."""
        relevant_NM = self.scores_NM.masked_fill(~self._is_relevant(), -torch.inf)
        for side, part, dim in ((self.images, self.rows, 1), (self.texts, self.columns, 0)):
            side.best[part] = torch.maximum(side.best[part], relevant_NM.amax(dim))

    def count(self, marks: Tensor) -> None:
        # Ones and zeros as floats, in memory that is there already: several times faster than masks, and as exact.
        marks_NM = marks[: self.scores_NM.numel()].view(self.scores_NM.shape)
        for side, part, dim in ((self.images, self.rows, 1), (self.texts, self.columns, 0)):
            best = side.best[part].unsqueeze(dim)
            for counter, holds in ((side.num_better, torch.gt), (side.num_tied, torch.eq)):
                holds(self.scores_NM, best, out=marks_NM)
                counter[part] += marks_NM.sum(dim).long()

    def count_relevant(self) -> None:
        is_relevant_NM = self._is_relevant()
        for side, part, dim in ((self.images, self.rows, 1), (self.texts, self.columns, 0)):
            tied_NM = self.scores_NM == side.best[part].unsqueeze(dim)
            side.num_tied_relevant[part] += (tied_NM & is_relevant_NM).sum(dim)

    def _is_relevant(self) -> Tensor:
        return self.images.groups[self.rows, None] == self.texts.groups[None, self.columns]


def _blocks(images: _Side, texts: _Side, row: int, column: int, buffer: Tensor) -> Iterator[_Block]:
    images_UD, texts_VD = images.embeddings_of(row), texts.embeddings_of(column)
    tile_UV = buffer[: len(images_UD) * len(texts_VD)].view(len(images_UD), len(texts_VD))
    torch.mm(images_UD, texts_VD.T, out=tile_UV)
    for rows, row_places in images.parts(row):
        scores_NV = tile_UV if row_places is None else tile_UV[row_places]
        for columns, column_places in texts.parts(column):
            scores_NM = scores_NV if column_places is None else scores_NV[:, column_places]
            yield _Block(scores_NM, images, texts, rows, columns)


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
