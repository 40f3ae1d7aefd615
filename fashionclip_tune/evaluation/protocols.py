"""What counts as right, among what: the protocols by which retrieval figures are published.

Shape legend: N photos, K captions a photo, F further captions, V distinct captions, D embedding size, Q queries, C candidates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fashionclip_tune.config.choices import RetrievalProtocol
from fashionclip_tune.errors import UserError
from fashionclip_tune.evaluation.statistics import PairedTest, QueryValues, paired_test
from fashionclip_tune.files import atomic_write
from fashionclip_tune.metrics import QueryRanks, distinct_rows, retrieval_ranks
from fashionclip_tune.seeds import Stream, numpy_generator

KS = (1, 5, 10)
DIRECTIONS = ("text_to_image", "image_to_text")
# Below a run's folder: the queries of its last evaluation.
QUERIES_FILE = "last_queries.npz"
_NUM_DRAWS, _NUM_QUERIES, _NUM_NEGATIVES = 5, 1_000, 100
_QUERIES_AT_A_TIME = 256


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Embedded photos and captions: those that are searched, and among them those that are searched for."""

    images_ND: Tensor
    captions_VD: Tensor
    caption_rows_NK: Tensor
    """Rows of ``captions_VD``, the original caption first; -1 where a photo has fewer than K."""
    products_N: Tensor
    """Numbers; equal ones are photos of one product."""
    categories_N: Tensor
    """Numbers; -1 where none is known."""
    is_query_N: Tensor
    """False: in the gallery only."""
    further_F2: Tensor | None = None
    """Photo and row of ``captions_VD`` of captions behind the K: one photo may have thousands, others one."""


class Direction(NamedTuple):
    """The queries of one direction."""

    ranks: QueryRanks
    products_Q: Tensor
    gallery_size: int

    def hits(self, k: int) -> QueryValues:
        """Of the queries that have a relevant item."""
        counted = self.ranks.counted
        return QueryValues(self.ranks.hit_probability(k)[counted].numpy(), self.products_Q[counted].numpy())


class Retrieval(NamedTuple):
    """What a protocol found, query by query."""

    protocol: RetrievalProtocol
    text_to_image: Direction
    image_to_text: Direction

    def hits(self, k: int, directions: Sequence[str] = DIRECTIONS) -> tuple[QueryValues, ...]:
        return tuple(getattr(self, name).hits(k) for name in directions)


def compare(first: Retrieval, second: Retrieval, k: int = 10, directions: Sequence[str] = DIRECTIONS) -> PairedTest | None:
    """What the first model is better by in recall_at_K; None where protocol or queries are not the same."""
    if first.protocol != second.protocol:
        return None
    try:
        return paired_test(first.hits(k, directions), second.hits(k, directions))
    except ValueError:  # a photo that could be read at one time only
        return None


def retrieve(pool: Pool, protocol: RetrievalProtocol) -> Retrieval:
    """Ranks of all queries under a protocol.

    Raises:
        UserError: ``candidates_101`` on photos without categories, or with too few in each.
    """
    return Retrieval(protocol, *_RULES[protocol](pool))


def _instance(pool: Pool) -> tuple[Direction, Direction]:
    """Photo i's first caption is right for photo i only, as the published Fashion-Gen runs counted."""
    photos = torch.arange(len(pool.images_ND))
    return _search(pool, pool.caption_rows_NK[:, 0], photos, photos, text_photos=photos)


def _product(pool: Pool) -> tuple[Direction, Direction]:
    """One text a product, its first photo's; right are all photos of the product.

    The full-database protocol of FashionViL (Han et al. 2022), FAME-ViL (2023) and FashionSAP (2023).
    """
    products = pool.products_N.numpy()
    # Of a product that has queries, the first of them: its text is then a caption of the held-out photos.
    order = np.lexsort((np.arange(len(products)), ~pool.is_query_N.numpy()))
    _, first = np.unique(products[order], return_index=True)
    text_photos = torch.from_numpy(np.sort(order[first]))
    texts = pool.caption_rows_NK[text_photos, 0]
    return _search(pool, texts, pool.products_N, pool.products_N[text_photos], text_photos=text_photos)


def _all_captions(pool: Pool) -> tuple[Direction, Direction]:
    """Every caption of a photo is a query for that photo, and any of them is right for it."""
    text_photos, columns = torch.nonzero(pool.caption_rows_NK >= 0, as_tuple=True)
    texts = pool.caption_rows_NK[text_photos, columns]
    if pool.further_F2 is not None:
        text_photos, by_photo = torch.cat([text_photos, pool.further_F2[:, 0]]).sort(stable=True)
        texts = torch.cat([texts, pool.further_F2[:, 1]])[by_photo]
    return _search(pool, texts, torch.arange(len(pool.images_ND)), text_photos, text_photos=text_photos)


