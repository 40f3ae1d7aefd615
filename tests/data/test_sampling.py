"""Batches without two photos of one product, and captions by weight."""

from collections import Counter
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fashionclip_tune.config.options import AugmentationConfig
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.batches import _chosen_caption
from fashionclip_tune.data.index import load_index
from fashionclip_tune.data.sampling import SampleOrder, unique_product_batches
from fashionclip_tune.data.shards import find_dataset
from fashionclip_tune.errors import UserError


@given(st.lists(st.integers(1, 6), min_size=4, max_size=30), st.integers(2, 4), st.integers(0, 1000))
def test_no_batch_has_a_product_twice_and_no_sample_is_lost_or_preferred(
    photos_a_product: Any, batch_size: Any, seed: int
) -> None:
    products = np.repeat(np.arange(len(photos_a_product)), photos_a_product)
    epochs = (np.random.default_rng([seed, epoch]).permutation(len(products)) for epoch in count())
    num_epochs = 4
    # Samples wait while their product is in every batch: a product with more photos than there are batches waits longest.
    num_batches = num_epochs * len(products) // batch_size
    seen: Counter[int] = Counter()
    for batch in islice(unique_product_batches(epochs, products, batch_size), num_batches):
        assert len(batch) == batch_size
        assert len(set(products[batch])) == batch_size
        seen.update(batch.tolist())
    assert sum(seen.values()) == num_batches * batch_size
    if max(photos_a_product) * batch_size <= len(products) // 2:  # nothing has to wait for more than an epoch
        assert max(seen.values()) <= num_epochs + 1
        assert min(seen[sample] for sample in range(len(products))) >= num_epochs - 2


def order_of(tiny_config: ProjectConfig, garments: Path, **changes: Any) -> Any:
    index = load_index(find_dataset(garments).train)
    return SampleOrder(tiny_config.with_overrides(changes), index), index


@pytest.mark.parametrize("unique", [False, True])
def test_any_batch_asked_for_in_any_order_is_the_same(tiny_config: ProjectConfig, garments: Path, unique: Any) -> None:
    order, index = order_of(tiny_config, garments, **{"training.unique_products": unique})
    in_order = [order.batch(step).tolist() for step in range(25)]
    for step in (24, 3, 3, 17, 0):
        again, _ = order_of(tiny_config, garments, **{"training.unique_products": unique})
        assert order.batch(step).tolist() == again.batch(step).tolist() == in_order[step]
    repeats = [len(batch) - len(set(index.product_ids[batch])) for batch in in_order]
    assert (max(repeats) > 0) is not unique


def test_batches_larger_than_the_number_of_products_are_refused(tiny_config: ProjectConfig, garments: Path) -> None:
    with pytest.raises(UserError, match="batches of 96 need as many products, the training set has 80"):
        order_of(
            tiny_config,
            garments,
            **{
                "training.unique_products": True,
                "training.batch_size": 96,
                "training.budget_examples": None,
                "training.stage_examples": None,
            },
        )


@pytest.mark.parametrize(
    ("probability", "expected"), [(0.0, (0.0, 0.5, 0.5)), (0.2, (0.2, 0.4, 0.4)), (0.9, (0.9, 0.05, 0.05))]
)
def test_weighted_captions_come_with_their_probability(probability: Any, expected: Any) -> None:
    captions = AugmentationConfig(caption="weighted", original_caption_probability=probability)
    draws = (np.arange(10_000) + 0.5) / 10_000
    chosen = Counter(_chosen_caption(captions, float(draw), 3) for draw in draws)
    assert tuple(chosen[number] / 10_000 for number in range(3)) == pytest.approx(expected)
    assert {_chosen_caption(captions, float(draw), 1) for draw in draws} == {0}
