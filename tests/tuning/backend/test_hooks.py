"""The searcher and the scheduler on their own: Ray's part is played by a few lines."""

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.tuning.backend.hooks import StudyScheduler, StudySearcher
from fashionclip_tune.tuning.backend.stop_signal import StopSignal
from fashionclip_tune.tuning.schedulers import NO_STOPPING, AshaRule, stopping_rule
from fashionclip_tune.tuning.study.choice import FreshPoint
from fashionclip_tune.tuning.study.draws import draw_points
from fashionclip_tune.tuning.study.freeze_thaw import FreezeThaw, SearchTerms
from fashionclip_tune.tuning.study.policy import ModelQuota
from fashionclip_tune.tuning.study.search import StoppingSearch
from fashionclip_tune.tuning.study.study import message, settings, stop_reason
from fashionclip_tune.tuning.trial import TrialPlan
from tests.support.studies import MODELS, job, open_study, space

STAGE, BUDGET = 100, 900


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power; a busy disk takes longer to sync than all else together."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def value_at(config: Any, examples_seen: Any) -> Any:
    """Best at a rate of 1e-3, at another level for each model; a rate above 0.05 makes it no number from 300 on."""
    rate = config["training.learning_rate"]
    if rate > 0.05 and examples_seen >= 300:
        return math.nan
    off = abs(math.log10(rate) + 3) / 4
    return (0.2 if config["clip_model"] == "tiny-sig" else 0.5) + 0.4 * (1 - off) * examples_seen / BUDGET


def search_of(study: Any, rule: Any, num_trials: Any, **changed: Any) -> Any:
    """``rule``: of one that stops trials; ``freeze-thaw``: of the search that lets them wait."""
    if rule != "freeze-thaw":
        return StoppingSearch(study, rule, num_trials)

    def fresh(seed: Any, given: Any, count: Any) -> Any:
        drawn = draw_points(space, count, seed, given)
        return [FreshPoint(each.params, each.distributions, each.settings["clip_model"]) for each in drawn]

    terms = SearchTerms(num_trials, (STAGE, 3 * STAGE), BUDGET, dict.fromkeys(MODELS, 9.0), 0.28 * 9 * num_trials, 3)
    return FreezeThaw(study, replace(terms, **changed), seed=5, fresh=fresh)


def drive(
    study: Any,
    rule: Any,
    *,
    num_trials: Any = 14,
    max_concurrent: Any = 1,
    values: Any = value_at,
    order: Any = None,
    error_of: Any = lambda config: None,
    stop: Any = None,
) -> Any:
    """Runs a sweep to its end, as Ray would; a trial that goes on reports its last stage again.

    ``error_of`` says of a configuration with which message it fails at once, if at all.
    """
    stop = stop or StopSignal()
    search = search_of(study, rule, num_trials)
    searcher = StudySearcher(study, search, job(Path("sweep"), max_concurrent), stop)
    scheduler = StudyScheduler(study, search, stop)
    names, running, asking = itertools.count(), dict[Any, Any](), True
    while asking or running:
        if asking and len(running) < max_concurrent:
            name = str(next(names))
            suggested = searcher.suggest(name)
            if suggested == "FINISHED":
                asking = False
            elif suggested is not None:
                plan = TrialPlan.from_ray(suggested)
                first = max(study.curve(plan.number), default=0)
                running[name] = (SimpleNamespace(config=suggested), iter(range(first, BUDGET + 1, STAGE)))
            if suggested is not None or not running:
                continue
        name = order.choice(sorted(running)) if order else next(iter(running))
        trial, stages = running[name]
        stage = next(stages, None)
        if stage is not None:
            plan = TrialPlan.from_ray(trial.config)
            result = {"examples_seen": stage, "recall_at_10": values(plan.config, stage)}
            if (error := error_of(plan.config)) is not None:
                result = {"examples_seen": 0, "recall_at_10": 0.0, "stop_reason": "error", "message": error}
            if scheduler.on_trial_result(None, trial, result) == "CONTINUE":
                continue
        del running[name]
        searcher.on_trial_complete(name)

    if search.is_over():
        search.close()
    return Path("sweep")


