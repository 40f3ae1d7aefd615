"""What a plan says of time: presets, rates and where they come from, the course of a sweep, the time that is left."""

import csv
import json
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.files import write_json
from fashionclip_tune.machine.hardware import Machine
from fashionclip_tune.models.architecture import forward_flops
from fashionclip_tune.tuning.planning import throughput as rates
from fashionclip_tune.tuning.planning.allocation import Allotment
from fashionclip_tune.tuning.planning.budget import preset_budget
from fashionclip_tune.tuning.planning.forecast import PROCESS_S, SWEEP_S, TRIAL_S, Course, ModelPace, forecast, search_terms
from fashionclip_tune.tuning.planning.settings import preset_trials
from fashionclip_tune.tuning.planning.slots import Slots
from fashionclip_tune.tuning.planning.throughput import decoding_s, keep_measured, measured_in, model_paces
from fashionclip_tune.tuning.planning.time_budget import TimeBudget
from fashionclip_tune.tuning.schedulers import AshaRule, MedianRule, StoppingRule, stopping_rule
from fashionclip_tune.tuning.study.policy import ModelQuota

GB = 10**9
B32 = ProjectConfig(clip_model="ViT-B-32", device="cuda")
B16 = ProjectConfig(clip_model="ViT-B-16", device="cuda")


def course(*, count: int = 1, rate: float | None = 100.0, trials: int = 30, halves: bool = True) -> Course:
    allotment = Allotment(Slots(count, 1, 0), Machine(2, 12 * GB, GB), {}, None, None)
    paces = None if rate is None else [ModelPace(rate, 10.0, 5.0, "stated")]
    return Course(trials, allotment, [B32], paces, 3, "asha-begun" if halves else "none")


def trials_s(course: Course, budget: int = 900, stage: int = 100) -> float:
    """The hours without what a sweep takes beside its trials, in seconds."""
    hours = forecast(course, budget, stage).hours
    assert hours is not None
    return 3600 * hours - SWEEP_S - PROCESS_S


def test_where_trials_wait_all_together_cost_what_asha_would_and_one_whole_trial_at_least() -> None:
    """What the plan says and what the search keeps to are the same number."""
    for trials in (1, 2, 5, 30):
        waits = replace(course(trials=trials), scheduler="asha")
        stopping = forecast(replace(waits, scheduler="asha-stopping"), 900, 100)
        plan, terms = forecast(waits, 900, 100), search_terms(waits, 900, 100, keep_paused=3)
        assert terms.total_cost == pytest.approx(plan.examples / 900 * terms.cost_of_start["ViT-B-32"])
        assert plan.examples == pytest.approx(max(stopping.examples, 900 + (trials - 1) * 100))
        assert plan.hours is not None
        assert (terms.rungs, terms.num_trials, terms.keep_paused) == ((100, 300), trials, 3)
        more = terms.extended(2 * trials)
        assert (more.num_trials, more.total_cost) == (2 * trials, pytest.approx(2 * terms.total_cost))


def test_without_a_rate_costs_go_by_operations_and_a_costly_start_can_run_to_its_budget() -> None:
    allotment = Allotment(Slots(1, 1, 0), Machine(2, 12 * GB, GB), {}, None, None)
    terms = search_terms(Course(4, allotment, [B32, B16], None, 3, "asha"), 900, 100, keep_paused=1)
    small, large = terms.cost_of_start["ViT-B-32"], terms.cost_of_start["ViT-B-16"]
    assert large / small == pytest.approx(forward_flops("ViT-B-16") / forward_flops("ViT-B-32"))
    assert terms.total_cost >= large + 3 * (small + large) / 2 / 9