def _search(
    pool: Pool, text_rows: Tensor, image_groups: Tensor, text_groups: Tensor, *, text_photos: Tensor
) -> tuple[Direction, Direction]:
    """Both directions; ``text_photos`` says of which photo each text is."""
    images_ND, texts_MD = pool.images_ND, pool.captions_VD[text_rows.to(pool.captions_VD.device)]
    image_queries, text_queries = pool.is_query_N, pool.is_query_N[text_photos]
    if bool(image_queries.all()):
        text_ranks, image_ranks = retrieval_ranks(images_ND, texts_MD, image_groups, text_groups)
    else:  # few queries in a large gallery: what does not start from one is not computed
        text_ranks, _ = retrieval_ranks(images_ND, texts_MD[text_queries], image_groups, text_groups[text_queries])
        _, image_ranks = retrieval_ranks(images_ND[image_queries], texts_MD, image_groups[image_queries], text_groups)
    return (
        Direction(text_ranks, pool.products_N[text_photos[text_queries]], len(images_ND)),
        Direction(image_ranks, pool.products_N[image_queries], len(texts_MD)),
    )


def _candidates_101(pool: Pool) -> tuple[Direction, Direction]:
    """1,000 photos against their first caption and those of 100 others of the same category and another product, and the
    captions against the photos, averaged over five draws: FashionBERT (Gao et al. 2020) and Kaleido-BERT (Zhuge et al. 2021).

    Photos whose category has too few others are no queries; all that can be are, where they are fewer than 1,000.
    """
    asked = Candidates(pool.products_N, pool.categories_N, pool.is_query_N)
    candidates_QC = torch.cat([asked.draw(number) for number in range(_NUM_DRAWS)])
    texts_ND = pool.captions_VD[pool.caption_rows_NK[:, 0].to(pool.captions_VD.device)]
    products_Q = pool.products_N[candidates_QC[:, 0]]
    return (
        Direction(_rank_first(texts_ND, pool.images_ND, candidates_QC), products_Q, 1 + _NUM_NEGATIVES),
        Direction(_rank_first(pool.images_ND, texts_ND, candidates_QC), products_Q, 1 + _NUM_NEGATIVES),
    )


class Candidates:
    """Photos that ``candidates_101`` can ask for: with enough photos of other products in their category.

    The arguments are those of a ``Pool``.

    Raises:
        UserError: no photo has enough others.
    """

    def __init__(self, products_N: Tensor, categories_N: Tensor, is_query_N: Tensor) -> None:
        products, categories = products_N.numpy(), categories_N.numpy()
        if not (categories >= 0).any():
            raise UserError(
                f"protocol {RetrievalProtocol.CANDIDATES_101.value} needs categories, which these shards do not name"
            )
        # Sorted so that a category is one stretch of photos, and a product one stretch within it.
        self._order = np.lexsort((products, categories))
        self._begin, end = _stretch(categories[self._order])
        self._own_begin, self._own_end = _stretch(np.stack([categories, products])[:, self._order])
        self._num_others = (end - self._begin) - (self._own_end - self._own_begin)
        is_known, is_query = categories[self._order] >= 0, is_query_N.numpy()[self._order]
        self._places = np.flatnonzero((self._num_others >= _NUM_NEGATIVES) & is_known & is_query)
        if not len(self._places):
            raise UserError(
                f"protocol {RetrievalProtocol.CANDIDATES_101.value} needs {_NUM_NEGATIVES} photos of other products in a "
                f"query's category; here are {self._num_others[is_known].max()} at most"
            )
        asked = self._order[self._places]
        self.num_photos = len(asked)
        self.num_products = len(np.unique(products[asked]))
        self.num_categories = len(np.unique(categories[asked]))

    def draw(self, number: int = 0) -> Tensor:
        """[Q, 101] photos: the query itself, then its negatives."""
        rng = numpy_generator(0, Stream.CANDIDATES, number)
        queries = rng.permutation(self._places)[:_NUM_QUERIES]
        rows = np.empty((len(queries), 1 + _NUM_NEGATIVES), dtype=np.int64)
        for row, place in enumerate(queries):
            others = self._begin[place] + rng.choice(self._num_others[place], _NUM_NEGATIVES, replace=False)
            others[others >= self._own_begin[place]] += self._own_end[place] - self._own_begin[place]
            rows[row] = [place, *others]
        return torch.from_numpy(self._order[rows])


