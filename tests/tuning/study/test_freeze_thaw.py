"""The search that lets trials wait: what it may spend, what it keeps, whom it asks; without Ray, on a made-up space."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from fashionclip_tune.tuning.study.choice import FreshPoint
from fashionclip_tune.tuning.study.draws import draw_points
from fashionclip_tune.tuning.study.freeze_thaw import FreezeThaw, SearchTerms, batch_key
from fashionclip_tune.tuning.study.study import SweepStudy, settings, stop_reason

STAGE, BUDGET = 100, 900
TERMS = SearchTerms(12, (STAGE, 3 * STAGE), BUDGET, {"small": 9.0, "large": 36.0}, 320.0, 2)
POINTS = [{"clip_model": model, "rate": 1e-3} for model in TERMS.cost_of_start]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def space(trial: Any) -> dict[str, Any]:
    model = trial.suggest_categorical("clip_model", list(TERMS.cost_of_start))
    return {"clip_model": model, "training.learning_rate": trial.suggest_float("rate", 1e-5, 1e-1, log=True)}


def fresh(seed: int, given: Any, count: int, space: Any = space) -> list[FreshPoint]:
    drawn = draw_points(space, count, seed, given, skips_errors=True)
    return [FreshPoint(each.params, each.distributions, each.settings["clip_model"]) for each in drawn]


def opened(folder: Path, **changed: Any) -> tuple[SweepStudy, FreezeThaw]:
    in_time = changed.pop("in_time", lambda start, first, last: True)
    study = SweepStudy(folder / "study.journal", seed=1, num_startup_trials=None, points=POINTS)
    return study, FreezeThaw(study, replace(TERMS, **changed), seed=1, fresh=fresh, in_time=in_time)


def value(drawn: dict[str, Any], seen: int) -> float:
    """Of the large model it is better, and the higher a rate the later it rises; each trial its own, so that few are equal."""
    rate = drawn["training.learning_rate"]
    level = (0.5 if drawn["clip_model"] == "large" else 0.4) - 0.05 * abs(math.log10(rate) + 3)
    return float(level * (seen / BUDGET) ** (0.3 if rate < 1e-3 else 0.6))


def run(study: SweepStudy, search: FreezeThaw, slots: int = 1, space: Any = space) -> list[tuple[int, int]]:
    """As Ray would: the trials that ran, each with the examples from which it went on."""
    began, running = [], dict[int, int]()
    while True:
        while len(running) < slots:
            idle = [number for number in study.unfinished() if number not in running]
            if idle:
                number = idle[0]
            elif search.wants_new():
                number, drawn = study.suggest(space)
                if drawn is None:
                    continue
            elif search.decides():
                continue
            else:
                break
            running[number] = max(study.curve(number), default=0)
            began.append((number, running[number]))
        if not running:
            return began
        number = next(iter(running))
        running[number] += STAGE
        study.record_stage(number, running[number], value(settings(study.trials()[number]), running[number]))
        if running[number] == BUDGET:
            study.end(number, TrialState.COMPLETE, "budget")
        if running[number] == BUDGET or not search.goes_on(number, running[number]):
            del running[number]


def test_a_batch_costs_what_its_size_costs_where_that_is_known() -> None:
    terms = replace(TERMS, cost_of_batch={batch_key("small", 512): 12.0})
    assert terms.cost("small", 512, 0, BUDGET) == 12.0
    assert terms.cost("small", 64, 0, BUDGET) == terms.cost("small", None, 0, BUDGET) == 9.0
    assert terms.cost("other", 512, 0, BUDGET) == 22.5, "a start that is not known costs as the mean one"
    assert SearchTerms.from_record(json.loads(json.dumps(terms.to_record()))) == terms
    older = {name: value for name, value in TERMS.to_record().items() if name != "cost_of_batch"}
    assert SearchTerms.from_record(older) == TERMS


def test_new_settings_are_chosen_by_what_their_batch_costs(tmp_path: Path) -> None:
    def with_batch(trial: Any) -> dict[str, Any]:
        return {**space(trial), "training.batch_size": trial.suggest_categorical("batch", [64, 512])}

    def offered(seed: int, given: Any, count: int) -> list[FreshPoint]:
        drawn = draw_points(with_batch, count, seed, given, skips_errors=True)
        return [
            FreshPoint(each.params, each.distributions, each.settings["clip_model"], each.settings["training.batch_size"])
            for each in drawn
        ]

    batches: dict[bool, list[int]] = {}
    for is_dear in (False, True):
        costs = {batch_key(model, 512): 9 * cost for model, cost in TERMS.cost_of_start.items()} if is_dear else {}
        study = SweepStudy(tmp_path / f"{is_dear}.journal", seed=1, num_startup_trials=None, points=POINTS)
        terms = replace(TERMS, cost_of_batch=costs, total_cost=1e4, num_trials=16)
        run(study, FreezeThaw(study, terms, seed=1, fresh=offered), space=with_batch)
        batches[is_dear] = [settings(each)["training.batch_size"] for each in study.trials()]
    assert batches[True].count(512) < batches[False].count(512), "a dear batch is drawn less often"


def spent(study: SweepStudy) -> float:
    trials = study.trials()
    return sum(TERMS.cost(settings(each)["clip_model"], None, 0, max(each.intermediate_values, default=0)) for each in trials)


@pytest.mark.parametrize("slots", [1, 3])
def test_all_trials_start_and_together_cost_what_they_may(tmp_path: Path, slots: int) -> None:
    study, search = opened(tmp_path)
    began = run(study, search, slots)
    assert search.is_over()
    assert [number for number, seen in began if seen == 0] == list(range(TERMS.num_trials))
    assert any(seen > 0 for _, seen in began), "one was thawed"
    assert spent(study) <= TERMS.total_cost + TERMS.cost("large", None, 300, 900) / 2
    assert spent(study) >= TERMS.total_cost - TERMS.cost("large", None, 300, 900) / 2 or not study.waiting
    assert any(stop_reason(trial) == "budget" for trial in study.trials())
    search.close()
    assert {trial.state for trial in study.trials()} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert {stop_reason(trial) for trial in study.trials()} <= {"budget", "rung_1", "rung_2"}
    assert not study.waiting


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_of_each_start_no_more_wait_than_are_kept(tmp_path: Path, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    study, search = opened(tmp_path, keep_paused=keep)
    most = 0
    decide = study.decide

    def counted(decision: Any) -> None:
        nonlocal most
        decide(decision)
        models = [settings(study.trials()[number])["clip_model"] for number in study.waiting]
        most = max([most, *(models.count(model) for model in set(models))])

    monkeypatch.setattr(study, "decide", counted)
    run(study, search)
    assert most == keep
    given_up = [reason for decision in study.decisions for reason in (decision.given_up or {}).values()]
    assert given_up
    assert set(given_up) <= {"rung_1", "rung_2"}


def test_points_come_first_and_their_reporters_wait(tmp_path: Path) -> None:
    study, search = opened(tmp_path)
    run(study, search)
    assert [trial.params for trial in study.trials()[:2]] == POINTS
    first = study.decisions[0]
    assert (first.reporter, first.examples_seen, first.chosen) == (0, STAGE, None)
    assert all(decision.chosen is not None for decision in study.decisions[1:6])


def test_what_has_no_time_is_neither_started_nor_thawed_and_is_left_for_a_later_run(tmp_path: Path) -> None:
    made: list[SweepStudy] = []
    study, search = opened(tmp_path, in_time=lambda start, first, last: len(made[0].decisions) < 9)
    made.append(study)
    began = run(study, search)
    assert 9 <= len(study.decisions) <= 12
    assert not study.unfinished()
    assert not search.is_over(), "there is more to do, at another time"
    study, search = opened(tmp_path)
    began += run(study, search)
    assert search.is_over()
    assert [number for number, seen in began if seen == 0] == list(range(TERMS.num_trials))


def test_terms_are_those_of_the_first_life_and_grow_with_the_trials(tmp_path: Path) -> None:
    study, _ = opened(tmp_path)
    assert study.terms() == json.loads(json.dumps(TERMS.to_record()))
    # Rates that are measured later change nothing.
    again, _ = opened(tmp_path, cost_of_start={"small": 1.0, "large": 1.0}, total_cost=1.0)
    assert again.terms() == TERMS.to_record()
    more, _ = opened(tmp_path, num_trials=18, total_cost=1.0)
    assert more.terms() == {**TERMS.to_record(), "num_trials": 18, "total_cost": TERMS.total_cost * 1.5}


def test_a_sweep_that_is_over_goes_on_with_more_trials(tmp_path: Path) -> None:
    study, search = opened(tmp_path)
    run(study, search)
    search.close()
    before = [(trial.state, trial.intermediate_values) for trial in study.trials()]
    study, search = opened(tmp_path, num_trials=15)
    assert not search.is_over()
    began = run(study, search)
    assert [number for number, seen in began if seen == 0] == [12, 13, 14]
    assert [(trial.state, trial.intermediate_values) for trial in study.trials()[:12]] == before


def test_a_reporter_whose_decision_is_recorded_is_not_asked_again(tmp_path: Path) -> None:
    study, search = opened(tmp_path)
    number, _ = study.suggest(space)
    study.record_stage(number, STAGE, 0.2)
    assert not search.goes_on(number, STAGE, variance=1e-4)
    assert study.judged_at(number) == {STAGE: 1e-4}
    study, search = opened(tmp_path)
    assert study.judged_at(number) == {STAGE: 1e-4}
    assert search.goes_on(number, STAGE), "thawed, it reports that stage again"
    assert len(study.decisions) == 1


def test_a_space_of_few_choices_has_as_many_trials_as_were_asked_for(tmp_path: Path) -> None:
    """Four settings in all: the rest repeats them, as other searches do."""

    def few(trial: Any) -> dict[str, Any]:
        model = trial.suggest_categorical("clip_model", list(TERMS.cost_of_start))
        return {"clip_model": model, "training.learning_rate": trial.suggest_categorical("rate", [1e-4, 1e-3])}

    study = SweepStudy(tmp_path / "study.journal", seed=1, num_startup_trials=None)
    search = FreezeThaw(study, TERMS, seed=1, fresh=partial(fresh, space=few))
    run(study, search, space=few)
    assert search.is_over()
    assert len(study.trials()) == TERMS.num_trials
    assert len({tuple(trial.params.items()) for trial in study.trials()}) == 4


def test_a_space_that_raises_now_and_then_has_as_many_trials_as_were_asked_for(tmp_path: Path) -> None:
    def sometimes(trial: Any) -> dict[str, Any]:
        if trial.suggest_float("unlucky", 0, 1) < 0.5:
            raise RuntimeError("no")
        return space(trial)

    study = SweepStudy(tmp_path / "study.journal", seed=1, num_startup_trials=None)
    search = FreezeThaw(study, TERMS, seed=1, fresh=partial(fresh, space=sometimes))
    run(study, search, space=sometimes)
    assert search.is_over()
    assert len(study.trials()) == TERMS.num_trials


def test_a_start_that_no_draw_before_the_sweep_had_costs_the_usual(tmp_path: Path) -> None:
    """Where a space takes a branch rarely, its cost is not among the terms."""
    study, search = opened(tmp_path, cost_of_start={"small": 9.0})
    run(study, search)
    assert search.is_over()
    assert {settings(trial)["clip_model"] for trial in study.trials()} == {"small", "large"}


def test_the_first_trial_is_whole_before_any_other_and_older_sweeps_go_on_without_that_rule(tmp_path: Path) -> None:
    study, search = opened(tmp_path, num_points=1)
    began = run(study, search)
    thawed = [each for each in began if each[1]]
    assert thawed[0] == (0, STAGE)
    assert all(number != 0 for number, _ in thawed[1:])
    assert max(study.curve(0)) == BUDGET
    assert (study.terms() or {})["num_points"] == 1
    recorded = {name: value for name, value in TERMS.to_record().items() if name != "num_points"}
    assert SearchTerms.from_record(recorded) == TERMS
    assert TERMS.num_points == 0
