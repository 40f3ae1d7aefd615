"""How certain a figure is: resampling of products, because photos of one product succeed and fail together.

Shape legend: P products, Q queries, R resamples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_LEVEL = 0.95
_RESAMPLES = 2_000
_WEIGHTS_AT_A_TIME = 2**21  # 16 MB
_SIGNIFICANCE = 0.05

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class QueryValues(NamedTuple):
    """Of one direction: a value for each query, such as its probability of a hit, and the query's product."""

    values_Q: Floats
    products_Q: Integers


@dataclass(frozen=True)
class PairedTest:
    """What one model is better by on the same queries, and whether that is more than chance."""

    difference: float
    low: float
    high: float
    """95 % interval of the difference."""
    p_value: float
    """Chance of a difference this large or larger, either way, if the models were equal."""

    @property
    def is_tie(self) -> bool:
        return self.p_value >= _SIGNIFICANCE


def bootstrap_interval(directions: Sequence[QueryValues], *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over directions of their mean values (Efron & Tibshirani 1993, chapter 13).

    Products are drawn with replacement, each with all its queries of all directions (cluster bootstrap: Davison & Hinkley
    1997, section 3.8).
    """
    products_P = np.unique(np.concatenate([direction.products_Q for direction in directions]))
    sums = [_per_product(direction, products_P, direction.values_Q) for direction in directions]
    counts = [_per_product(direction, products_P, np.ones_like(direction.values_Q)) for direction in directions]
    means_R = np.concatenate(list(_resampled_means(sums, counts, seed)))
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(means_R, [tail, 1 - tail])
    return float(low), float(high)


def paired_test(first: Sequence[QueryValues], second: Sequence[QueryValues], *, seed: int = 0) -> PairedTest:
    """Whether ``first`` is better than ``second`` on the same queries, direction by direction.

    The p-value is that of a permutation test which swaps the models product by product (Fisher's; in retrieval: Smucker et
    al. 2007), the interval that of ``bootstrap_interval`` for the differences.

    Raises:
        ValueError: the queries are not the same ones.
    """
    for one, other in zip(first, second, strict=True):
        if not np.array_equal(one.products_Q, other.products_Q):
            raise ValueError("a paired test needs the same queries in the same order")
    differences = [QueryValues(one.values_Q - other.values_Q, one.products_Q) for one, other in zip(first, second, strict=True)]
    products_P = np.unique(np.concatenate([direction.products_Q for direction in differences]))
    # What each product adds to the difference of the means.
    shares = [_per_product(direction, products_P, direction.values_Q) / len(direction.values_Q) for direction in differences]
    share_P = np.mean(shares, axis=0)
    difference = float(share_P.sum())
    rng = np.random.default_rng(seed)
    num_as_large = 0
    for num in _portions(len(products_P)):
        signs_RP = 2.0 * rng.integers(2, size=(num, len(products_P)), dtype=np.int8) - 1
        num_as_large += int((np.abs(signs_RP @ share_P) >= abs(difference) - 1e-12).sum())
    low, high = bootstrap_interval(differences, seed=seed)
    return PairedTest(difference, low, high, (1 + num_as_large) / (1 + _RESAMPLES))


def _per_product(direction: QueryValues, products_P: Integers, values_Q: Floats) -> Floats:
    places_Q = np.searchsorted(products_P, direction.products_Q)
    return np.bincount(places_Q, weights=values_Q, minlength=len(products_P)).astype(np.float64)


def _resampled_means(sums: Sequence[Floats], counts: Sequence[Floats], seed: int) -> Iterator[Floats]:
    num_products = len(sums[0])
    rng = np.random.default_rng(seed)
    for num in _portions(num_products):
        drawn_RP = rng.integers(num_products, size=(num, num_products))
        drawn_RP += num_products * np.arange(num)[:, None]
        weights_RP = np.bincount(drawn_RP.ravel(), minlength=num * num_products).reshape(num, num_products).astype(float)
        # A direction without any query in a resample (few products, some without queries there) counts as its sum of 0.
        means = [(weights_RP @ total) / np.maximum(weights_RP @ count, 1) for total, count in zip(sums, counts, strict=True)]
        yield np.mean(means, axis=0)


def _portions(num_products: int) -> Iterator[int]:
    """Sizes of the portions in which the resamples are drawn: memory stays bounded."""
    at_a_time = max(1, _WEIGHTS_AT_A_TIME // num_products)
    for start in range(0, _RESAMPLES, at_a_time):
        yield min(at_a_time, _RESAMPLES - start)
