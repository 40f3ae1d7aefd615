"""What a plan says of time: presets, rates and where they come from, the course of a sweep, the time that is left."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import optuna
import pytest
import torch

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.files import write_json
from fashionclip_tune.machine.hardware import Machine
from fashionclip_tune.reporting.plan_against_fact import fact_lines, plan_against_fact
from fashionclip_tune.tuning.planning import throughput as rates
from fashionclip_tune.tuning.planning.allocation import Allotment
from fashionclip_tune.tuning.planning.budget import preset_budget
from fashionclip_tune.tuning.planning.forecast import Course, ModelPace, forecast
from fashionclip_tune.tuning.planning.overhead import Overhead, keep_overhead, known_overhead
from fashionclip_tune.tuning.planning.settings import preset_trials
from fashionclip_tune.tuning.planning.slots import Slots
from fashionclip_tune.tuning.planning.throughput import keep_measured, measured_in, model_paces
from fashionclip_tune.tuning.planning.time_budget import TimeBudget
from fashionclip_tune.tuning.study.policy import ModelQuota

GB = 10**9
B32 = ProjectConfig(clip_model="ViT-B-32", device="cuda")


def course(*, count: int = 1, rate: float | None = 100.0, trials: int = 30, halves: bool = True) -> Course:
    allotment = Allotment(Slots(count, 1, 0), Machine(2, 12 * GB, GB), {}, None, None)
    paces = None if rate is None else [ModelPace(rate, rate / 2, 2 * rate, 10.0, 5.0, "stated")]
    return Course(trials, allotment, [B32], paces, 3, "asha" if halves else "none")


def test_without_rungs_the_course_is_plain_arithmetic() -> None:
    plan = forecast(course(trials=4, halves=False), budget=900, stage=100)
    assert plan.examples == 3600
    assert plan.trials_to_budget == 4
    # A trial: 10 s to start, 900 photos at 100/s, nine evaluations of 5 s.
    assert plan.hours == pytest.approx(4 * 64 / 3600)
    assert plan.hours_low == pytest.approx(4 * (10 + 4.5 + 45) / 3600)
    assert plan.hours_high == pytest.approx(4 * (10 + 18 + 45) / 3600)
    assert plan.first_stage_s == {"ViT-B-32": pytest.approx(16)}
    two = forecast(course(trials=4, halves=False, count=2), budget=900, stage=100)
    assert two.hours == pytest.approx(2 * 64 / 3600)


def test_with_rungs_most_trials_end_at_them() -> None:
    """The first trial always goes on, and of trial i about a third and a half place: in all about one more than n/3."""
    plan = forecast(course(trials=30), budget=900, stage=100)
    assert 4 < plan.trials_to_budget < 9
    assert 30 * 100 < plan.examples < 30 * 900 * 0.5


def two_models(**changes: object) -> Course:
    """A slow one and a fast one, drawn equally often; no rungs."""
    plain = course(trials=10, halves=False)
    slow = B32.with_overrides({"clip_model": "ViT-B-16"})
    paces = [ModelPace(100, 100, 100, 0, 0, "stated"), ModelPace(10, 10, 10, 0, 0, "stated")]
    return replace(plain, configs=[B32, slow], paces=paces, **changes)


def test_points_and_each_models_minimum_come_before_the_samplers_choice() -> None:
    quota = ModelQuota("clip_model", {"ViT-B-32": 1, "ViT-B-16": 3}, 5)
    # Five of each: 900 photos at 100/s and at 10/s.
    assert forecast(two_models(quota=quota), 900, 100).hours == pytest.approx(5 * (9 + 90) / 3600)
    one = replace(quota, min_trials=10, cost_of_model={"ViT-B-32": 1})
    assert forecast(two_models(quota=one), 900, 100).hours == pytest.approx(10 * 9 / 3600)
    # A point of the slow model is the first trial, and counts for its minimum.
    slow_first = two_models(quota=quota, num_points=1)
    slow_first = replace(slow_first, configs=slow_first.configs[::-1], paces=slow_first.paces[::-1])
    assert forecast(slow_first, 900, 100).hours == pytest.approx(5 * (9 + 90) / 3600)
    # Free: between all fast and all slow.
    free = forecast(two_models(), 900, 100)
    assert free.hours_low is not None
    assert free.hours_high is not None
    assert 10 * 9 / 3600 < free.hours_low < free.hours_high < 10 * 90 / 3600


def test_hours_go_by_all_configurations_of_a_model_and_not_by_the_last_one() -> None:
    """Of one model, one draw in four is ten times as slow."""
    fast, slow = (ModelPace(rate, rate, rate, 0, 0, "stated") for rate in (100.0, 10.0))
    plain = replace(course(trials=40, halves=False), configs=[B32] * 4)
    one, other = (
        forecast(replace(plain, paces=paces), 900, 100) for paces in ([slow, fast, fast, fast], [fast, fast, fast, slow])
    )
    for plan in (one, other):
        assert plan.hours == pytest.approx(40 * (0.75 * 9 + 0.25 * 90) / 3600, rel=0.2)
        assert plan.samples_per_second == {"ViT-B-32": 100}
        assert plan.first_stage_s == {"ViT-B-32": 10}


def test_older_trials_count_for_the_minimum_and_at_the_rungs() -> None:
    quota = ModelQuota("clip_model", {"ViT-B-32": 1, "ViT-B-16": 3}, 5)
    older = ("ViT-B-16",) * 5 + ("ViT-B-32",) * 4
    with_older = forecast(replace(two_models(quota=quota, older=older), num_trials=1), 900, 100)
    assert with_older.hours == pytest.approx(9 / 3600)  # the one that is lacking, though both are drawn
    # The very first trial at a rung goes on whatever it is worth; beside thirty others one of three does.
    alone, beside = (forecast(replace(course(trials=1), older=names), 900, 100) for names in ((), ("ViT-B-32",) * 30))
    assert alone.trials_to_budget == 1
    assert 0 < beside.trials_to_budget < 0.3


def test_what_a_sweep_takes_beside_its_trials_is_in_the_hours() -> None:
    """On one slot: the sweep, a process, and three times the time between two trials."""
    plain = course(trials=4, halves=False)
    with_overhead = replace(plain, overhead=Overhead(7.0, 8.0, 1.0, "here"))
    hours = [forecast(each, 900, 100).hours for each in (plain, with_overhead)]
    assert hours[0] is not None
    assert hours[1] == pytest.approx(hours[0] + (7 + 8 + 3 * 1) / 3600)
    assert forecast(with_overhead, 900, 100).as_json()["overhead"]["process_s"] == 8


def test_that_is_measured_in_a_sweep_that_ran_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slots. Trials 0 and 1 wait 9 and 7 s for their process, 2 and 3 have 1.5 and 0.5 s beside their own time."""
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path))
    started = datetime(2026, 1, 1)
    trials, durations_s = [], {}
    for number, (start, end, own) in enumerate([(0, 19, 10), (0, 17, 10), (17, 28.5, 10), (19, 29.5, 10)]):
        trial = optuna.trial.create_trial(value=0.5)
        trial.number, durations_s[number] = number, float(own)
        trial.datetime_start, trial.datetime_complete = (started + timedelta(seconds=s) for s in (start, end))
        trials.append(trial)
    assert "another machine" in known_overhead(2, "cpu").source
    found = keep_overhead(trials, durations_s, 35.0, slots=2, device="cpu")
    assert found is not None
    assert (found.sweep_s, found.process_s, found.trial_s) == pytest.approx((35 - 29.5, 8.0, 1.0))
    assert known_overhead(2, "cpu") == replace(found, source="measured in an earlier sweep")
    assert known_overhead(1, "cpu").source != known_overhead(2, "cpu").source
    assert keep_overhead(trials[:2], durations_s, 35.0, slots=2, device="cpu") is None
    assert "another machine" in known_overhead(2, "cuda").source  # of a card, that need not be here


