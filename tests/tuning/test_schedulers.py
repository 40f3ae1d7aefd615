from typing import Any

import pytest

from fashionclip_tune.errors import UserError
from fashionclip_tune.tuning.schedulers import SCHEDULERS, check_scheduler, stopping_rule


@pytest.mark.parametrize(
    ("scheduler", "rungs"),
    [("asha", (1, 3, 9, 27, 81)), ("asha-stopping", (1, 3, 9, 27, 81)), ("median", tuple(range(1, 243))), ("none", ())],
)
def test_a_budget_of_243_stages_is_judged_at_exact_levels(scheduler: Any, rungs: Any) -> None:
    rule = stopping_rule(scheduler, stage_examples=1, budget_examples=243, reduction_factor=3)
    assert rule.rungs == rungs


def test_a_budget_of_one_stage_is_never_judged() -> None:
    for scheduler in SCHEDULERS:
        rule = stopping_rule(scheduler, stage_examples=64, budget_examples=64, reduction_factor=3)
        assert (rule.rungs, str(rule)) == ((), "none: every trial runs to its budget")


def test_asha_judges_a_stages_value_and_median_the_curve() -> None:
    asha, median = (
        stopping_rule(name, stage_examples=100, budget_examples=900, reduction_factor=3) for name in ("asha-stopping", "median")
    )
    curve, others = {100: 0.9, 200: 0.1, 300: 0.1}, [{100: 0.5, 200: 0.5, 300: 0.5}] * 3
    assert not asha.survives(curve, others)
    assert median.survives(curve, others)
    assert str(asha) == "asha, rungs at 100, 300 examples, the best 1/3 go on"
    assert str(median) == "median, judged every 100 examples, from the fourth trial of an architecture on"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pbt", "changes a trial's settings midway"),
        ("PBT", "changes a trial's settings midway"),
        ("pb2", "changes a trial's settings midway"),
        ("hyperband", "wait for each other"),
        ("bohb", "wait for each other"),
    ],
)
def test_other_schedulers_are_refused_with_the_reason(name: Any, reason: Any) -> None:
    with pytest.raises(
        UserError, match=f"^--scheduler '{name}' is not allowed: asha, asha-stopping, median or none; .*{reason}"
    ):
        check_scheduler(name)
    with pytest.raises(UserError, match=r"asha, asha-stopping, median or none$"):
        check_scheduler("fifo")