def test_without_rungs_it_is_plain_arithmetic() -> None:
    plan = forecast(course(trials=4, halves=False), budget=900, stage=100)
    assert plan.examples == 3600
    assert plan.trials_to_budget == 4
    # A trial: 10 s to start, 900 photos at 100/s, nine evaluations of 5 s.
    assert trials_s(course(trials=4, halves=False)) == pytest.approx(4 * (64 + TRIAL_S))
    assert trials_s(course(trials=4, halves=False, count=2)) == pytest.approx(2 * (64 + TRIAL_S))
    assert trials_s(course(trials=5, halves=False, count=4)) == pytest.approx(2 * (64 + TRIAL_S))
    assert course().seconds_of("ViT-B-32", 100, 100) == pytest.approx(16)
    assert course().seconds_of("ViT-B-16", 100, 100) is None


@pytest.mark.parametrize("num_earlier", [0, 1, 2, 5])
@pytest.mark.parametrize("rule", [AshaRule((1,), 3), MedianRule((1,))])
def test_the_chance_at_the_first_rung_is_that_of_the_rule(rule: StoppingRule, num_earlier: int) -> None:
    draw = random.Random(num_earlier)
    curves = [[{1: draw.random()} for _ in range(num_earlier + 1)] for _ in range(3000)]
    found = sum(rule.survives(last, earlier) for *earlier, last in curves) / len(curves)
    assert rule.chance(num_earlier, 0) == pytest.approx(found, abs=0.03)


@pytest.mark.parametrize("data", ["fpi60", "synthetic"])
@pytest.mark.parametrize(("scheduler", "num_trials"), [("asha-begun", 10), ("asha-begun", 30), ("median", 10), ("median", 30)])
def test_recorded_curves_train_about_what_is_expected(data: str, scheduler: str, num_trials: int) -> None:
    """The rule itself on the curves of a hundred settings of the tiny space, in random orders."""
    settings, stages = recorded_curves(data)
    rule = stopping_rule(scheduler, stage_examples=stages[0], budget_examples=stages[-1], reduction_factor=3)
    found = []
    for seed in range(40):
        reached: dict[tuple[str, int], list[dict[int, float]]] = {}
        for model, curve in random.Random(seed).sample(settings, num_trials):
            found.append(stages[-1])
            for rung in rule.rungs:
                own = {stage: value for stage, value in curve.items() if stage <= rung}
                earlier = reached.setdefault((model, rung), [])
                earlier.append(own)
                if not rule.survives(own, earlier[:-1]):
                    found[-1] = rung
                    break
    of_two_models = replace(course(trials=num_trials), scheduler=scheduler, configs=[B32, B16], paces=None)
    expected = forecast(of_two_models, stages[-1], stages[0]).examples / num_trials
    assert expected == pytest.approx(sum(found) / len(found), rel=0.1)


def recorded_curves(data: str) -> tuple[list[tuple[str, dict[int, float]]], list[int]]:
    found = []
    with open(Path(__file__).parents[3] / "benchmarks" / "search" / f"search_curves_{data}.csv", newline="") as file:
        for row in csv.DictReader(file):
            stages = [int(stage) for stage in row["examples_seen"].split()][1:]
            curve = dict(zip(stages, map(float, row["recall_at_10"].split()[1:]), strict=False))
            found.append((json.loads(row["parameters"])["clip_model"], curve))
    return found, stages


@pytest.mark.parametrize(("num_trials", "ends"), [(16, {100: 9, 900: 7}), (10, {100: 4, 300: 1, 900: 5})])
def test_recorded_sweeps_trained_about_what_is_expected(num_trials: int, ends: dict[int, int]) -> None:
    """Those in results/README.md, of two models each."""
    expected = forecast(replace(course(trials=num_trials), configs=[B32, B16], paces=None), 900, 100)
    assert expected.examples == pytest.approx(sum(stage * count for stage, count in ends.items()), rel=0.2)


def two_models(**changes: object) -> Course:
    """A slow one and a fast one, drawn equally often; no rungs, no time but that of training."""
    paces = [ModelPace(100, 0, 0, "stated"), ModelPace(10, 0, 0, "stated")]
    return replace(course(trials=10, halves=False), configs=[B32, B16], paces=paces, **changes)