def test_an_unknown_rate_leaves_the_hours_open() -> None:
    plan = forecast(course(rate=None), budget=900, stage=100)
    assert (plan.hours, plan.hours_low) == (None, None)
    assert plan.examples > 3000


@pytest.mark.parametrize(
    ("name", "trials", "rungs"),
    [
        ("quick", 8, (1792, 5376, 16128)),
        ("evening", 30, (16_000, 48_000, 144_000)),
        ("night", 30, (28_992, 86_976, 260_928)),
    ],
)
def test_presets_have_their_rungs_where_data_and_rates_allow(name: str, trials: int, rungs: tuple[int, ...]) -> None:
    assert preset_trials(name) == trials
    budget, stage, note = preset_budget(name, course(rate=1e6), batch_sizes=(64,), num_train=260_000)
    assert (stage, 3 * stage, budget) == rungs
    assert note == ""


def test_presets_come_closer_for_small_data_and_slow_cards() -> None:
    budget, _, note = preset_budget("evening", course(rate=None), batch_sizes=(16, 64), num_train=2_000)
    assert budget <= 20_000
    assert "10 passes" in note
    slow = course(rate=20.0)
    budget, stage, note = preset_budget("evening", slow, batch_sizes=(64,), num_train=260_000)
    assert "6 hours" in note
    hours = forecast(slow, budget, stage).hours
    assert hours is not None
    assert 4 < hours < 6.5
    with pytest.raises(UserError, match=r"--preset 'weekend' is not allowed: quick, evening, night"):
        preset_trials("weekend")


