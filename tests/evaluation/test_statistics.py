"""Intervals and the paired test against slow references and against what they promise: coverage, and false alarms."""

import numpy as np
import pytest

from fashionclip_tune.evaluation.statistics import PairedTest, QueryValues, bootstrap_interval, paired_test


def values(numbers: list[float], products: list[int]) -> QueryValues:
    return QueryValues(np.array(numbers, dtype=float), np.array(products))


def drawn(rng: np.random.Generator, num_products: int, photos: int, level: float) -> QueryValues:
    """Each product is easy or hard; its photos follow it."""
    easy = rng.random(num_products) < level
    return QueryValues(np.repeat(easy, photos).astype(float), np.repeat(np.arange(num_products), photos))


def slow_interval(directions: list[QueryValues], resamples: int) -> tuple[float, float]:
    rng = np.random.default_rng(99)
    products = np.unique(np.concatenate([direction.products_Q for direction in directions]))
    means = []
    for _ in range(resamples):
        chosen = rng.choice(products, len(products))
        by_direction = [np.concatenate([d.values_Q[d.products_Q == product] for product in chosen]) for d in directions]
        means.append(np.mean([found.mean() for found in by_direction]))
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def test_the_interval_is_that_of_drawing_products_with_all_their_queries() -> None:
    rng = np.random.default_rng(1)
    products = rng.integers(40, size=150) * 7
    texts, images = QueryValues(rng.random(150), products), QueryValues(rng.random(150) ** 3, products)
    assert bootstrap_interval([texts, images]) == pytest.approx(slow_interval([texts, images], 2_000), abs=0.006)


def test_the_interval_holds_the_truth_in_about_19_of_20_data_sets() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        low, high = bootstrap_interval([drawn(rng, 120, 4, 0.6)])
        held += low <= 0.6 <= high
    assert 0.90 <= held / 200 <= 0.99


def test_more_photos_of_the_same_products_make_nothing_more_certain() -> None:
    rng = np.random.default_rng(3)
    one = drawn(rng, 100, 1, 0.5)
    ten = QueryValues(np.repeat(one.values_Q, 10), np.repeat(one.products_Q, 10))
    assert bootstrap_interval([ten]) == pytest.approx(bootstrap_interval([one]), abs=1e-12)


def test_what_all_products_agree_on_is_certain() -> None:
    assert bootstrap_interval([values([0.25] * 6, [1, 1, 2, 3, 3, 3])]) == (0.25, 0.25)


def test_a_direction_may_have_queries_of_some_products_only() -> None:
    texts, images = values([1.0, 0.0], [5, 9]), values([1.0, 1.0, 0.0, 0.5], [5, 5, 7, 9])
    low, high = bootstrap_interval([texts, images])
    assert 0 <= low < 0.56 < high <= 1


def test_the_p_value_is_the_share_of_all_ways_to_swap_the_models() -> None:
    first = values([0.9, 0.8, 0.7, 0.9, 0.2, 0.6], [1, 1, 2, 3, 4, 5])
    second = values([0.1, 0.6, 0.2, 0.6, 0.3, 0.6], [1, 1, 2, 3, 4, 5])
    per_product = np.array([0.8 + 0.2, 0.5, 0.3, -0.1, 0.0]) / 6
    signs = np.array(np.meshgrid(*[[1, -1]] * 5)).reshape(5, -1)
    exact = np.mean(np.abs(per_product @ signs) >= abs(per_product.sum()) - 1e-12)
    test = paired_test([first], [second])
    assert test.difference == pytest.approx(per_product.sum())
    assert test.p_value == pytest.approx(exact, abs=0.03)
    assert test.low <= test.difference <= test.high


def test_equal_models_are_a_tie_and_swapping_them_changes_the_sign_only() -> None:
    rng = np.random.default_rng(4)
    one, other = drawn(rng, 60, 2, 0.7), drawn(rng, 60, 2, 0.4)
    same = paired_test([one], [one])
    assert same == PairedTest(0.0, 0.0, 0.0, 1.0)
    assert same.is_tie
    forward, backward = paired_test([one], [other]), paired_test([other], [one])
    assert backward.difference == -forward.difference
    assert backward.p_value == forward.p_value
    assert (backward.low, backward.high) == pytest.approx((-forward.high, -forward.low))


def test_false_alarms_are_as_rare_as_promised_and_real_differences_are_found() -> None:
    rng = np.random.default_rng(5)
    alarms = found = 0
    for _ in range(200):
        hard = rng.random(200) < 0.5
        one, other, better = (
            QueryValues(np.repeat((rng.random(200) < chance) & hard, 3).astype(float), np.repeat(np.arange(200), 3))
            for chance in (0.6, 0.6, 0.9)
        )
        alarms += not paired_test([one], [other]).is_tie
        found += not paired_test([better], [one]).is_tie
    assert alarms / 200 <= 0.09
    assert found / 200 >= 0.9


def test_other_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="same queries"):
        paired_test([values([1.0, 0.0], [1, 2])], [values([1.0, 0.0], [1, 3])])


def test_many_products_are_drawn_in_portions_with_the_same_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    from fashionclip_tune.evaluation import statistics

    rng = np.random.default_rng(6)
    one, other = drawn(rng, 80, 2, 0.6), drawn(rng, 80, 2, 0.5)
    whole, test = bootstrap_interval([one]), paired_test([one], [other])
    monkeypatch.setattr(statistics, "_WEIGHTS_AT_A_TIME", 1_000)
    assert bootstrap_interval([one]) == pytest.approx(whole, abs=0.02)
    assert paired_test([one], [other]).p_value == pytest.approx(test.p_value, abs=0.05)
