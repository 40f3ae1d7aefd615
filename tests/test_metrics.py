"""Retrieval recall against a slow, exact reference: fractions over all orders of the items."""

import itertools
import math
import statistics
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip_train.train import get_clip_metrics
from torch import Tensor

from fashionclip_tune import metrics
from fashionclip_tune.metrics import retrieval_ranks, retrieval_recall

# Rows of four entries, each 1 or -1, have length 2: their cosine similarities are exact, so ties are exact too.
SIGNS = list(itertools.product((1, -1), repeat=4))
signs = st.sampled_from(SIGNS)
samples = st.lists(st.tuples(signs, st.integers(0, 3)), min_size=1, max_size=5)


def slow_recall(
    queries: Sequence[Sequence[int]],
    items: Sequence[Sequence[int]],
    query_groups: Sequence[int],
    item_groups: Sequence[int],
    k: int,
) -> tuple[Fraction | None, int]:
    """Mean over the queries that have a relevant item, and over all orders in which the items may come before sorting."""
    shares = []
    for query, group in zip(queries, query_groups, strict=True):
        if group not in item_groups:
            continue
        scores = [sum(a * b for a, b in zip(query, item, strict=True)) for item in items]
        orders = list(itertools.permutations(range(len(items))))
        num_hits = sum(
            any(item_groups[item] == group for item in sorted(order, key=lambda item: -scores[item])[:k]) for order in orders
        )
        shares.append(Fraction(num_hits, len(orders)))
    return (sum(shares, Fraction(0)) / len(shares) if shares else None), len(shares)


def embeddings(num: int, dim: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(images=samples, texts=samples)
def test_recall_is_the_exact_expectation_over_the_orders_of_ties(
    images: list[tuple[tuple[int, ...], int]], texts: list[tuple[tuple[int, ...], int]]
) -> None:
    image_rows, image_groups = zip(*images, strict=True)
    text_rows, text_groups = zip(*texts, strict=True)
    tensors = [torch.tensor(x) for x in (image_rows, text_rows, image_groups, text_groups)]
    if not set(image_groups) & set(text_groups):
        with pytest.raises(ValueError, match="no query has a relevant item"):
            retrieval_recall(*tensors)
        return
    ours = retrieval_recall(*tensors, ks=(1, 2, 3, 7))
    for k in (1, 2, 3, 7):
        text_to_image, num_texts = slow_recall(text_rows, image_rows, text_groups, image_groups, k)
        image_to_text, num_images = slow_recall(image_rows, text_rows, image_groups, text_groups, k)
        assert text_to_image is not None
        assert image_to_text is not None
        assert ours.text_to_image[k] == pytest.approx(float(text_to_image), abs=1e-12)
        assert ours.image_to_text[k] == pytest.approx(float(image_to_text), abs=1e-12)
        assert ours.mean[k] == pytest.approx(float(text_to_image + image_to_text) / 2, abs=1e-12)
        assert (ours.num_text_queries, ours.num_image_queries) == (num_texts, num_images)
        assert ours.num_left_out == len(images) + len(texts) - num_texts - num_images


def test_without_ties_it_is_open_clips_own_recall() -> None:
    images = F.normalize(embeddings(300), dim=1)
    texts = F.normalize(images + 0.35 * embeddings(300, seed=1), dim=1)
    theirs = get_clip_metrics(images, texts, torch.tensor(1.0))
    ours = retrieval_recall(images, texts, torch.arange(300), torch.arange(300))
    for k in (1, 5, 10):
        assert 0.1 < ours.mean[k] < 0.99
        assert ours.image_to_text[k] == pytest.approx(theirs[f"image_to_text_R@{k}"], abs=1e-9)
        assert ours.text_to_image[k] == pytest.approx(theirs[f"text_to_image_R@{k}"], abs=1e-9)


def test_any_of_several_captions_and_any_of_several_images_is_a_hit() -> None:
    # Two photos of product 7, one of product 8; three captions of 7, the last of them misleading; one of 8.
    images = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.0, 1.0, 0.0]])
    texts = torch.tensor([[1.0, 0.0, 0.1], [0.8, 0.2, 0.0], [0.1, 1.0, 0.0], [0.3, 0.9, 0.2]])
    recall = retrieval_recall(images, texts, torch.tensor([7, 7, 8]), torch.tensor([7, 7, 7, 8]), ks=(1, 2))
    # The misleading caption finds product 8 first, then a photo of 7; the photo of 8 finds it first, then its own.
    assert recall.text_to_image == {1: 0.75, 2: 1.0}
    assert recall.image_to_text == {1: pytest.approx(2 / 3), 2: 1.0}


def test_queries_without_a_relevant_item_are_left_out_and_counted() -> None:
    same = torch.eye(4)
    recall = retrieval_recall(same, same[:3], torch.tensor([0, 1, 8, 9]), torch.tensor([0, 1, 2]), ks=(1,))
    assert recall.mean == {1: 1.0}
    assert (recall.num_image_queries, recall.num_text_queries, recall.num_left_out) == (2, 2, 3)


