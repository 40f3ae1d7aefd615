"""What a model of learning curves must hold, whatever its kernel is."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from fashionclip_tune.tuning.study.curve_model import CurveModel, Rows, one_thread


def rows(*each: tuple[float, float, int, float], data: int = 0) -> Rows:
    """Of (x, u, trial, value)."""
    x, u, trial, value = (torch.tensor(column) for column in zip(*each, strict=True))
    zero = torch.zeros(len(each), dtype=torch.float64)
    return Rows(x[:, None].double(), u.double(), trial, torch.full_like(trial, data), value.double(), zero)


def ends(*x: float, trials: Any = None) -> Rows:
    return rows(*((place, 1.0, -1 if trials is None else trials[number], 0.0) for number, place in enumerate(x)))


def many(count: int, num_features: int = 8) -> Rows:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, num_features, generator=generator, dtype=torch.float64)
    u = torch.randint(0, 3, (count,), generator=generator).double() / 2
    value = (3 * x[:, 0]).sin() + x[:, 1] * u + 0.05 * torch.randn(count, generator=generator, dtype=torch.float64)
    trial = torch.arange(count)
    return Rows(x, u, trial, torch.zeros_like(trial), value - value.mean(), torch.zeros_like(value))


def test_a_value_that_was_seen_is_predicted_nearly_and_far_away_nothing_is_known() -> None:
    model = CurveModel(rows((0.1, 1, 0, -1.0), (0.5, 1, 1, 1.0), (0.9, 1, 2, 0.0)))
    mean, variance = model.predict(ends(0.1, 0.5, 0.9, trials=[0, 1, 2]))
    assert mean.tolist() == pytest.approx([-1.0, 1.0, 0.0], abs=0.25)
    _, elsewhere = model.predict(ends(0.3, 5.0))
    assert elsewhere[1] > elsewhere[0] > variance.max()


def test_a_curve_goes_on_as_the_others_did() -> None:
    """The common curve rises by 2: a trial that was middling at its first rung is expected at a middling end."""
    known = [
        (x, u, number, 2 * u + offset)
        for number, (x, offset) in enumerate(((0.1, -0.5), (0.5, 0.0), (0.9, 0.5)))
        for u in (0, 0.5, 1)
    ]
    model = CurveModel(rows(*known, (0.5, 0.0, 3, 0.1)))
    mean, _ = model.predict(ends(0.5, trials=[3]))
    assert mean.item() == pytest.approx(2.1, abs=0.3)


def test_a_late_starter_is_not_written_off() -> None:
    """Low at the first rung is less certain to be low at the end than low at the end of the budget but one stage."""
    others = [(x, u, number, value) for number, (x, value) in enumerate(((0.2, -0.5), (0.4, 0.5))) for u in (0, 0.5, 1)]
    early = CurveModel(rows(*others, (0.9, 0.0, 2, -1.0)))
    late = CurveModel(rows(*others, (0.9, 0.9, 2, -1.0)), early.parameters)
    (mean_early, variance_early), (mean_late, variance_late) = (model.predict(ends(0.9, trials=[2])) for model in (early, late))
    assert mean_early > mean_late
    assert variance_early > 2 * variance_late


def test_a_noisy_evaluation_counts_less() -> None:
    known = rows((0.5, 1, 0, 1.0), (0.0, 1, 1, 0.0), (1.0, 1, 2, -1.0))
    sure = CurveModel(known)
    unsure = CurveModel(replace(known, variance_N=torch.tensor([4.0, 0, 0], dtype=torch.float64)), sure.parameters)
    assert sure.predict(ends(0.5))[0] > unsure.predict(ends(0.5))[0]


def test_new_settings_have_no_share_of_their_own() -> None:
    model = CurveModel(rows((0.1, 1, 0, -1.0), (0.5, 1, 1, 1.0)))
    (mean_new, variance_new), (mean, variance) = model.predict(ends(0.3)), model.predict(ends(0.3, trials=[7]))
    assert mean_new.item() == pytest.approx(mean.item())
    assert variance > variance_new


def test_another_data_set_has_its_own_level_and_the_order_of_its_settings() -> None:
    """Its level is 3 above; what was best there is expected to be best here, at this level."""
    there = rows(*((x, 1, number, 3 - 8 * (x - 0.7) ** 2) for number, x in enumerate((0.1, 0.3, 0.5, 0.7, 0.9))), data=1)
    here = rows((0.1, 1, 10, -1.5), (0.4, 1, 11, 0.0))
    model = CurveModel(here.joined(there))
    at = torch.linspace(0, 1, 101).tolist()
    mean, _ = model.predict(ends(*at))
    assert at[int(mean.argmax())] == pytest.approx(0.7, abs=0.1)
    assert mean.max() < 2


def test_rows_added_later_are_known_and_parameters_stay() -> None:
    model = CurveModel(many(30))
    added = ends(*[0.5], trials=[99])
    added = replace(added, x_NF=torch.full((1, 8), 3.0, dtype=torch.float64), value_N=torch.tensor([2.0], dtype=torch.float64))
    knows = model.with_rows(added)
    assert torch.equal(knows.parameters, model.parameters)
    assert knows.predict(added)[1] < model.predict(added)[1] / 2
    assert abs(knows.predict(added)[0] - 2) < abs(model.predict(added)[0] - 2)


def test_settings_that_matter_get_short_lengths() -> None:
    lengths = CurveModel(many(100)).parameters[:8]
    assert lengths[0] < lengths[2:].min()


@pytest.mark.parametrize("count", [1, 2, 12])
def test_few_or_equal_values_make_a_model(count: int) -> None:
    few = many(count)
    for value in (few.value_N, torch.zeros(count, dtype=torch.float64), torch.full((count,), 30.0, dtype=torch.float64)):
        model = CurveModel(replace(few, value_N=value))
        mean, variance = model.predict(many(20))
        assert mean.isfinite().all()
        assert (variance > 0).all()


def test_the_same_rows_make_the_same_model_with_any_number_of_threads() -> None:
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        try:
            with one_thread():
                model = CurveModel(many(150))
                found.append(torch.cat([model.parameters, *model.predict(many(260))]))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_time_of_a_fit_is_bounded() -> None:
    for count in (1, 30, 120, 300):
        started = time.perf_counter()
        with one_thread():
            CurveModel(many(count)).predict(many(270))
        print(f"{count} rows: {time.perf_counter() - started:.3f} s")
