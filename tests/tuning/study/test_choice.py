"""What the search does next: properties that must hold whatever the model's constants are."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna
import pytest
import torch

from fashionclip_tune.tuning.study import choice
from fashionclip_tune.tuning.study.choice import Choice, FreshPoint, KnownTrial, choose, expected_improvement
from fashionclip_tune.tuning.study.curve_model import CurveModel
from fashionclip_tune.tuning.study.draws import draw_points
from fashionclip_tune.tuning.study.points import Encoding, default_points, varied

COSTS = {"small": 90.0, "large": 900.0}


def space(trial: optuna.Trial) -> dict[str, Any]:
    drawn: dict[str, Any] = {
        "model": trial.suggest_categorical("model", ["small", "large"]),
        "rate": trial.suggest_float("rate", 1e-5, 1e-3, log=True),
    }
    if trial.suggest_categorical("augment", [False, True]):
        drawn["strength"] = trial.suggest_float("strength", 0.1, 1.0)
    return drawn


def fresh(seed: int, given: Sequence[Mapping[str, Any]], count: int) -> list[FreshPoint]:
    points = draw_points(space, count, seed, given)
    return [FreshPoint(point.params, point.distributions, point.params["model"]) for point in points]


def plain(*rates: float, model: str = "small") -> list[FreshPoint]:
    return fresh(0, [{"model": model, "rate": rate, "augment": False} for rate in rates], 0)


def none_drawn(seed: int, given: Any, count: int) -> list[FreshPoint]:
    return []


def trial(number: int, rate: float, curve: Mapping[float, float], state: Any = "ended", **others: Any) -> KnownTrial:
    params = {"model": "small", "rate": rate, "augment": False, **others.pop("params", {})}
    (point,) = draw_points(space, 0, 0, [params])
    left = (1 - max(curve, default=0.0)) * COSTS[params["model"]] if state == "waiting" else None
    values = {"cost": left, "data": "", **others}
    return KnownTrial(number, params["model"], point.params, point.distributions, curve, {}, state, **values)


def rising(end: float) -> dict[float, float]:
    return {1 / 9: end - 0.2, 1 / 3: end - 0.1, 1.0: end}


def chosen(known: Sequence[KnownTrial], fresh: Any = fresh, seed: int = 0, **others: Any) -> Choice:
    found = choose(known, fresh=fresh, cost_of_start=COSTS, seed=seed, **{"num_random": 0, **others})
    assert found is not None
    return found


def test_nothing_may_and_the_first_trial() -> None:
    assert choose([], fresh=None, cost_of_start=COSTS, seed=0, num_random=0) is None
    assert choose([trial(0, 1e-4, rising(0.5))], fresh=None, cost_of_start=COSTS, seed=0, num_random=0) is None
    assert choose([trial(0, 1e-4, rising(0.5))], fresh=none_drawn, cost_of_start=COSTS, seed=0, num_random=0) is None
    for known in ([], [trial(0, 1e-4, {}, "running")], [trial(0, 1e-4, {1 / 9: math.nan}, "waiting")]):
        first = chosen(known)
        assert first.chosen.trial is None
        assert math.isnan(first.chosen.score)
        assert first.chosen.params == fresh(0, [], 1)[0].params
        assert first.runner_up is None


def test_the_first_six_are_points_or_drawn_at_random() -> None:
    """And what is known of them is said all the same; where no new one may be begun, the model decides."""
    known = [trial(0, 1e-4, rising(0.6)), trial(1, 2e-4, {1 / 9: 0.5}, "waiting"), trial(2, 9e-4, {}, "running")]
    known += [trial(number, 4e-5, {}, "running") for number in (3, 4)]
    found = chosen(known, seed=5, num_random=6)
    assert found.chosen.params == fresh(5, [], 1)[0].params
    assert found.runner_up is None
    assert found.predicted.keys() == {1}
    assert math.isfinite(found.chosen.score)
    assert chosen(known, fresh=None, num_random=6).chosen.trial == 1
    assert chosen(known, fresh=lambda *_: [], num_random=6).chosen.trial == 1, "where none fits the time"
    assert chosen([*known, trial(5, 1e-5, {1 / 9: 0.1}, "waiting")], num_random=6).runner_up is not None


def test_of_waiting_trials_the_one_that_is_ahead_goes_on() -> None:
    known = [
        trial(0, 1e-4, rising(0.6)),
        trial(1, 2e-4, {1 / 9: 0.5}, "waiting"),
        trial(2, 5e-4, {1 / 9: 0.2}, "waiting"),
        trial(3, 2e-5, {1 / 9: 0.45}, "waiting", cost=None),
    ]
    found = chosen(known, fresh=None)
    assert found.chosen.trial == 1
    assert found.runner_up is not None
    assert found.runner_up.trial == 2
    assert found.chosen.score > found.runner_up.score
    assert found.predicted.keys() == {1, 2, 3}
    assert found.predicted[1] == found.chosen.predicted > found.predicted[2]
    assert found.chosen.predicted == pytest.approx(0.7, abs=0.1), "its own value and what the others gained"
    assert 0 < found.chosen.deviation < 0.3


def test_a_late_starter_goes_on_where_late_starters_have_won() -> None:
    """Trials with a high rate were behind at the first rung and ahead at the end; one more of them is last at its rung."""
    known = [
        *(trial(number, rate, rising(0.5)) for number, rate in enumerate((1e-5, 2e-5, 4e-5))),
        *(trial(3 + number, rate, {1 / 9: 0.2, 1 / 3: 0.35, 1.0: 0.8}) for number, rate in enumerate((5e-4, 7e-4))),
        trial(5, 3e-5, {1 / 9: 0.32}, "waiting"),
        trial(6, 6e-4, {1 / 9: 0.19}, "waiting"),
    ]
    found = chosen(known, fresh=None)
    assert found.chosen.trial == 6
    assert found.predicted[6] > found.predicted[5]


def test_at_equal_promise_the_cheap_start_is_preferred() -> None:
    both = [*plain(1.5e-4), *plain(1.5e-4, model="large")]
    like = [trial(0, 1e-4, rising(0.6)), trial(1, 1e-4, rising(0.6), params={"model": "large"})]
    assert chosen(like, fresh=lambda *_: both).chosen.params["model"] == "small"
    ahead = [trial(n, 1e-5 * 3**n, rising(0.4)) for n in range(5)]
    ahead += [trial(n, n * 1e-5, rising(0.6 + n / 30), params={"model": "large"}) for n in (5, 7, 9)]
    assert chosen(ahead, fresh=lambda *_: both).chosen.params["model"] == "large"


def test_at_equal_promise_the_cheap_batch_is_preferred() -> None:
    known = [trial(n, 1e-5 * 3**n, rising(0.4)) for n in range(7)]
    (point,) = plain(1.5e-4)
    for costs in ((1.0, 2.0), (2.0, 1.0)):
        points = [replace(point, batch_size=size, cost=cost) for size, cost in zip((64, 512), costs, strict=True)]
        found = chosen(known, fresh=lambda *_, points=points: points)
        assert found.chosen.score == pytest.approx(found.runner_up.score * 2**0.5)


def test_a_waiting_trial_beats_a_copy_of_itself() -> None:
    waits = trial(2, 2e-4, {1 / 9: 0.5, 1 / 3: 0.6}, "waiting")
    known = [trial(0, 1e-4, rising(0.6)), trial(1, 1e-3, rising(0.5)), waits]

    def copies(seed: int, given: Any, count: int) -> list[FreshPoint]:
        return [FreshPoint(waits.params, waits.distributions, "small")] * 3

    assert chosen(known, fresh=copies).chosen.trial == 2
    # And by its score: here the copy is just far enough away to be a candidate.
    near = FreshPoint({**waits.params, "rate": 2e-4 * 1.15}, waits.distributions, "small")
    found = chosen(known, fresh=lambda seed, given, count: [near])
    assert found.chosen.trial == 2
    assert found.runner_up is not None
    assert found.runner_up.trial is None


def test_settings_that_were_tried_are_tried_again_only_where_there_are_no_others() -> None:
    known = [trial(number, rate, rising(0.5)) for number, rate in enumerate((1e-5, 1e-4, 1e-3))]
    (tried,) = draw_points(space, 0, 0, [{"model": "small", "rate": 1e-4, "augment": False}])
    again = FreshPoint(tried.params, tried.distributions, "small")
    other = FreshPoint({**tried.params, "rate": 1e-2}, tried.distributions, "small")
    known += [trial(number, 1e-3 * 1.3**number, rising(0.5)) for number in range(3, 7)]
    for offered, taken in (([again, other], other), ([again], again)):
        found = choose(known, fresh=lambda *_, offered=offered: offered, cost_of_start=COSTS, seed=0, num_random=0)
        assert found is not None
        assert found.chosen.params == taken.params


@pytest.mark.parametrize("how", ["is_failure", "nan", "nan_at_once"])
def test_a_failure_repels(how: str) -> None:
    """Settings beside one that failed are expected to be worse than they were before, even where it had been ahead."""
    curve = {"is_failure": {1 / 9: 0.6}, "nan": {1 / 9: 0.6, 1 / 3: math.nan}, "nan_at_once": {1 / 9: math.nan}}[how]
    known = [trial(0, 1e-5, rising(0.45)), trial(1, 5e-5, rising(0.5)), trial(2, 2e-4, rising(0.55))]
    failed = trial(3, 1e-3, curve, is_failure=how == "is_failure")
    near = plain(9e-4)

    def expected(known: Sequence[KnownTrial]) -> float:
        return chosen(known, fresh=lambda *_: near).chosen.predicted

    assert expected([*known, failed]) < expected(known) - 0.05


def test_a_failure_without_a_value_repels_and_is_never_chosen() -> None:
    known = [trial(0, 1e-5, rising(0.45)), trial(1, 5e-5, rising(0.5)), trial(2, 1e-3, {}, is_failure=True)]
    assert chosen(known).chosen.params["rate"] < 5e-4
    waits = trial(3, 1e-4, {1 / 9: 0.4, 1 / 3: math.nan}, "waiting")
    assert choose([*known, waits], fresh=None, cost_of_start=COSTS, seed=0, num_random=0) is None


def test_one_bad_value_does_not_hide_the_others() -> None:
    """A value far below all others counts as one that is below: the rest stays as far apart as it was."""
    known = [trial(n, rate, rising(end)) for n, (rate, end) in enumerate(((1e-5, 0.4), (4e-5, 0.5), (1e-4, 0.55), (3e-4, 0.5)))]
    waits = [trial(5, 1.1e-4, {1 / 9: 0.36}, "waiting"), trial(6, 1.2e-5, {1 / 9: 0.2}, "waiting")]
    for worst in (0.3, -50.0):
        assert chosen([*known, trial(4, 1e-3, rising(worst)), *waits], fresh=None).chosen.trial == 5


def test_running_trials_count_as_ended_so_that_two_slots_do_not_try_the_same() -> None:
    known = [trial(number, rate, rising(end)) for number, (rate, end) in enumerate(((1e-5, 0.4), (1e-4, 0.6), (1e-3, 0.3)))]
    first = chosen(known).chosen
    runs = trial(3, first.params["rate"], {}, "running", params=first.params)
    second = chosen([*known, runs]).chosen
    at = Encoding([runs.distributions])
    assert abs(at([first.params]) - at([second.params])).max() > 0.02
    beside = chosen(
        [*known, runs],
        fresh=lambda *_: [
            FreshPoint({**first.params, "rate": first.params["rate"] * 1.12}, runs.distributions, first.params["model"])
        ],
    )
    assert beside.chosen.score < first.score / 1.5


def test_other_datas_level_is_taken_out_and_its_best_settings_are_tried() -> None:
    """There all is 0.3 higher; what was best there is the first to be tried here, at this sweep's level."""
    rates = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
    there = [
        trial(n, rate, rising(0.9 - 0.1 * abs(math.log10(rate / 3e-4))), data="last season") for n, rate in enumerate(rates)
    ]
    here = [trial(0, 1e-5, rising(0.45)), trial(1, 3e-5, rising(0.5))]
    expected = [
        chosen([*there, *here], fresh=lambda *_, rate=rate: plain(rate)).chosen.predicted for rate in (2e-5, 9e-5, 2.5e-4)
    ]
    assert expected == sorted(expected), "as it was there"
    assert 0.5 < expected[-1] < 0.75, "at this sweep's level"
    assert any(point["rate"] == 3e-4 for point in given_of([*there, *here]))
    # Before this sweep has a value of its own, what is known is theirs.
    every = plain(*(10 ** (-5 + n / 20) for n in range(41)))
    assert 1e-4 < chosen(there, fresh=lambda *_: every).chosen.params["rate"] < 1e-3