@pytest.mark.parametrize(("num_images", "num_texts"), [(2, 2), (257, 257), (1001, 5), (1, 1001), (2, 999), (505, 7)])
def test_a_collapsed_model_scores_exactly_chance(num_images: int, num_texts: int) -> None:
    # Several points: whether a matrix product gives equal columns equal sums depends on the numbers and the shape.
    for seed in range(8):
        point = embeddings(1, dim=512, seed=seed)
        images, texts = point.repeat(num_images, 1), point.repeat(num_texts, 1)
        recall = retrieval_recall(images, texts, torch.arange(num_images), torch.arange(num_texts))
        for k in (1, 5, 10):
            assert recall.text_to_image[k] == pytest.approx(min(1, k / num_images), abs=1e-9)
            assert recall.image_to_text[k] == pytest.approx(min(1, k / num_texts), abs=1e-9)


@pytest.mark.parametrize("num_relevant", [1, 3, 500, 1_990, 2_000])
def test_chance_with_several_relevant_items_is_hypergeometric(num_relevant: int) -> None:
    groups = torch.where(torch.arange(2_000) < num_relevant, 0, 1 + torch.arange(2_000))
    recall = retrieval_recall(torch.ones(2_000, 8), torch.ones(1, 8), groups, torch.tensor([0]))
    for k in (1, 5, 10):
        misses = Fraction(math.comb(2_000 - num_relevant, k), math.comb(2_000, k))
        assert recall.text_to_image[k] == pytest.approx(float(1 - misses), abs=1e-9)


def test_photos_that_share_a_caption_share_its_rank() -> None:
    """Equal captions, as real catalogues have them, tie exactly whatever tile of a matrix product they fall into."""
    distinct = embeddings(201, dim=512, seed=3)
    caption_of = torch.arange(1005) % 201
    texts, images = distinct[caption_of], distinct[caption_of] + 1e-3 * embeddings(1005, dim=512, seed=4)
    instance = torch.arange(1005)
    for queries in (slice(None), *(slice(i, i + 1) for i in range(0, 1005, 50))):
        recall = retrieval_recall(images[queries], texts, instance[queries], instance, ks=(1, 3, 5, 10))
        assert recall.image_to_text == pytest.approx({1: 0.2, 3: 0.6, 5: 1.0, 10: 1.0}, abs=1e-9)


