"""Each protocol against a slow reading of its definition, on pools with ties, several photos a product and a gallery."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fashionclip_tune.config.choices import RetrievalProtocol as Protocol
from fashionclip_tune.errors import UserError
from fashionclip_tune.evaluation.evaluate import coverage_line, describe
from fashionclip_tune.evaluation.protocols import (
    Candidates,
    Direction,
    Pool,
    coverage,
    load_retrieval,
    retrieve,
    save_retrieval,
)
from tests.support.pools import NUM_CAPTIONS, pool


def expectation(scores: list[float], relevant: list[bool], k: int) -> float:
    """Chance that a relevant item is among the k first, where items of equal score are in random order."""
    best = max(score for score, right in zip(scores, relevant, strict=True) if right)
    places = k - sum(score > best for score in scores)
    tied = [right for score, right in zip(scores, relevant, strict=True) if score == best]
    if places <= 0:
        return 0.0
    drawn = min(places, len(tied))
    return 1 - math.comb(len(tied) - sum(tied), drawn) / math.comb(len(tied), drawn)


def mean_of(direction: Direction, k: int) -> float:
    return float(direction.hits(k).values_Q.mean())


def cosines(pool: Pool) -> Tensor:
    """[N, V] in float64."""
    unit = torch.nn.functional.normalize
    return unit(pool.images_ND.double(), dim=1) @ unit(pool.captions_VD.double(), dim=1).T


@pytest.mark.parametrize("num_queries", [None, 30])
def test_instance(num_queries: int | None) -> None:
    drawn = pool(num_queries=num_queries)
    result = retrieve(drawn, Protocol.INSTANCE)
    first, scores = drawn.caption_rows_NK[:, 0].tolist(), cosines(drawn)
    queries = range(num_queries or 90)
    for k in (1, 5, 10):
        image_to_text = [expectation(scores[i, first].tolist(), [j == i for j in range(90)], k) for i in queries]
        text_to_image = [expectation(scores[:, first[i]].tolist(), [j == i for j in range(90)], k) for i in queries]
        assert mean_of(result.image_to_text, k) == pytest.approx(np.mean(image_to_text), abs=1e-9)
        assert mean_of(result.text_to_image, k) == pytest.approx(np.mean(text_to_image), abs=1e-9)
    assert (result.text_to_image.gallery_size, result.image_to_text.gallery_size) == (90, 90)
    assert result.image_to_text.products_Q.tolist() == drawn.products_N[: num_queries or 90].tolist()


@pytest.mark.parametrize("num_queries", [None, 30])
def test_product(num_queries: int | None) -> None:
    drawn = pool(num_queries=num_queries)
    result = retrieve(drawn, Protocol.PRODUCT)
    products, scores = drawn.products_N.tolist(), cosines(drawn)
    text_of = dict[Any, Any]()
    for photo in range(90):
        text_of.setdefault(products[photo], int(drawn.caption_rows_NK[photo, 0]))
    queries = range(num_queries or 90)
    asked = sorted({products[photo] for photo in queries})
    names = sorted(text_of)
    for k in (1, 5, 10):
        image_to_text = [
            expectation([float(scores[i, text_of[p]]) for p in names], [p == products[i] for p in names], k) for i in queries
        ]
        text_to_image = [expectation(scores[:, text_of[p]].tolist(), [q == p for q in products], k) for p in asked]
        assert mean_of(result.image_to_text, k) == pytest.approx(np.mean(image_to_text), abs=1e-9)
        assert mean_of(result.text_to_image, k) == pytest.approx(np.mean(text_to_image), abs=1e-9)
    assert result.text_to_image.products_Q.tolist() == asked
    assert (result.text_to_image.gallery_size, result.image_to_text.gallery_size) == (90, len(names))


def test_a_product_with_held_out_photos_is_asked_for_by_a_caption_of_theirs() -> None:
    """Photo 0 is of the gallery, photo 1 held out, both of product 0, with captions of their own."""
    eye = torch.eye(4)
    drawn = Pool(
        images_ND=eye[[0, 1, 2]],
        captions_VD=eye,
        caption_rows_NK=torch.tensor([[3], [1], [2]]),
        products_N=torch.tensor([0, 0, 1]),
        categories_N=torch.tensor([-1, -1, -1]),
        is_query_N=torch.tensor([False, True, False]),
    )
    result = retrieve(drawn, Protocol.PRODUCT)
    assert mean_of(result.text_to_image, 1) == 1.0
    assert len(result.text_to_image.products_Q) == len(result.image_to_text.products_Q) == 1


@pytest.mark.parametrize("num_queries", [None, 30])
def test_all_captions(num_queries: int | None) -> None:
    drawn = pool(num_queries=num_queries)
    result = retrieve(drawn, Protocol.ALL_CAPTIONS)
    scores = cosines(drawn)
    pairs = [(i, int(row)) for i in range(90) for row in drawn.caption_rows_NK[i] if row >= 0]
    queries = range(num_queries or 90)
    for k in (1, 5, 10):
        image_to_text = [
            expectation([float(scores[i, row]) for _, row in pairs], [j == i for j, _ in pairs], k) for i in queries
        ]
        text_to_image = [
            expectation(scores[:, row].tolist(), [j == i for j in range(90)], k) for i, row in pairs if i in queries
        ]
        assert mean_of(result.image_to_text, k) == pytest.approx(np.mean(image_to_text), abs=1e-9)
        assert mean_of(result.text_to_image, k) == pytest.approx(np.mean(text_to_image), abs=1e-9)
    assert len(pairs) == 90 + 2 * 72
    assert (result.text_to_image.gallery_size, result.image_to_text.gallery_size) == (90, len(pairs))


def test_candidates_are_100_others_of_the_category_and_another_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from fashionclip_tune.evaluation import protocols

    drawn = pool(600, num_queries=450)
    drawn = replace(drawn, categories_N=torch.where(drawn.products_N < 20, -1, drawn.categories_N))
    monkeypatch.setattr(protocols, "_NUM_QUERIES", 150)
    draws = [Candidates(drawn.products_N, drawn.categories_N, drawn.is_query_N).draw(number) for number in range(5)]
    seen = set()
    for candidates in draws:
        assert candidates.shape == (150, 101)
        queries, others = candidates[:, :1], candidates[:, 1:]
        assert bool(drawn.is_query_N[queries].all())
        assert bool((drawn.categories_N[queries] >= 0).all())
        assert bool((drawn.categories_N[others] == drawn.categories_N[queries]).all())
        assert bool((drawn.products_N[others] != drawn.products_N[queries]).all())
        assert all(len(set(row)) == 101 for row in candidates.tolist())
        assert len(set(queries.flatten().tolist())) == 150
        seen.update(others.flatten().tolist())
    assert not torch.equal(draws[0], draws[1])
    # Every photo with a category can be a negative, those of the gallery included.
    assert seen == set(torch.nonzero(drawn.categories_N >= 0).flatten().tolist())
    assert torch.equal(draws[3], Candidates(drawn.products_N, drawn.categories_N, drawn.is_query_N).draw(3))

    result = retrieve(drawn, Protocol.CANDIDATES_101)
    scores, first = cosines(drawn), drawn.caption_rows_NK[:, 0]
    for k in (1, 10):
        rows = torch.cat(draws).tolist()
        relevant = [True] + [False] * 100
        image_to_text = [expectation(scores[row[0], first[row]].tolist(), relevant, k) for row in rows]
        text_to_image = [expectation(scores[row, first[row[0]]].tolist(), relevant, k) for row in rows]
        assert mean_of(result.image_to_text, k) == pytest.approx(np.mean(image_to_text), abs=1e-9)
        assert mean_of(result.text_to_image, k) == pytest.approx(np.mean(text_to_image), abs=1e-9)


def test_candidates_say_for_how_much_of_the_data_they_could_be_asked() -> None:
    # 150 photos of 75 products with 149 others each, 40 photos of 20 with too few, 10 photos without a category.
    categories = torch.tensor([0] * 150 + [1] * 40 + [-1] * 10)
    drawn = replace(pool(200), products_N=torch.arange(200) // 2, categories_N=categories, is_query_N=torch.ones(200) > 0)
    assert coverage(drawn, Protocol.CANDIDATES_101) == {
        "num_asked_photos": 150,
        "num_asked_products": 75,
        "num_asked_categories": 1,
        "num_categories": 2,
        "num_draws": 5,
    }
    assert coverage(drawn, Protocol.PRODUCT) == {}
    metrics, _ = describe(drawn, Protocol.CANDIDATES_101)
    line = coverage_line(metrics)
    assert line is not None
    assert "could be asked for 150 of 200 photos (75 of 100 products, 1 of 2 categories)" in line
    assert line.endswith("Asked in 5 draws: 750 times")
    assert coverage_line(describe(drawn, Protocol.INSTANCE)[0]) is None


def test_a_collapsed_model_scores_chance_by_every_protocol() -> None:
    drawn = pool(300)
    drawn = replace(drawn, images_ND=torch.ones(300, 12), captions_VD=torch.ones(NUM_CAPTIONS, 12))
    assert mean_of(retrieve(drawn, Protocol.CANDIDATES_101).image_to_text, 10) == pytest.approx(10 / 101)
    assert mean_of(retrieve(drawn, Protocol.CANDIDATES_101).text_to_image, 1) == pytest.approx(1 / 101)
    assert mean_of(retrieve(drawn, Protocol.INSTANCE).image_to_text, 10) == pytest.approx(10 / 300)
    num_products = len(drawn.products_N.unique())
    assert mean_of(retrieve(drawn, Protocol.PRODUCT).image_to_text, 10) == pytest.approx(10 / num_products)


@pytest.mark.parametrize(("categories", "message"), [(-1, "needs categories"), (0, "here are 8\\d at most")])
def test_candidates_need_categories_that_are_large_enough(categories: int, message: str) -> None:
    drawn = pool(90)
    with pytest.raises(UserError, match=message):
        retrieve(replace(drawn, categories_N=torch.full((90,), categories)), Protocol.CANDIDATES_101)


@pytest.mark.parametrize("protocol", list(Protocol))
def test_ranks_survive_a_file(tmp_path: Path, protocol: Protocol) -> None:
    result = retrieve(pool(300), protocol)
    save_retrieval(tmp_path / "run" / "queries.npz", result, step=7, data="abc")
    read, about = load_retrieval(tmp_path / "run" / "queries.npz")
    assert about == {"step": 7, "data": "abc"}
    assert read.protocol is protocol
    for ours, theirs in zip(result.hits(10), read.hits(10), strict=True):
        assert np.array_equal(ours.values_Q, theirs.values_Q)
        assert np.array_equal(ours.products_Q, theirs.products_Q)
    assert [d.gallery_size for d in read[1:]] == [d.gallery_size for d in result[1:]]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["queries.npz"]