def given_of(known: Sequence[KnownTrial]) -> Sequence[Mapping[str, Any]]:
    seen = []

    def keep(seed: int, given: Any, count: int) -> list[FreshPoint]:
        seen.extend(given)
        return fresh(seed, given, count)

    chosen(known, fresh=keep)
    return seen


def sweep_of(num_trials: int) -> list[KnownTrial]:
    known = []
    for number, point in enumerate(fresh(7, [], num_trials)):
        end = 0.6 - 0.1 * abs(math.log10(point.params["rate"] / 1e-4)) + 0.01 * (number % 5)
        curve = {share: value for share, value in rising(end).items() if share <= (1 / 9, 1 / 3, 1.0)[number % 3]}
        state = "ended" if number % 3 == 2 or number < num_trials - 20 else "waiting"
        left = (1 - max(curve)) * 90 if state == "waiting" else None
        known.append(KnownTrial(number, point.start, point.params, point.distributions, curve, {}, state, left))
    return known


def test_a_choice_is_a_function_of_its_arguments() -> None:
    known = sweep_of(40)
    first = chosen(known, seed=3)
    assert chosen(list(reversed(known)), seed=3) == first
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        assert chosen(known, seed=3) == first
    finally:
        torch.set_num_threads(before)
    assert {str(chosen(known, seed=seed, fresh=fresh).runner_up) for seed in range(4)} != {str(first.runner_up)}


