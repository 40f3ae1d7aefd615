import math

import optuna
import pytest
from optuna.trial import TrialState

from fashionclip_tune.tuning.study import SweepStudy, message, settings, stop_reason


def space(trial):
    drawn = {"clip_model": trial.suggest_categorical("clip_model", ["a", "b"])}
    drawn["training.learning_rate"] = trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
    if drawn["clip_model"] == "b":
        drawn["augmentation.image_strength"] = trial.suggest_float("strength", 0, 1)
    return drawn


def open_study(path, **changed):
    return SweepStudy(path / "study.journal", **{"seed": 3, "num_startup_trials": 4, **changed})


def score(overrides):
    return 1 - abs(math.log10(overrides["training.learning_rate"]) + 3) / 5


def run(study, count, *, reopen=None):
    """``count`` trials to their end, each on a study opened anew if ``reopen`` says how."""
    drawn = []
    for _ in range(count):
        number, overrides = study.suggest(space)
        study.record_stage(number, 100, score(overrides))
        study.end(number, TrialState.COMPLETE, "budget")
        drawn.append(overrides)
        study = reopen() if reopen else study
    return drawn


def test_a_study_opened_anew_before_each_trial_suggests_what_one_that_stayed_open_does(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    stayed = run(open_study(tmp_path / "one"), 12)
    reopened = run(open_study(tmp_path / "two"), 12, reopen=lambda: open_study(tmp_path / "two"))
    assert stayed == reopened


def test_another_seed_suggests_something_else(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert run(open_study(tmp_path / "one"), 3) != run(open_study(tmp_path / "two", seed=4), 3)


def test_a_trial_that_died_while_its_settings_were_drawn_gets_the_rest_of_them(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    expected = open_study(tmp_path / "whole").suggest(space)

    def killed(trial):
        trial.suggest_categorical("clip_model", ["a", "b"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_study(tmp_path / "killed").suggest(killed)
    again = open_study(tmp_path / "killed")
    assert again.unfinished() == [0]
    assert (0, again.settings(0, space)) == expected
    assert open_study(tmp_path / "killed").settings(0, None) == expected[1]  # recorded: not drawn again


def test_stages_and_ends_are_recorded_once(tmp_path):
    study = open_study(tmp_path)
    number, _ = study.suggest(space)
    study.record_stage(number, 100, 0.4)
    study.record_stage(number, 100, 0.9)
    study.record_stage(number, 200, 0.5)
    study.end(number, TrialState.PRUNED, "rung_1")
    study.end(number, TrialState.COMPLETE, "budget")
    (trial,) = open_study(tmp_path).trials()
    assert trial.intermediate_values == {100: 0.4, 200: 0.5}
    assert (trial.state, stop_reason(trial), trial.value) == (TrialState.PRUNED, "rung_1", 0.5)
    assert study.unfinished() == []


def test_a_diverged_trial_is_pruned_with_value_0_and_a_failed_one_says_why(tmp_path):
    study = open_study(tmp_path)
    diverged, _ = study.suggest(space)
    study.record_stage(diverged, 100, 0.7)
    study.end(diverged, TrialState.PRUNED, "diverged", "the loss is nan")
    failed, _ = study.suggest(space)
    study.end(failed, TrialState.FAIL, "error", "RuntimeError: no")
    first, second = study.trials()
    assert (first.state, first.value, stop_reason(first)) == (TrialState.PRUNED, 0.0, "diverged")
    assert (second.state, stop_reason(second), message(second)) == (TrialState.FAIL, "error", "RuntimeError: no")


def test_a_rung_knows_the_other_trials_of_its_architecture_only(tmp_path):
    study = open_study(tmp_path)
    models = {}
    for value in range(8):
        number, overrides = study.suggest(space)
        models[number] = overrides["clip_model"]
        study.record_stage(number, 100, value / 10)
    of_a = [number / 10 for number, model in models.items() if model == "a" and number != 5]
    assert [curve[100] for curve in study.curves_to(100, clip_model="a", other_than=5)] == of_a
    assert len(of_a) < 7, "the space drew one architecture only: this test says nothing"
    assert study.curves_to(200, clip_model="a", other_than=5) == []


def test_a_rung_that_was_passed_stays_passed(tmp_path):
    study = open_study(tmp_path)
    number, _ = study.suggest(space)
    assert study.passed_rungs(number) == []
    study.pass_rung(number, 100)
    study.pass_rung(number, 300)
    assert open_study(tmp_path).passed_rungs(number) == [100, 300]


def test_an_end_that_was_recorded_but_not_told_is_told_when_the_study_is_opened(tmp_path, monkeypatch):
    study = open_study(tmp_path)
    diverged, _ = study.suggest(space)
    study.record_stage(diverged, 100, 0.7)
    complete, _ = study.suggest(space)
    study.record_stage(complete, 100, 0.6)
    monkeypatch.setattr(SweepStudy, "_tell_end", lambda *_: None)  # killed after the record
    study.end(diverged, TrialState.PRUNED, "diverged", "the loss is nan")
    study.end(complete, TrialState.COMPLETE, "budget")
    monkeypatch.undo()
    again = open_study(tmp_path)
    first, second = again.trials()
    assert (first.state, first.value, stop_reason(first)) == (TrialState.PRUNED, 0.0, "diverged")
    assert (second.state, second.value, stop_reason(second)) == (TrialState.COMPLETE, 0.6, "budget")
    assert again.unfinished() == []


def test_a_space_that_raises_fails_its_trial_only(tmp_path):
    study = open_study(tmp_path)

    def broken(trial):
        trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
        raise ZeroDivisionError("division by zero")

    assert study.suggest(broken) == (0, None)
    number, settings_of_next = study.suggest(space)
    assert number == 1
    assert settings_of_next is not None
    (failed, _) = study.trials()
    assert (failed.state, message(failed)) == (TrialState.FAIL, "ZeroDivisionError: division by zero")


def test_a_line_that_a_killed_process_left_unfinished_costs_nothing_else(tmp_path):
    study = open_study(tmp_path)
    number, overrides = study.suggest(space)
    study.record_stage(number, 100, 0.4)
    journal = tmp_path / "study.journal"
    with open(journal, "a") as file:
        file.write('{"op_code":7,"worker_id":"x","tri')
    (tmp_path / "study.journal.lock").symlink_to(journal)  # held by the killed process, for 30 s if nobody removes it
    again = open_study(tmp_path)
    again.record_stage(number, 200, 0.5)
    (trial,) = open_study(tmp_path).trials()
    assert trial.intermediate_values == {100: 0.4, 200: 0.5}
    assert settings(trial) == overrides


def test_points_are_the_first_trials_and_are_enqueued_once(tmp_path):
    points = ({"clip_model": "b", "learning_rate": 1e-4, "strength": 0.5}, {"clip_model": "a", "learning_rate": 1e-3})
    open_study(tmp_path, points=points)
    study = open_study(tmp_path, points=points)
    assert study.trials() == []
    drawn = run(study, 3)
    assert drawn[0] == {"clip_model": "b", "training.learning_rate": 1e-4, "augmentation.image_strength": 0.5}
    assert drawn[1] == {"clip_model": "a", "training.learning_rate": 1e-3}
    assert open_study(tmp_path, points=points).unfinished() == []
    assert len(study.trials()) == 3


def test_the_journal_opens_in_plain_optuna(tmp_path):
    run(open_study(tmp_path), 3)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.journal")))
    study = optuna.load_study(study_name="sweep", storage=storage)
    assert study.best_value == max(trial.value for trial in study.trials)
