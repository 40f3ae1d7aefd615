from typing import Any

import pytest

from fashionclip_tune.errors import UserError
from fashionclip_tune.tuning.study.policy import ModelQuota, plan_quota

MODELS = ("cheap", "middling", "dear")


def test_turns_of_like_cost_then_the_sampler() -> None:
    quota, started = ModelQuota("model", {"dear": 3.9, "cheap": 1, "middling": 2.8}, 4), dict[Any, Any]()
    order = []
    while fixed := quota.next_fixed(started):
        started[fixed["model"]] = started.get(fixed["model"], 0) + 1
        order.append(fixed["model"])
    # The sums spent: cheap 1 and 2, middling 2.8, cheap 3, dear 3.9, cheap 4, middling 5.6, dear 7.8, ...
    names = {"c": "cheap", "m": "middling", "d": "dear"}
    assert order == [names[letter] for letter in "ccmcdcmdmmdd"]
    assert quota.next_fixed({"cheap": 4, "middling": 0, "dear": 5}) == {"model": "middling"}
    assert ModelQuota("model", {"one": 1, "like": 1}, 4).next_fixed({"one": 1, "like": 1}) == {"model": "one"}


@pytest.mark.parametrize(
    ("num_trials", "min_trials"), [(100, 6), (36, 6), (35, 5), (16, 2), (6, 1), (5, None)], ids=lambda value: str(value)
)
def test_the_default_is_six_or_what_half_of_the_sweep_gives(num_trials: Any, min_trials: Any) -> None:
    quota = plan_quota(None, parameter="model", models=MODELS, num_trials=num_trials, cost=len)
    assert (quota and quota.min_trials) == min_trials


def test_what_cannot_be_bound_is_left_free_and_refused_where_it_is_asked_for() -> None:
    assert plan_quota(None, parameter=None, models=MODELS, num_trials=100, cost=len) is None
    assert plan_quota(0, parameter="model", models=MODELS, num_trials=100, cost=len) is None
    assert plan_quota(3, parameter="model", models=MODELS[:1], num_trials=100, cost=len) is None
    with pytest.raises(UserError, match="no categorical parameter of its own"):
        plan_quota(2, parameter=None, models=MODELS, num_trials=100, cost=len)
    with pytest.raises(UserError, match="-1 is not allowed: at least 0"):
        plan_quota(-1, parameter="model", models=MODELS, num_trials=100, cost=len)
    with pytest.raises(UserError, match=r"34 is not allowed: 3 models .* at most 33"):
        plan_quota(34, parameter="model", models=MODELS, num_trials=100, cost=len)
