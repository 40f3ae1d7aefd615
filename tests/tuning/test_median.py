"""The median stopping rule beside a slow reading of the paper's sentence."""

import math
import random
import statistics
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fashionclip_tune.tuning.schedulers import survives_median


def slow(curve: Any, others: Any) -> Any:
    """Golovin et al. 2017, 3.2.2: stop where the best value so far is strictly below the median of running averages."""
    stages = sorted(stage for stage in curve if stage > 0)
    if math.isnan(curve[stages[-1]]):
        return False
    averages = []
    for other in others:
        total, count = 0.0, 0
        for stage in stages:
            if not math.isnan(other[stage]):
                total, count = total + other[stage], count + 1
        if count:
            averages.append(total / count)
    if len(averages) < 3:
        return True
    return not max(curve[stage] for stage in stages if not math.isnan(curve[stage])) < statistics.median(averages)


@given(st.integers(0, 10_000), st.integers(0, 9), st.integers(1, 5))
def test_decisions_equal_those_of_the_papers_sentence(seed: int, num_others: Any, num_stages: Any) -> None:
    draw = random.Random(seed)
    # Quarters, so that ties happen and sums are exact.
    value = lambda: math.nan if draw.random() < 0.1 else draw.randrange(5) / 4  # noqa: E731
    curves = [{0: 1.0, **{100 * stage: value() for stage in range(1, num_stages + 1)}} for _ in range(num_others + 1)]
    assert survives_median(curves[0], curves[1:]) == slow(curves[0], curves[1:])


def test_a_value_that_is_no_number_never_survives_and_never_counts() -> None:
    assert not survives_median({100: math.nan}, [])
    assert not survives_median({100: 0.9, 200: math.inf}, [])
    nans = [{100: math.nan}] * 5
    assert survives_median({100: 0.1}, [*nans, {100: 0.5}, {100: 0.5}])  # two that count are too few
    assert not survives_median({100: 0.1}, [*nans, *[{100: 0.5}] * 3])


def test_a_trial_is_judged_by_its_best_stage_and_the_others_by_their_mean() -> None:
    others = [{100: 0.2, 200: 0.8}] * 3
    assert survives_median({100: 0.5, 200: 0.1}, others)
    assert not survives_median({100: 0.4, 200: 0.49}, others)


def test_untouched_weights_are_no_result() -> None:
    others = [{0: 0.9, 100: 0.5}] * 3
    assert not survives_median({0: 0.9, 100: 0.4}, others)
    assert survives_median({0: 0.0, 100: 0.5}, others)