def outcome(study: Any) -> Any:
    return [
        (trial.number, trial.state, stop_reason(trial), settings(trial), trial.intermediate_values, trial.value)
        for trial in study.trials()
    ]


def happened(study: Any) -> set[str]:
    """What its decisions did."""
    found = set()
    for decision in study.decisions:
        chosen = decision.chosen
        if decision.reporter is not None and (chosen is None or chosen.trial != decision.reporter):
            found.add("paused")
        if chosen is not None:
            found.add("new" if chosen.trial is None else "went on" if chosen.trial == decision.reporter else "thawed")
        found |= {"given up"} if decision.given_up else set()
    return found


QUOTA = ModelQuota("clip_model", dict.fromkeys(MODELS, 1.0), 3)


def rule_of(scheduler: Any) -> Any:
    if scheduler == "asha":
        return "freeze-thaw"
    return stopping_rule(scheduler, stage_examples=STAGE, budget_examples=BUDGET, reduction_factor=3)


@pytest.mark.parametrize("scheduler", ["asha", "asha-stopping", "asha-begun", "median", "none"])
def test_a_sweep_killed_at_any_record_ends_as_one_that_never_was(tmp_path: Path, scheduler: Any) -> None:
    """The journal is cut after some record, or within one: what a kill leaves at that moment."""
    rule = rule_of(scheduler)
    waits = {"num_startup_trials": None, "points": [{"clip_model": model, "learning_rate": 1e-4} for model in MODELS]}
    kind = waits if scheduler == "asha" else {"quota": QUOTA}
    (tmp_path / "whole").mkdir()
    whole = open_study(tmp_path / "whole", **kind)
    drive(whole, rule)
    expected = outcome(whole)
    assert len(expected) == 14
    assert {state for _, state, *_ in expected} <= {TrialState.COMPLETE, TrialState.PRUNED}
    ends = {end for _, _, end, *_ in expected}
    assert "budget" in ends
    assert any(end.startswith("rung_") for end in ends) == (scheduler != "none")
    assert scheduler != "asha" or {"paused", "thawed", "new", "given up"} <= happened(whole)
    lines = (tmp_path / "whole" / "study.journal").read_bytes().splitlines(keepends=True)
    draw = random.Random(scheduler)
    decisions = [place for place, line in enumerate(lines) if b'"decision ' in line]  # what a decision says is done after it
    near = {place + step for place in draw.sample(decisions, min(6, len(decisions))) for step in (0, 1, 2)}
    for cut in sorted({1, 2, *(draw.randrange(3, len(lines)) for _ in range(10)), *near} - {len(lines)}):
        folder = tmp_path / f"cut-{cut}"
        folder.mkdir(exist_ok=True)
        torn = lines[cut][: draw.randrange(len(lines[cut]))]
        (folder / "study.journal").write_bytes(b"".join(lines[:cut]) + torn)
        study = open_study(folder, **kind)
        drive(study, rule)
        assert str(outcome(study)) == str(expected), f"cut after {cut} of {len(lines)} records"


@pytest.mark.parametrize("scheduler", ["asha", "asha-stopping", "median", "none"])
def test_no_trial_is_left_running_and_no_nan_goes_on(tmp_path: Path, scheduler: Any) -> None:
    rule = rule_of(scheduler)
    study = open_study(tmp_path)
    broken = lambda config, seen: math.nan if seen >= 300 else value_at(config, seen)  # noqa: E731
    drive(study, rule, max_concurrent=3, values=broken, order=random.Random(1))
    trials = study.trials()
    assert len(trials) == 14
    assert all(trial.state.is_finished() for trial in trials)
    assert max(max(trial.intermediate_values) for trial in trials) == 300, "what is no number ends where it appears"
    diverged = [trial for trial in trials if stop_reason(trial) == "diverged"]
    assert diverged
    for trial in diverged:
        assert (trial.state, trial.constraints) == (TrialState.PRUNED, {"ends": 1.0})
        assert message(trial) == "recall_at_10 is nan after 300 examples"


