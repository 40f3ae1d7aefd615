import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from fashionclip_tune.errors import UserError
from fashionclip_tune.tuning.persistence.record import SweepRecord
from fashionclip_tune.tuning.study.decisions import Decision
from fashionclip_tune.tuning.study.policy import ModelQuota
from fashionclip_tune.tuning.study.study import SweepStudy, message, origin, settings, stop_reason, with_origin


def space(trial: Any) -> Any:
    drawn = {"clip_model": trial.suggest_categorical("clip_model", ["a", "b"])}
    drawn["training.learning_rate"] = trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
    if drawn["clip_model"] == "b":
        drawn["augmentation.image_strength"] = trial.suggest_float("strength", 0, 1)
    return drawn


def open_study(path: Any, **changed: Any) -> Any:
    return SweepStudy(path / "study.journal", **{"seed": 3, "num_startup_trials": 4, **changed})


def score(overrides: Any) -> Any:
    return 1 - abs(math.log10(overrides["training.learning_rate"]) + 3) / 5


def run(study: Any, count: Any, *, reopen: Any = None) -> Any:
    """``count`` trials to their end, each on a study opened anew if ``reopen`` says how."""
    drawn = []
    for _ in range(count):
        number, overrides = study.suggest(space)
        study.record_stage(number, 100, score(overrides))
        study.end(number, TrialState.COMPLETE, "budget")
        drawn.append(overrides)
        study = reopen() if reopen else study
    return drawn