@pytest.mark.parametrize("num_trials", [1, 64, 300, 1000])
def test_any_number_of_trials_is_bounded_to_300_values(
    num_trials: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known, sizes = sweep_of(num_trials), []

    class Counted(CurveModel):
        def __init__(self, rows: Any, parameters: Any = None) -> None:
            sizes.append(len(rows.u_N))
            super().__init__(rows, parameters)

    monkeypatch.setattr(choice, "CurveModel", Counted)
    started = time.perf_counter()
    found = chosen(known)
    with capsys.disabled():
        print(f"\n{num_trials} trials, {max(sizes)} rows: {time.perf_counter() - started:.2f} s")
    assert max(sizes) <= 300
    assert found.predicted.keys() == {each.number for each in known if each.state == "waiting"}
    if num_trials == 1000:
        assert max(sizes) == 300
        assert found.chosen.params["rate"] == pytest.approx(1e-4, rel=2)


def test_those_that_may_go_on_enter_the_model_first_then_the_best() -> None:
    known = sweep_of(400)
    level = choice._Level(known)
    entering = choice._entering([list(level.values(each)) for each in known])
    numbers = {each.trial.number for each in entering}
    assert numbers >= {each.number for each in known if each.state == "waiting"}
    over = [each for each in known if each.state == "ended"]
    assert numbers >= {each.number for each in sorted(over, key=lambda each: -each.curve[max(each.curve)])[:40]}


def test_expected_improvement_is_what_samples_say() -> None:
    import numpy as np

    found = expected_improvement(np.array([0.0, 1.0, -3.0, 0.0]), np.array([1.0, 0.5, 1.0, 1e-3]), 0.5)
    draws = np.random.default_rng(0).normal(size=400_000)
    sampled = [
        np.maximum(mean + deviation * draws - 0.5, 0).mean() for mean, deviation in ((0, 1), (1, 0.5), (-3, 1), (0, 1e-3))
    ]
    assert found == pytest.approx(sampled, abs=2e-3)


def test_parameters_of_a_branch_and_choices_are_encoded_in_the_unit_cube() -> None:
    points = list(draw_points(space, 20, 0))
    encoding = Encoding(point.distributions for point in points)
    off, on = (
        encoding([point.params])[0]
        for point in (
            next(point for point in points if not point.params["augment"]),
            next(point for point in points if point.params["augment"]),
        )
    )
    assert len(off) == len(on) == 4
    assert sorted(off)[1:3] != sorted(on)[1:3]
    assert 0.5 in off.tolist(), "the strength that is not drawn"
    middle = encoding([{"model": "small", "rate": 1e-4, "augment": True, "strength": 0.1}])[0]
    assert sorted(middle.tolist()) == pytest.approx([0.0, 0.0, 0.5, 1.0])
    three = Encoding([{"m": optuna.distributions.CategoricalDistribution(["a", None, "c"])}])
    found = three([{"m": "a"}, {"m": None}, {"m": "gone"}, {}])
    assert found.ravel() == pytest.approx([0.5**0.5, 0, 0, 0, 0.5**0.5, 0, 0, 0, 0, 0.5, 0.5, 0.5])
    assert Encoding([])([{"a": 1}, {}]).shape == (2, 1)
    # A range that was changed: the first one counts, and what lies outside lies outside.
    wide = optuna.distributions.FloatDistribution(1e-6, 1e-2, log=True)
    assert Encoding([{"r": wide}, {"r": optuna.distributions.FloatDistribution(0, 1)}])([{"r": 1.0}])[0, 0] == pytest.approx(
        1.5
    )


def test_variations_stay_within_their_ranges() -> None:
    import numpy as np

    generator = np.random.default_rng(0)
    kinds = {
        "step": optuna.distributions.FloatDistribution(0.0, 1.0, step=0.25),
        "rate": optuna.distributions.FloatDistribution(1e-5, 1e-3, log=True),
        "layers": optuna.distributions.IntDistribution(2, 12, step=2),
        "batch": optuna.distributions.IntDistribution(16, 512, log=True),
        "only": optuna.distributions.FloatDistribution(3.0, 3.0),
        "model": optuna.distributions.CategoricalDistribution(["a", "b", "c"]),
    }
    params = {"step": 0.25, "rate": 1e-3, "layers": 12, "batch": 16, "only": 3.0, "model": "a"}
    seen = [varied(params, kinds, generator) for _ in range(200)]
    for each in seen:
        optuna.trial.create_trial(params=each, distributions=kinds, value=0.0)  # refuses what is out of range
    assert all(len({each[name] for each in seen}) > 1 for name in params if name != "only")
    assert sum(each["model"] == "a" for each in seen) > 150


def branching(trial: optuna.Trial) -> dict[str, Any]:
    model = trial.suggest_categorical("model", ["small", "large"])
    drawn = {"model": model, "rate": trial.suggest_float("rate", 1e-6, 1e-4, log=True)}
    if model == "large":
        drawn["decay"] = trial.suggest_float("decay", 0.1, 0.9)
        drawn["rows"] = trial.suggest_int("rows", 1, 64, log=True)
    drawn["augment"] = trial.suggest_categorical("augment", [False, True])
    return drawn


def test_default_points_are_the_middle_of_rates_one_for_each_start() -> None:
    small = {"model": "small", "rate": pytest.approx(1e-5), "augment": False}
    large = {"model": "large", "rate": pytest.approx(1e-5), "decay": 0.1, "rows": 8, "augment": False}
    assert default_points(branching, "model", ["large", "small"]) == [large, small]
    assert default_points(branching) == [small]
    # They are points: a space draws exactly them.
    points = default_points(branching, "model", ["small", "large"])
    assert [point.params for point in draw_points(branching, 0, 0, points)] == points


def test_until_a_trial_has_ended_points_go_on() -> None:
    """Behind at the first rung, as good rates from a pretrained start are; until one has ended, nobody can know."""
    others = [trial(n, 1e-5 * n, {1 / 9: 0.40 + 0.01 * n}, "waiting") for n in range(1, 8)]
    behind = [trial(0, 1e-4, {1 / 9: 0.39}, "waiting"), *others]
    assert chosen(behind).chosen.trial == 0
    assert chosen(behind, num_points=0).chosen.trial != 0
    at_two = [trial(0, 1e-4, {1 / 9: 0.39, 1 / 3: 0.40}, "waiting"), *behind[1:]]
    assert chosen(at_two).chosen.trial == 0
    running = [trial(0, 1e-4, {1 / 9: 0.39}, "running"), *behind[1:]]
    assert chosen(running).chosen.trial != 0
    assert chosen(running, num_points=3) == chosen(running, num_points=0), "one at a time"
    two = [behind[0], trial(1, 1e-3, {1 / 9: 0.43}, "waiting"), *behind[2:]]
    assert chosen(two, num_points=2).chosen.trial == 1, "the better one of the points"
    failed = [trial(0, 1e-4, {1 / 9: math.nan}, "ended"), *behind[1:]]
    assert chosen(failed) == chosen(failed, num_points=0)
    older = [*behind, trial(90, 1e-4, rising(0.6), data="last season")]
    assert chosen(older) == chosen(older, num_points=0), "an older sweep has taught it"
    ended = [trial(0, 1e-4, {1 / 9: 0.39, 1 / 3: 0.40, 1.0: 0.41}), *behind[1:]]
    assert chosen(ended).chosen == chosen(ended, num_points=0).chosen