@pytest.mark.parametrize("tile", [1, 7, 20])
def test_the_size_of_the_tiles_changes_nothing(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    rows = torch.tensor(SIGNS)[torch.randint(16, (61,), generator=torch.Generator().manual_seed(5))]
    tied = (rows[:31], rows[31:], torch.arange(31) % 9, torch.arange(30) % 11)
    untied = (embeddings(31), embeddings(30, seed=1), torch.arange(31) % 9, torch.arange(30) % 11)
    whole = [retrieval_recall(*inputs) for inputs in (tied, untied)]
    monkeypatch.setattr(metrics, "_CPU_TILE", tile)
    for before, inputs in zip(whole, (tied, untied), strict=True):
        tiled = retrieval_recall(*inputs)
        assert tiled.text_to_image == pytest.approx(before.text_to_image, abs=1e-12)
        assert tiled.image_to_text == pytest.approx(before.image_to_text, abs=1e-12)
        assert tiled.num_left_out == before.num_left_out


def test_the_length_of_an_embedding_does_not_count() -> None:
    images, texts, groups = embeddings(40), embeddings(40, seed=1), torch.arange(40) % 13
    lengths = torch.logspace(-3, 3, 40)[:, None]
    assert retrieval_recall(images * lengths, texts, groups, groups) == retrieval_recall(images, texts, groups, groups)


@pytest.mark.parametrize(
    ("images", "texts", "image_groups", "text_groups", "message"),
    [
        (torch.ones(3, 4), torch.ones(3, 4), torch.arange(2), torch.arange(3), "one group id"),
        (torch.ones(3, 4), torch.ones(3, 4), torch.arange(3), torch.arange(4), "one group id"),
        (torch.ones(3, 4), torch.ones(3, 5), torch.arange(3), torch.arange(3), r"\(3, 4\) and \(3, 5\)"),
        (torch.ones(3), torch.ones(3), torch.arange(3), torch.arange(3), r"\(3,\) and \(3,\)"),
        (torch.ones(3, 4), torch.ones(3, 4), torch.arange(3), torch.arange(3) + 9, "do the group ids"),
        (torch.ones(0, 4), torch.ones(3, 4), torch.arange(0), torch.arange(3), "0 images and 3 texts"),
        (torch.ones(3, 4), torch.ones(0, 4), torch.arange(3), torch.arange(0), "3 images and 0 texts"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    images: Tensor, texts: Tensor, image_groups: Tensor, text_groups: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_recall(images, texts, image_groups, text_groups)


def published_recall(images: Tensor, texts: Tensor, k: int) -> tuple[float, float]:
    """As the published runs counted: the whole matrix, sorted; pair i is right for i only."""
    similarity_NM = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    own = torch.arange(len(images))[:, None]
    text_to_image = (similarity_NM.T.argsort(dim=1, descending=True)[:, :k] == own).any(dim=1)
    image_to_text = (similarity_NM.argsort(dim=1, descending=True)[:, :k] == own).any(dim=1)
    return float(text_to_image.double().mean()), float(image_to_text.double().mean())


def test_where_the_published_rule_applies_it_is_the_published_figure() -> None:
    images = embeddings(700, dim=64)
    texts = images + 3 * embeddings(700, dim=64, seed=1)
    ours = retrieval_recall(images, texts, torch.arange(700), torch.arange(700))
    for k in (5, 10):
        text_to_image, image_to_text = published_recall(images, texts, k)
        assert 0.1 < text_to_image < 0.9
        assert ours.text_to_image[k] == pytest.approx(text_to_image, abs=1e-12)
        assert ours.image_to_text[k] == pytest.approx(image_to_text, abs=1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(images=samples, texts=samples)
def test_ranks_are_the_expectation_over_the_orders_of_ties(
    images: list[tuple[tuple[int, ...], int]], texts: list[tuple[tuple[int, ...], int]]
) -> None:
    image_rows, image_groups = zip(*images, strict=True)
    text_rows, text_groups = zip(*texts, strict=True)
    if not set(image_groups) & set(text_groups):
        return
    expected = []
    for query, group in zip(text_rows, text_groups, strict=True):
        if group not in image_groups:
            continue
        scores = [sum(a * b for a, b in zip(query, item, strict=True)) for item in image_rows]
        ranks = [
            1 + [image_groups[item] == group for item in sorted(order, key=lambda item: -scores[item])].index(True)
            for order in itertools.permutations(range(len(image_rows)))
        ]
        expected.append(Fraction(sum(ranks), len(ranks)))
    recall = retrieval_recall(*[torch.tensor(x) for x in (image_rows, text_rows, image_groups, text_groups)])
    assert recall.mean_rank_text_to_image == pytest.approx(float(sum(expected) / len(expected)), abs=1e-12)
    assert recall.median_rank_text_to_image == pytest.approx(float(statistics.median(expected)), abs=1e-12)


@pytest.mark.parametrize("dim", [1, 33, 512])
def test_a_positive_has_the_score_that_it_is_compared_with(dim: int) -> None:
    """Over many tiles, in the second product of a tile as in the first: else it would not be found among its equals."""
    images, texts = embeddings(1_300, dim=dim), embeddings(1_100, dim=dim, seed=1)
    groups_of_images, groups_of_texts = torch.arange(1_300) * 7 % 900, torch.arange(1_100) * 11 % 900
    for direction in retrieval_ranks(images, texts, groups_of_images, groups_of_texts):
        assert bool((direction.num_tied >= direction.num_tied_relevant).all())
        assert bool((direction.num_tied_relevant[direction.counted] >= 1).all())
        assert bool((direction.num_better + direction.num_tied <= 1_300).all())
        assert int(direction.counted.sum()) > 1_000
    both = retrieval_recall(images, texts, groups_of_images, groups_of_texts)
    turned = retrieval_recall(texts, images, groups_of_texts, groups_of_images)
    assert both.text_to_image == pytest.approx(turned.image_to_text, abs=2e-3)


def test_an_embedding_that_is_no_number_scores_as_nothing_known() -> None:
    images, texts = embeddings(50), embeddings(50, seed=1)
    images[:] = torch.nan
    recall = retrieval_recall(images, texts, torch.arange(50), torch.arange(50))
    assert recall.mean[10] == pytest.approx(0.2)
    assert recall.mean_rank_text_to_image == pytest.approx(25.5)


def test_many_equal_items_do_not_need_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """One caption for 3,000 photos in 1,000 groups: it is multiplied once, and spread a tile at a time."""
    monkeypatch.setattr(metrics, "_CPU_TILE", 64)
    largest = 0
    count = metrics._Block.count

    def counted(block: metrics._Block, marks: Tensor) -> None:
        nonlocal largest
        largest = max(largest, block.scores_NM.numel())
        count(block, marks)

    monkeypatch.setattr(metrics._Block, "count", counted)
    groups = torch.arange(3_000) % 1_000
    texts = embeddings(1).repeat(500, 1)
    recall = retrieval_recall(embeddings(3_000, seed=2), texts, groups, torch.arange(500), ks=(10,))
    assert largest == 64 * 64
    assert recall.image_to_text[10] == pytest.approx(10 / 500)