def test_a_study_opened_anew_before_each_trial_suggests_what_one_that_stayed_open_does(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    stayed = run(open_study(tmp_path / "one"), 12)
    reopened = run(open_study(tmp_path / "two"), 12, reopen=lambda: open_study(tmp_path / "two"))
    assert stayed == reopened


def test_another_seed_suggests_something_else(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert run(open_study(tmp_path / "one"), 3) != run(open_study(tmp_path / "two", seed=4), 3)


def test_a_trial_that_died_while_its_settings_were_drawn_gets_the_rest_of_them(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    expected = open_study(tmp_path / "whole").suggest(space)

    def killed(trial: Any) -> None:
        trial.suggest_categorical("clip_model", ["a", "b"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_study(tmp_path / "killed").suggest(killed)
    again = open_study(tmp_path / "killed")
    assert again.unfinished() == [0]
    assert (0, again.settings(0, space)) == expected
    assert open_study(tmp_path / "killed").settings(0, None) == expected[1]  # recorded: not drawn again


def test_stages_and_ends_are_recorded_once(tmp_path: Path) -> None:
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


def test_a_diverged_trial_is_pruned_without_an_invented_stage_and_a_failed_one_says_why(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    diverged, _ = study.suggest(space)
    study.record_stage(diverged, 100, 0.7)
    study.end(diverged, TrialState.PRUNED, "diverged", "the loss is nan")
    failed, _ = study.suggest(space)
    study.end(failed, TrialState.FAIL, "error", "RuntimeError: no")
    first, second = study.trials()
    assert (first.state, first.intermediate_values, stop_reason(first)) == (TrialState.PRUNED, {100: 0.7}, "diverged")
    assert first.constraints == {"ends": 1.0}
    assert (second.state, stop_reason(second), message(second)) == (TrialState.FAIL, "error", "RuntimeError: no")


@pytest.mark.parametrize("reason", ["diverged", "out_of_memory"])
def test_the_sampler_keeps_away_from_where_trials_break_however_late(tmp_path: Path, reason: Any) -> None:
    """Above a rate of 1e-3 trials break, after a better and longer start than the others get, who are stopped early.

    By value and step alone, Optuna would take the broken ones for the best of the pruned.
    """
    study, high = open_study(tmp_path), []
    for _ in range(32):
        number, overrides = study.suggest(space)
        rate = overrides["training.learning_rate"]
        high.append(rate > 1e-3)
        study.record_stage(number, 100, 0.6 - 0.1 * abs(math.log10(rate) + 4))
        if rate > 1e-3:
            study.record_stage(number, 800, 0.9)
            study.end(number, TrialState.PRUNED, reason, "why")
        else:
            study.end(number, TrialState.PRUNED, "rung_1")
    assert sum(high[:8]) >= 2, "it broke too seldom to be learned from"
    assert sum(high[8:]) <= 4, "at random it would be 8, by step and value alone it is most of them"


def test_an_architecture_gets_its_trials_however_bad_it_is_cheap_ones_first(tmp_path: Path) -> None:
    """Also in a study opened anew before each trial, and with a point of the user's among the first."""
    points = ({"clip_model": "b", "learning_rate": 1e-4, "strength": 0.5},)
    quota = ModelQuota("clip_model", {"a": 1, "b": 4}, 4)
    reopen = lambda: open_study(tmp_path, quota=quota, points=points)  # noqa: E731
    study = reopen()
    for _ in range(12):
        number, overrides = study.suggest(space)
        study.record_stage(number, 100, 0.1 if overrides["clip_model"] == "b" else score(overrides))
        study.end(number, TrialState.COMPLETE, "budget")
        study = reopen()
    models = [settings(trial)["clip_model"] for trial in study.trials()]
    assert models[:8] == ["b", "a", "a", "a", "a", "b", "b", "b"]
    rates = {settings(trial)["training.learning_rate"] for trial in study.trials()}
    assert len(rates) == 12, "only the architecture is bound"


def test_a_bound_trial_that_died_while_it_was_drawn_stays_bound(tmp_path: Path) -> None:
    quota = ModelQuota("clip_model", {"b": 1, "a": 2.5}, 2)
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = open_study(tmp_path / "whole", quota=quota)
    expected = [whole.suggest(space) for _ in range(3)]
    assert [overrides["clip_model"] for _, overrides in expected] == ["b", "b", "a"]

    def killed(trial: Any) -> None:
        trial.suggest_categorical("clip_model", ["a", "b"])
        raise KeyboardInterrupt

    study = open_study(tmp_path / "killed", quota=quota)
    assert [study.suggest(space), study.suggest(space)] == expected[:2]
    with pytest.raises(KeyboardInterrupt):
        study.suggest(killed)
    assert open_study(tmp_path / "killed", quota=quota).settings(2, space) == expected[2][1]


def test_a_space_that_raises_when_a_trial_is_drawn_again_fails_that_trial_only(tmp_path: Path) -> None:
    def killed(trial: Any) -> None:
        trial.suggest_categorical("clip_model", ["a", "b"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_study(tmp_path).suggest(killed)

    def broken(trial: Any) -> None:
        raise ZeroDivisionError("division by zero")

    again = open_study(tmp_path)
    assert again.settings(0, broken) is None
    assert again.unfinished() == []
    assert message(again.trials()[0]) == "ZeroDivisionError: division by zero"


def test_a_quota_of_a_parameter_that_is_not_drawn_binds_nothing(tmp_path: Path) -> None:
    study = open_study(tmp_path, quota=ModelQuota("another", {"a": 1, "b": 1}, 4))
    assert len({overrides["clip_model"] for overrides in run(study, 8)}) == 2


def test_a_point_that_died_while_it_was_drawn_is_drawn_again_as_it_was_given(tmp_path: Path) -> None:
    points = ({"clip_model": "b", "learning_rate": 1e-4},)  # the strength is the sampler's

    def killed(trial: Any) -> None:
        trial.suggest_categorical("clip_model", ["a", "b"])
        raise KeyboardInterrupt

    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    expected = open_study(tmp_path / "whole", points=points).suggest(space)
    assert expected[1]["clip_model"] == "b"
    with pytest.raises(KeyboardInterrupt):
        open_study(tmp_path / "killed", points=points).suggest(killed)
    again = open_study(tmp_path / "killed", points=points)
    assert (0, again.settings(0, space)) == expected


def ended_study(path: Any) -> Any:
    """Two that came to their budget, one stopped at a rung, one that diverged, one that failed, one that runs."""
    path.mkdir(exist_ok=True)
    study = open_study(path)
    ends = (("COMPLETE", "budget"), ("COMPLETE", "budget"), ("PRUNED", "rung_1"), ("PRUNED", "diverged"), ("FAIL", "error"))
    for state, reason in ends:
        number, _ = study.suggest(space)
        study.record_stage(number, 100, 0.1 * (number + 1))
        if state == "COMPLETE":
            study.record_stage(number, 200, 0.2 * (number + 1))
        study.end(number, TrialState[state], reason)
    study.suggest(space)
    return study


def test_older_trials_inform_sampler_and_rungs_and_are_no_trials_of_this_study(tmp_path: Path) -> None:
    old = ended_study(tmp_path / "old")
    older = [with_origin(trial, "first") for trial in old.trials() if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    opened, point = [], {"clip_model": "b", "learning_rate": 1e-4, "strength": 0.5}

    def reopen(name: Any = "new") -> Any:
        def read() -> Any:
            opened.append(name)
            return older

        (tmp_path / name).mkdir(exist_ok=True)
        return open_study(tmp_path / name, older=read, points=(point,), seed=9)

    study = reopen()
    assert study.trials() == []
    assert study.unfinished() == []
    seeded = study.older_trials()
    assert [origin(trial) for trial in seeded] == [{"sweep": "first", "trial_id": f"{number:04d}"} for number in range(4)]
    for before, now in zip(old.trials(), seeded, strict=False):
        assert (before.state, before.value, before.params, before.intermediate_values, before.constraints) == (
            now.state, now.value, now.params, now.intermediate_values, now.constraints
        )  # fmt: skip
        assert (settings(before), stop_reason(before)) == (settings(now), stop_reason(now))
    study = reopen()
    assert opened == ["new"], "they are in the journal: the older sweep may be gone"
    assert len(study.older_trials()) == 4

    number, first = study.suggest(space)
    assert (number, first["training.learning_rate"]) == (4, 1e-4)
    study.record_stage(number, 100, 0.7)
    of_b = [trial.intermediate_values[100] for trial in seeded if settings(trial)["clip_model"] == "b"]
    assert of_b
    assert [curve[100] for curve in study.curves_to(100, clip_model="b", other_than=number)] == of_b
    study.end(number, TrialState.COMPLETE, "budget")
    # Four older results are what num_startup_trials = 4 asks for: the next one is not drawn at random.
    (tmp_path / "without").mkdir()
    without = open_study(tmp_path / "without", seed=9)
    assert study.suggest(space)[1] != [without.suggest(space) for _ in range(6)][5][1]
    assert [trial.number for trial in study.trials()] == [4, 5]

    again = [with_origin(trial, "second") for trial in (*study.older_trials(), study.trials()[0])]
    assert [origin(trial)["sweep"] for trial in again] == [*["first"] * 4, "second"], "where it came from first is kept"


def test_a_kill_while_older_trials_are_added_adds_none_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = ended_study(tmp_path / "old")
    older = [with_origin(trial, "first") for trial in old.trials()[:4]]
    added = list[Any]()

    def dies(self: Any, trial: Any) -> Any:
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(trial)
        return original(self, trial)

    original = optuna.Study.add_trial
    monkeypatch.setattr(optuna.Study, "add_trial", dies)
    (tmp_path / "new").mkdir()
    with pytest.raises(KeyboardInterrupt):
        open_study(tmp_path / "new", older=lambda: older)
    monkeypatch.undo()
    study = open_study(tmp_path / "new", older=lambda: older)
    assert [origin(trial)["trial_id"] for trial in study.older_trials()] == ["0000", "0001", "0002", "0003"]


def test_points_that_an_older_trial_had_are_not_run_again(tmp_path: Path) -> None:
    point = {"clip_model": "a", "learning_rate": 1e-4}
    (tmp_path / "old").mkdir()
    old = open_study(tmp_path / "old", points=(point,))
    run(old, 1)
    (tmp_path / "new").mkdir()
    older = [with_origin(trial, "first") for trial in old.trials()]
    study = open_study(tmp_path / "new", points=(point,), older=lambda: older, seed=4)
    assert study.suggest(space)[1]["training.learning_rate"] != 1e-4


def test_a_rung_knows_the_other_trials_of_its_architecture_only(tmp_path: Path) -> None:
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


def test_a_rung_that_was_passed_stays_passed(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    number, _ = study.suggest(space)
    assert study.passed_rungs(number) == []
    study.pass_rung(number, 100)
    study.pass_rung(number, 300)
    assert open_study(tmp_path).passed_rungs(number) == [100, 300]


def test_a_trial_that_waited_and_has_ended_waits_no_more(tmp_path: Path) -> None:
    """By whatever it ended: at the end of the sweep no decision says so."""
    study = open_study(tmp_path)
    for number in range(2):
        study.suggest(lambda trial: {**space(trial), "loss_function": "siglip"})
        study.record_stage(number, 32, 0.5)
        study.decide(Decision(number, 32, None))
    assert (study.waiting, study.unfinished()) == ({0: 32, 1: 32}, [])
    study.end(0, TrialState.PRUNED, "rung_1")
    assert study.waiting == open_study(tmp_path).waiting == {1: 32}
    (row, other) = SweepRecord(tmp_path, study, {}).rows()
    assert (row["state"], row["stop_reason"], other["state"], other["stop_reason"]) == ("PRUNED", "rung_1", "PAUSED", None)


def test_an_end_that_was_recorded_but_not_told_is_told_when_the_study_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert (first.state, first.intermediate_values, stop_reason(first)) == (TrialState.PRUNED, {100: 0.7}, "diverged")
    assert first.constraints == {"ends": 1.0}
    assert (second.state, second.value, stop_reason(second)) == (TrialState.COMPLETE, 0.6, "budget")
    assert again.unfinished() == []


def test_a_space_that_raises_fails_its_trial_only(tmp_path: Path) -> None:
    study = open_study(tmp_path)

    def broken(trial: Any) -> None:
        trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
        raise ZeroDivisionError("division by zero")

    assert study.suggest(broken) == (0, None)
    number, settings_of_next = study.suggest(space)
    assert number == 1
    assert settings_of_next is not None
    (failed, _) = study.trials()
    assert (failed.state, message(failed)) == (TrialState.FAIL, "ZeroDivisionError: division by zero")


def test_a_line_that_a_killed_process_left_unfinished_costs_nothing_else(tmp_path: Path) -> None:
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


def test_points_are_the_first_trials_and_are_enqueued_once(tmp_path: Path) -> None:
    points = ({"clip_model": "b", "learning_rate": 1e-4, "strength": 0.5}, {"clip_model": "a", "learning_rate": 1e-3})
    open_study(tmp_path, points=points)
    study = open_study(tmp_path, points=points)
    assert study.trials() == []
    drawn = run(study, 3)
    assert drawn[0] == {"clip_model": "b", "training.learning_rate": 1e-4, "augmentation.image_strength": 0.5}
    assert drawn[1] == {"clip_model": "a", "training.learning_rate": 1e-3}
    assert open_study(tmp_path, points=points).unfinished() == []
    assert len(study.trials()) == 3


def test_the_journal_opens_in_plain_optuna(tmp_path: Path) -> None:
    run(open_study(tmp_path), 3)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.journal")))
    study = optuna.load_study(study_name="sweep", storage=storage)
    assert study.best_value == max(trial.value for trial in study.trials)


def test_blank_lines_of_a_journal_are_passed_over_and_damaged_ones_named(tmp_path: Path) -> None:
    open_study(tmp_path)
    journal = tmp_path / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"\n".join([b"", *lines, b"  \n"]))
    open_study(tmp_path)
    assert all(line.strip() for line in journal.read_bytes().splitlines())
    journal.write_bytes(b"".join([lines[0], b'{"op_code": 4, "wor{"op_code"\n', *lines[1:]]))
    with pytest.raises(UserError, match=r"study.journal, line 2, is damaged"):
        open_study(tmp_path)