def test_points_and_each_models_minimum_come_before_the_samplers_choice() -> None:
    quota = ModelQuota("clip_model", {"ViT-B-32": 1, "ViT-B-16": 3}, 5)
    assert two_models(quota=quota).counts == pytest.approx([5, 5])
    # 900 photos at 100/s and at 10/s.
    assert trials_s(two_models(quota=quota)) == pytest.approx(5 * (9 + 90) + 10 * TRIAL_S)
    one = replace(quota, min_trials=10, cost_of_model={"ViT-B-32": 1})
    assert two_models(quota=one).counts == pytest.approx([10, 0])
    # A point is the first trial, and counts for its model's minimum; it is drawn no more, unless its model has nothing else.
    assert two_models(quota=quota, num_points=1).counts == pytest.approx([5, 5])
    assert two_models(num_points=1).counts == pytest.approx([1, 9])
    assert two_models().counts == pytest.approx([5, 5])


def test_hours_go_by_all_configurations_of_a_model() -> None:
    """Of one model, one draw in four is ten times as slow."""
    paces = [ModelPace(rate, 0, 0, "stated") for rate in (100.0, 10.0, 100.0, 100.0)]
    plain = replace(course(trials=40, halves=False), configs=[B32] * 4, paces=paces)
    assert trials_s(plain) == pytest.approx(40 * (0.75 * 9 + 0.25 * 90 + TRIAL_S))
    assert forecast(plain, 900, 100).samples_per_second == {"ViT-B-32": 100}
    assert plain.seconds_of("ViT-B-32", 100, 100) == 10


def test_older_trials_count_for_the_minimum_and_at_the_rungs() -> None:
    quota = ModelQuota("clip_model", {"ViT-B-32": 1, "ViT-B-16": 3}, 5)
    older = ("ViT-B-16",) * 5 + ("ViT-B-32",) * 4
    assert replace(two_models(quota=quota, older=older), num_trials=1).counts == [1, 0]  # the one that is lacking
    # The very first trial at a rung goes on whatever it is worth; beside thirty others one of three does.
    alone, beside = (forecast(replace(course(trials=1), older=names), 900, 100) for names in ((), ("ViT-B-32",) * 30))
    assert alone.trials_to_budget == 1
    assert 0 < beside.trials_to_budget < 0.3


def test_hours_of_an_estimated_rate_have_the_wider_range() -> None:
    measured = forecast(course(), 900, 100)
    estimated = forecast(replace(course(), paces=[ModelPace(100.0, 10.0, 5.0, "estimate", is_estimate=True)]), 900, 100)
    assert measured.hours == estimated.hours
    assert 0 < measured.error < estimated.error < 1


def test_an_unknown_rate_leaves_the_hours_open() -> None:
    plan = forecast(course(rate=None), budget=900, stage=100)
    assert plan.hours is None
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
        paces = model_paces([config], lambda config: at_a_time, num_valid=454, stated=stated)
        assert paces is not None
        return paces[0]

    alone = pace_of(B32)
    assert alone.source == "estimate for a T4"
    assert 250 < alone.samples_per_second < 380  # 451 at 20 TFLOPS, without memory traffic
    assert 0.2 < alone.evaluation_s * alone.samples_per_second / 454 < 1 / 3
    assert pace_of(B32, 2).samples_per_second == pytest.approx(alone.samples_per_second / 2)
    recomputed, cut = (
        B32.with_overrides(setting)
        for setting in ({"hardware.gradient_checkpointing": True}, {"training.micro_batch_size": 32})
    )
    assert 0.7 < pace_of(recomputed).samples_per_second / alone.samples_per_second < 0.8
    assert pace_of(cut).samples_per_second < pace_of(recomputed).samples_per_second
    frozen = pace_of(B32.with_overrides({"freeze.image_tower": True}))
    assert frozen.samples_per_second > 1.2 * alone.samples_per_second
    assert pace_of(B32, stated=99.0).samples_per_second == 99
    other = ProjectConfig(clip_model="RN50", device="cuda")
    assert 20 < pace_of(other).samples_per_second < 20e12 / (3 * forward_flops("RN50"))
    unknown = ProjectConfig(clip_model="ViT-B-32", device="cpu")  # nobody waits for it to be measured
    assert model_paces([unknown], lambda config: 1, num_valid=9, stated=None) is None
    with monkeypatch.context() as patch:
        patch.setattr(rates, "known_pace", lambda config: rates_pace(300.0, 360.0))
        assert pace_of(B32).samples_per_second == 300
        assert pace_of(B32, 2).samples_per_second == 180
        assert pace_of(B32).source == "measured by probe"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-40GB")
        patch.setattr(rates, "_pace", lambda *_: None)
        patch.setattr(rates, "_path", lambda *_: Path("nothing"))
        patch.setattr(rates, "autocast_dtype", lambda config: torch.float16)  # what was counted above
        a100 = pace_of(B32)
        assert a100.source == "estimate for an A100"
        assert a100.samples_per_second > 2 * alone.samples_per_second  # its host cannot keep up with it
        assert pace_of(B32, 2) == a100  # one on each of the two cards
        patch.setattr(torch.cuda, "get_device_name", lambda _: "A card that nobody knows")
        assert pace_of(B32).source == "estimate for a T4"


