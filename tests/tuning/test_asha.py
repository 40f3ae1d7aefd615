import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import AsyncHyperBandScheduler

from fashionclip_tune.tuning.schedulers import asha_rungs, survives_asha


@pytest.mark.parametrize(
    ("grace", "budget", "factor", "levels"),
    [
        (1, 9, 3, [1, 3]),
        (1, 243, 3, [1, 3, 9, 27, 81]),  # in floating point log(243) / log(3) is below 5, and a level is lost
        (2112, 19008, 3, [2112, 6336]),
        (64, 64, 3, []),
        (64, 4 * 64, 2, [64, 128]),
    ],
)
def test_rungs_are_exact(grace: Any, budget: Any, factor: Any, levels: Any) -> None:
    assert asha_rungs(grace, budget, factor) == levels


@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(2, 30))
def test_decisions_equal_those_of_rays_scheduler(seed: int, factor: Any, num_trials: int) -> None:
    """Trials arrive at the rungs in random order; ours are decided from the values alone, Ray's from its own state."""
    draw = random.Random(seed)
    levels = asha_rungs(1, factor**3, factor)
    theirs = AsyncHyperBandScheduler("step", "value", "max", max_t=factor**3, grace_period=1, reduction_factor=factor)
    trials = [SimpleNamespace(trial_id=str(number)) for number in range(num_trials)]
    for trial in trials:
        theirs.on_trial_add(None, trial)
    seen = {level: list[Any]() for level in levels}
    alive = {trial.trial_id: 0 for trial in trials}
    while alive:
        name = draw.choice(sorted(alive))
        level = levels[alive[name]]
        value = draw.choice([draw.random(), 0.5])
        decision = theirs.on_trial_result(None, trials[int(name)], {"step": level, "value": value})
        assert survives_asha(value, seen[level], factor) == (decision == "CONTINUE")
        seen[level].append(value)
        alive[name] += 1
        if decision == "STOP" or alive[name] == len(levels):
            del alive[name]


def test_a_value_that_is_no_number_never_survives_and_never_counts() -> None:
    assert not survives_asha(math.nan, [], 3)
    assert not survives_asha(math.inf, [0.5], 3)
    assert survives_asha(0.5, [math.nan, math.nan], 3)
    assert not survives_asha(0.4, [math.nan, 0.5], 3)


def test_the_first_trial_at_a_rung_survives() -> None:
    assert survives_asha(0.0, [], 3)