COVERAGE = ("num_text_queries", "num_asked_photos", "num_asked_products", "num_asked_categories", "num_categories", "num_draws")
"""The metrics that ``coverage_line`` says."""


def coverage(pool: Pool, protocol: RetrievalProtocol) -> dict[str, int]:
    """For how much of a pool ``candidates_101`` can be asked; nothing for protocols that ask for everything.

    Raises:
        UserError: for nothing.
    """
    if protocol is not RetrievalProtocol.CANDIDATES_101:
        return {}
    asked = Candidates(pool.products_N, pool.categories_N, pool.is_query_N)
    return {
        "num_asked_photos": asked.num_photos,
        "num_asked_products": asked.num_products,
        "num_asked_categories": asked.num_categories,
        "num_categories": len(torch.unique(pool.categories_N[pool.is_query_N & (pool.categories_N >= 0)])),
        "num_draws": _NUM_DRAWS,
    }


def _stretch(values: Any) -> tuple[Any, Any]:
    """Where the run of equal values around each place begins and ends; ``values`` are [N], or [2, N] as pairs."""
    rows = np.atleast_2d(values)
    starts = np.flatnonzero(np.r_[True, (rows[:, 1:] != rows[:, :-1]).any(axis=0)])
    lengths = np.diff(np.r_[starts, rows.shape[1]])
    return np.repeat(starts, lengths), np.repeat(starts + lengths, lengths)


def _rank_first(queries_ND: Tensor, items_ND: Tensor, candidates_QC: Tensor) -> QueryRanks:
    """The rank of each row's first candidate among them all; equal items have equal scores (see ``metrics``)."""
    device = items_ND.device
    items_ND = F.normalize(items_ND, dim=1).nan_to_num() + 0.0
    first, distinct = distinct_rows(items_ND)
    distinct_UD = items_ND[first.to(device)]
    counts = []
    for rows_BC in candidates_QC.split(_QUERIES_AT_A_TIME):
        similarity_BU = F.normalize(queries_ND[rows_BC[:, 0].to(device)], dim=1).nan_to_num() @ distinct_UD.T
        scores_BC = similarity_BU.gather(1, distinct[rows_BC].to(device))
        own_B1 = scores_BC[:, :1]
        counts.append(torch.stack([(scores_BC > own_B1).sum(1), (scores_BC == own_B1).sum(1)]).cpu())
    num_better, num_tied = torch.cat(counts, dim=1)
    return QueryRanks(num_better, num_tied, torch.ones_like(num_tied))


_RULES: Mapping[RetrievalProtocol, Callable[[Pool], tuple[Direction, Direction]]] = {
    RetrievalProtocol.INSTANCE: _instance,
    RetrievalProtocol.PRODUCT: _product,
    RetrievalProtocol.CANDIDATES_101: _candidates_101,
    RetrievalProtocol.ALL_CAPTIONS: _all_captions,
}


def save_retrieval(path: Path, retrieval: Retrieval, **about: Any) -> None:
    """Keeps the queries' ranks (some 100 kB for 7,000 photos), so that models can be compared query by query later.

    ``about`` says of what they are; the file is written aside and renamed.
    """
    arrays: dict[str, Any] = {"protocol": retrieval.protocol.value, **about}
    for name, direction in (("text", retrieval.text_to_image), ("image", retrieval.image_to_text)):
        ranks = direction.ranks
        counts = torch.stack([ranks.num_better, ranks.num_tied, ranks.num_tied_relevant, direction.products_Q])
        arrays |= {f"{name}_queries": counts.numpy().astype(np.int32), f"{name}_gallery": direction.gallery_size}
    with atomic_write(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def load_retrieval(path: Path) -> tuple[Retrieval, dict[str, Any]]:
    """What ``save_retrieval`` wrote: ranks, and ``about``.

    Raises:
        OSError, ValueError, KeyError: there is no such file, or it is none of ours.
    """
    with open(path, "rb") as file, np.load(file) as saved:
        arrays = dict(saved)
    directions = []
    for name in ("text", "image"):
        num_better, num_tied, num_tied_relevant, products = torch.from_numpy(arrays.pop(f"{name}_queries").astype(np.int64))
        ranks = QueryRanks(num_better, num_tied, num_tied_relevant)
        directions.append(Direction(ranks, products, int(arrays.pop(f"{name}_gallery"))))
    protocol = RetrievalProtocol(str(arrays.pop("protocol")))
    return Retrieval(protocol, *directions), {name: value.item() for name, value in arrays.items()}