def test_a_t4s_rates_are_estimates_and_say_so_until_better_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def pace_of(config: ProjectConfig, at_a_time: int = 1, stated: float | None = None) -> ModelPace:
        paces = model_paces([config], lambda config: at_a_time, num_valid=454, stated=stated, say=print)
        assert paces is not None
        return paces[0]

    alone = pace_of(B32)
    assert alone.source == "estimate for a T4"
    assert alone.samples_per_second == pytest.approx(20e3 / 44)
    assert alone.evaluation_s == pytest.approx(1 / 3, rel=0.01)
    assert pace_of(B32, 2).samples_per_second == pytest.approx(alone.samples_per_second / 2)
    recomputed = B32.with_overrides({"hardware.gradient_checkpointing": True})
    assert pace_of(recomputed).samples_per_second == pytest.approx(0.75 * alone.samples_per_second)
    assert pace_of(B32, stated=99.0).samples_per_second == 99
    unknown = ProjectConfig(clip_model="RN50", device="cuda")
    assert model_paces([B32, unknown], lambda config: 1, num_valid=9, stated=None, say=print) is None
    with monkeypatch.context() as patch:
        patch.setattr(rates, "known_pace", lambda config: rates_pace(300.0, 360.0))
        assert pace_of(B32).samples_per_second == 300
        assert pace_of(B32, 2).samples_per_second == 180
        assert pace_of(B32).source == "measured by probe"


def rates_pace(alone: float, together: float):
    from fashionclip_tune.profiling.throughput import Pace

    return Pace(alone, together)


def rows_into(folder: Path, durations: list[float]) -> None:
    for number, duration_s in enumerate(durations):
        row = {"step": number, "examples_seen": 100 * number, "duration_s": duration_s, "samples_per_second": 50.0}
        if number == 0:
            del row["samples_per_second"]
        write_json(folder / "evaluations" / f"step_{number:08d}.json", row)


def test_a_sweeps_own_stages_are_measured_from_its_files(tmp_path: Path) -> None:
    assert measured_in([tmp_path]) is None
    rows_into(tmp_path, [7.0, 15.0, 18.0, 21.0])
    measured = measured_in([tmp_path])
    assert measured is not None
    assert (measured.samples_per_second, measured.start_s) == (50, 7)
    assert measured.evaluation_s == pytest.approx(1.0)
    assert measured.stage_s(100) == pytest.approx(3.0)


def test_an_earlier_sweep_is_measured_by_kind_of_trial(
    small_sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its trials froze nothing: of such as freeze a tower it says nothing, not even of the same model."""
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path))
    saved = json.loads(next(small_sweep.glob("trials/0000-*/config.json")).read_text())
    same = ProjectConfig.from_dict(saved).with_overrides({"training.learning_rate": 1e-6})
    frozen = same.with_overrides({"freeze.text_tower": True})
    keep_measured(small_sweep, [same, frozen], lambda config: 2, 20)
    assert len(list((tmp_path / "rates").iterdir())) == 1
    paces = model_paces([same], lambda config: 2, num_valid=20, stated=None, say=pytest.fail)
    assert paces is not None
    assert paces[0].source == "measured in an earlier sweep"


def test_a_tiny_tower_is_measured_once(tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path))
    said: list[str] = []
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(rates, "progress_bar", lambda what: nullcontext(lambda *progress: told.append((what, *progress))))
    config = tiny_config.with_overrides({"training.budget_examples": None, "training.stage_examples": None})
    for _ in range(2):
        paces = model_paces([config], lambda config: 2, num_valid=20, stated=None, say=said.append)
        assert paces is not None
        assert 10 < paces[0].samples_per_second < 100_000
        assert paces[0].source == "measured in a short run"
    assert len(said) == 1
    steps = 2 * 512 // 16
    assert told == [("measuring how fast tiny-clip trains here", step, steps) for step in range(steps)]


def test_no_trial_starts_that_cannot_reach_its_first_rung() -> None:
    now = [1000.0]
    needs = {"small": 600.0, "large": 1800.0}
    budget = TimeBudget(60, needs.get, tuple(needs), started=1000.0, clock=lambda: now[0])
    assert budget.left_s() == 3000  # ten minutes before the end
    assert budget.may_start()
    assert budget.may_start("large")
    now[0] += 1500
    assert not budget.may_start("large")
    assert budget.may_start("small")
    assert budget.may_start()
    now[0] += 1000
    assert not budget.may_start()
    assert budget.is_over
    assert budget.refusal == "no more trials were started: the first rung takes 10 min, 8 min were left"
    # Of a short budget a sixth is kept.
    assert TimeBudget(6, needs.get, (), started=0.0, clock=lambda: 0.0).left_s() == pytest.approx(300)


def test_plan_against_fact(tmp_path: Path) -> None:
    rows_into(tmp_path / "trials" / "0000-vit-b-32-siglip", [7.0, 15.0, 18.0])
    row = {"trial_id": "0000", "examples_seen": 200, "stop_reason": "budget", "config": {"clip_model": "ViT-B-32"}}
    plan = forecast(course(trials=1, halves=False, rate=40.0), budget=200, stage=100).as_json()
    content = {"plan": plan, "elapsed_s": 30.0, "trials": [row]}
    lines = fact_lines(plan_against_fact(content, tmp_path))
    assert "planned 0.4, was 0.5 min (+20%)" in lines[1]
    assert "planned 200, was 200 (+0%)" in lines[2]
    assert lines[4].split() == ["ViT-B-32", "planned", "40,", "was", "50", "samples/s", "(+25%)"]
    assert plan_against_fact({"trials": []}, tmp_path) == []
    assert not math.isnan(plan["hours"])