def test_median_decides_on_the_journal_as_the_rule_says_and_for_each_architecture_alone(tmp_path: Path) -> None:
    """Every decision is repeated from the curves that stood in the journal before it; the weaker model is not stopped for
    being weaker."""
    study = open_study(tmp_path, quota=ModelQuota("clip_model", dict.fromkeys(MODELS, 1.0), 7))
    drive(study, stopping_rule("median", stage_examples=STAGE, budget_examples=BUDGET, reduction_factor=3))
    trials = study.trials()
    by_model = {model: [t for t in trials if settings(t)["clip_model"] == model] for model in MODELS}
    for of_model in by_model.values():
        assert len(of_model) == 7
        for index, trial in enumerate(of_model):
            stages = sorted(stage for stage in trial.intermediate_values if stage % STAGE == 0 and stage > 0)
            for stage in stages:
                earlier = [t.intermediate_values for t in of_model[:index] if stage in t.intermediate_values]
                means = sorted(sum(c[s] for s in range(STAGE, stage + 1, STAGE)) / (stage // STAGE) for c in earlier)
                best = max(trial.intermediate_values[s] for s in stages if s <= stage)
                middle = (means[(len(means) - 1) // 2] + means[len(means) // 2]) / 2 if len(means) >= 3 else -1.0
                stopped = stop_reason(trial) == f"rung_{stage // STAGE}"
                if stage < BUDGET and stop_reason(trial) != "diverged":
                    assert stopped == (best < middle - 1e-12)
    assert any(stop_reason(trial) == "budget" for trial in by_model["tiny-sig"])


def scheduled(study: Any, rule: Any, number: Any, examples_seen: Any, value: Any, model: Any = "tiny-clip", **more: Any) -> Any:
    config = ProjectConfig(clip_model=model).to_dict()
    trial = SimpleNamespace(config=TrialPlan(number, "somewhere", config).to_ray())
    return StudyScheduler(study, search_of(study, rule, 14), StopSignal()).on_trial_result(
        None, trial, {"examples_seen": examples_seen, "recall_at_10": value, **more}
    )


def test_a_decision_is_in_the_journal_before_it_takes_effect_and_is_not_taken_twice(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    rule = AshaRule((100, 300), 3)
    for number, value in enumerate((0.5, 0.6, 0.4)):
        study.suggest(lambda trial: {**space(trial), "clip_model": "tiny-clip"})
        decision = scheduled(study, rule, number, 100, value)
        seen = open_study(tmp_path)  # what another process reads at this moment
        assert (seen.passed_rungs(number) == [100]) == (decision == "CONTINUE")
        assert (number not in seen.unfinished()) == (decision == "STOP")
    assert stop_reason(study.trials()[2]) == "rung_1"
    # Trial 0 would not be among the best third any more; it has passed, and reports the stage again in its next life.
    assert scheduled(open_study(tmp_path), rule, 0, 100, 0.5) == "CONTINUE"
    assert study.trials()[2].intermediate_values == {100: 0.4}, "stopped trials end at their step"
    assert (study.trials()[2].state, study.trials()[2].value) == (TrialState.PRUNED, 0.4)


@pytest.mark.parametrize(
    ("reason", "state", "value"),
    [
        ("diverged", TrialState.PRUNED, 0.7),
        ("out_of_memory", TrialState.PRUNED, 0.7),
        ("bad_data", TrialState.FAIL, None),
        ("error", TrialState.FAIL, None),
    ],
)
def test_how_a_trial_that_fails_is_told(tmp_path: Path, reason: Any, state: Any, value: Any) -> None:
    study = open_study(tmp_path)
    study.suggest(space)
    scheduled(study, NO_STOPPING, 0, 100, 0.7)
    assert scheduled(study, NO_STOPPING, 0, 100, 0.7, stop_reason=reason, message="why") == "STOP"
    (trial,) = open_study(tmp_path).trials()
    assert (trial.state, trial.value, stop_reason(trial), message(trial)) == (state, value, reason, "why")
    assert open_study(tmp_path).unfinished() == []


def reasons(study: Any) -> Any:
    return [stop_reason(trial) for trial in study.trials()]


@pytest.mark.parametrize("max_concurrent", [1, 2])
def test_a_fault_of_the_machine_does_not_burn_all_trials(tmp_path: Path, max_concurrent: Any) -> None:
    """It is told from a setting by its having hit both models. The next life tries one; once it is mended, the rest."""
    broken, study = StopSignal(), open_study(tmp_path, quota=ModelQuota("clip_model", dict.fromkeys(MODELS, 1.0), 2))
    numbers = itertools.count()
    error = lambda config: f"RuntimeError: no kernel (see trial {next(numbers)}/error.log)"  # noqa: E731
    drive(study, NO_STOPPING, max_concurrent=max_concurrent, error_of=error, stop=broken)
    num_lost = len(study.trials())
    assert 3 <= num_lost <= 3 + max_concurrent - 1
    assert set(reasons(study)) == {"error"}
    assert broken.received
    assert "trials to end failed the same way before they had trained a stage, whatever their settings: RuntimeError: no " in (
        broken.reason or ""
    )

    again = StopSignal()
    drive(open_study(tmp_path), NO_STOPPING, max_concurrent=max_concurrent, error_of=error, stop=again)
    assert again.received
    assert num_lost < len(open_study(tmp_path).trials()) <= num_lost + max_concurrent

    mended, study = StopSignal(), open_study(tmp_path)
    drive(study, NO_STOPPING, max_concurrent=max_concurrent, stop=mended)
    assert not mended.received
    assert len(study.trials()) == 14
    assert study.unfinished() == []


@pytest.mark.parametrize("seed", range(5))
def test_a_choice_that_always_fails_costs_its_trials_only(tmp_path: Path, seed: Any) -> None:
    """Even where it has the first six, by its quota."""
    quota = ModelQuota("clip_model", {"tiny-sig": 1.0, "tiny-clip": 100.0}, 6)
    study, stop = open_study(tmp_path, seed=seed, quota=quota), StopSignal()
    error = lambda config: "ValueError: no such weights" if config["clip_model"] == "tiny-sig" else None  # noqa: E731
    drive(study, NO_STOPPING, error_of=error, stop=stop)
    assert not stop.received
    assert reasons(study)[:6] == ["error"] * 6
    assert len(study.trials()) == 14
    assert all((settings(t)["clip_model"] == "tiny-sig") == (stop_reason(t) == "error") for t in study.trials())


def test_faults_that_differ_or_come_between_trials_that_train_do_not_end_a_sweep(tmp_path: Path) -> None:
    numbers = itertools.count()
    kinds = ("ValueError: a", "ValueError: b", "KeyError: c", None)
    study, stop = open_study(tmp_path), StopSignal()
    values = lambda config, seen: 0.5  # noqa: E731
    drive(study, stopping_rule("none", stage_examples=BUDGET, budget_examples=BUDGET, reduction_factor=3),
          values=values, error_of=lambda config: kinds[next(numbers) % 4], stop=stop)  # fmt: skip
    assert not stop.received
    assert len(study.trials()) == 14


def test_a_space_that_always_raises_ends_a_sweep_early(tmp_path: Path) -> None:
    study, stop = open_study(tmp_path), StopSignal()
    search = search_of(study, NO_STOPPING, 14)
    searcher = StudySearcher(study, search, job(tmp_path, space=lambda trial: {}["missing"]), stop)
    assert searcher.suggest("a") == "FINISHED"
    assert len(study.trials()) == 3
    assert "KeyError: 'missing'" in (stop.reason or "")


def test_each_trial_is_told_of_the_disk_that_the_sweep_may_take(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    searcher = StudySearcher(study, search_of(study, NO_STOPPING, 2), job(tmp_path, disk_budget_bytes=10**8), StopSignal())
    assert TrialPlan.from_ray(searcher.suggest("a")).disk_budget_bytes == 10**8
