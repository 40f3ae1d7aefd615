"""Learning-rate factors step by step."""

import itertools
import math

import pytest

from fashionclip_tune.config.options import ScheduleConfig
from fashionclip_tune.training.optimizer import learning_rate_factor


def factors(total_steps: int, name: str = "cosine", warmup_ratio: float = 0.05) -> list[float]:
    schedule = ScheduleConfig(name=name, warmup_ratio=warmup_ratio)
    return [learning_rate_factor(step, total_steps, schedule) for step in range(total_steps)]


def test_warm_up_rises_in_equal_steps_from_above_0_to_1() -> None:
    values = factors(200, warmup_ratio=0.1)
    assert values[:21] == pytest.approx([(i + 1) / 21 for i in range(21)])
    assert values[20] == 1.0
    assert max(values) == 1.0


@pytest.mark.parametrize("total_steps", [2, 3, 10, 1_000])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.05, 0.5])
def test_cosine_falls_at_every_step_after_the_warm_up_and_ends_near_0(total_steps: int, warmup_ratio: float) -> None:
    values = factors(total_steps, warmup_ratio=warmup_ratio)
    peak = values.index(1.0)
    falling = values[peak:]
    assert all(0 < later < earlier for earlier, later in itertools.pairwise(falling))
    if total_steps == 1_000:
        assert 0 < values[-1] < 1e-4


def test_cosine_is_half_way_down_half_way_through() -> None:
    values = factors(120, warmup_ratio=1 / 6)  # 20 steps of warm-up, 100 of cosine
    assert values[70] == pytest.approx(0.5)
    assert values[45] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert values[95] == pytest.approx((1 - math.sqrt(0.5)) / 2)


def test_constant_stays_at_1_after_the_warm_up() -> None:
    values = factors(50, name="constant", warmup_ratio=0.1)
    assert all(a < b for a, b in itertools.pairwise(values[:6]))
    assert values[5:] == [1.0] * 45


@pytest.mark.parametrize("name", ["cosine", "constant"])
def test_no_warm_up_starts_at_1(name: str) -> None:
    assert factors(10, name=name, warmup_ratio=0)[0] == 1.0


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.05, 0.99])
@pytest.mark.parametrize("total_steps", [1, 2, 3])
@pytest.mark.parametrize("name", ["cosine", "constant"])
def test_the_shortest_runs_have_a_rate_above_0_at_every_step(name: str, total_steps: int, warmup_ratio: float) -> None:
    assert all(0 < value <= 1 for value in factors(total_steps, name, warmup_ratio))