def test_photos_to_evaluate_on_are_decoded_once_a_sweep_in_each_size() -> None:
    siglip2 = ProjectConfig(clip_model="ViT-B-16-SigLIP2-256", device="cuda")
    assert decoding_s([B32, B16], 2.0, 974) == pytest.approx(1.0)
    assert decoding_s([B32, B16, siglip2], 1.0, 974) == pytest.approx(4.0)
    assert decoding_s([replace(B32, device="cpu")], 2.0, 974) == 0
    once = replace(course(trials=4, halves=False), decoding_s=100.0)
    assert trials_s(once) == pytest.approx(trials_s(course(trials=4, halves=False)) + 100)


def rates_pace(alone: float, together: float) -> Any:
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
    """Its trials froze nothing, in this edition: of others it says nothing, not even of the same model."""
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path))
    monkeypatch.setattr(rates, "_MEASURED_FLOPS", 0)
    saved = json.loads(next(small_sweep.glob("trials/0000-*/config.json")).read_text())
    same = ProjectConfig.from_dict(saved).with_overrides({"training.learning_rate": 1e-6})
    frozen = same.with_overrides({"freeze.text_tower": True})
    older = same.with_overrides({"training.edition": 1})
    keep_measured(small_sweep, [older, same, frozen], lambda config: 2, 20)
    assert len(list((tmp_path / "rates").iterdir())) == 1
    paces = model_paces([same], lambda config: 2, num_valid=20, stated=None)
    assert paces is not None
    assert paces[0].source == "measured in an earlier sweep"
    assert model_paces([older], lambda config: 2, num_valid=20, stated=None) is None


def test_a_tiny_tower_is_measured_once(
    tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: Sequence[str]
) -> None:
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path))
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(rates, "progress_bar", lambda what: nullcontext(lambda *progress: told.append((what, *progress))))
    config = tiny_config.with_overrides({"training.budget_examples": None, "training.stage_examples": None})
    for _ in range(2):
        paces = model_paces([config], lambda config: 2, num_valid=20, stated=None)
        assert paces is not None
        assert 10 < paces[0].samples_per_second < 100_000
        assert paces[0].source == "measured in a short run"
    assert len(logged) == 1
    steps = 2 * 512 // 16
    assert told == [("measuring how fast tiny-clip trains here", step, steps) for step in range(steps)]


def test_no_trial_starts_that_cannot_reach_its_first_rung() -> None:
    now = [1000.0]
    needs = {"small": 600.0, "large": 1800.0}
    budget = TimeBudget(60, lambda name, examples: needs[name], 100, tuple(needs), started=1000.0, clock=lambda: now[0])
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
    assert TimeBudget(6, lambda name, examples: None, 100, (), started=0.0, clock=lambda: 0.0).left_s() == pytest.approx(300)
