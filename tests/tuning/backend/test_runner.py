"""The engine on a real Ray, with trainables that misbehave."""

import time
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from ray import cloudpickle

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.tuning.backend.hooks import SweepJob
from fashionclip_tune.tuning.backend.runner import run_trials
from fashionclip_tune.tuning.planning.slots import Slots
from fashionclip_tune.tuning.schedulers import NO_STOPPING, AshaRule
from fashionclip_tune.tuning.study.search import StoppingSearch
from fashionclip_tune.tuning.study.study import SweepStudy, message, stop_reason
from tests.support import toys

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
cloudpickle.register_pickle_by_value(toys)


def space(trial: Any) -> Any:
    rate = trial.suggest_float("learning_rate", 1e-5, 1e-2)
    return {"clip_model": "tiny-clip", "loss_function": "contrastive", "training.learning_rate": rate}


def run(tmp_path: Path, trainable: Any, *, num_trials: Any, slots: Any = 2, rule: Any = NO_STOPPING, space: Any = space) -> Any:
    study = SweepStudy(tmp_path / "study.journal", seed=0, num_startup_trials=2)
    completed = run_trials(
        study,
        StoppingSearch(study, rule, num_trials),
        SweepJob(
            space=space,
            build=ProjectConfig().with_overrides,
            sweep_dir=tmp_path,
            slots=Slots(slots, 1, 0),
        ),
        trainable=trainable,
    )
    assert completed
    return study.trials()


def logs(tmp_path: Path) -> Any:
    return [folder.joinpath("log").read_text().split("\n")[:-1] for folder in sorted((tmp_path / "trials").iterdir())]


def test_cleanups_of_four_seconds_do_not_hang_the_sweep(tmp_path: Path) -> None:
    started = time.monotonic()
    trials = run(tmp_path, toys.slow_to_clean_up, num_trials=4, slots=1, rule=AshaRule((100,), 3))
    assert time.monotonic() - started < 90
    assert [stop_reason(trial) for trial in trials] == ["budget", "rung_1", "rung_1", "rung_1"]
    assert logs(tmp_path) == [["100", "200", "300"], *[["100", "cleaned up"]] * 3]


def test_a_process_that_dies_is_retried_and_its_trial_goes_on(tmp_path: Path) -> None:
    trials = run(tmp_path, toys.dies_once, num_trials=3)
    assert logs(tmp_path)[1] == ["100", "died", "200", "300"]
    for trial in trials:
        assert trial.state == TrialState.COMPLETE
        assert trial.intermediate_values == {100: 0.5, 200: 0.5, 300: 0.5}


def test_a_process_that_dies_between_two_trials_costs_none_of_them(tmp_path: Path) -> None:
    """While it is idle, or is taken over by the next one, which has reported nothing by then."""
    trials = run(tmp_path, toys.dies_after_its_end, num_trials=5, slots=1)
    assert [(trial.state, sorted(trial.intermediate_values)) for trial in trials] == [
        (TrialState.COMPLETE, [100, 200, 300])
    ] * 5


def test_a_process_that_dies_each_time_ends_its_trial_only(tmp_path: Path) -> None:
    first, second = run(tmp_path, toys.dies_each_time, num_trials=2, slots=1)
    assert (first.state, message(first)) == (TrialState.FAIL, "the trial's process died repeatedly")
    assert second.state == TrialState.COMPLETE
    assert logs(tmp_path)[0] == ["100", *["died"] * 4]


def test_nan_divergence_and_failure_end_their_trial_only(tmp_path: Path) -> None:
    nan, diverged, failed, well = run(tmp_path, toys.goes_wrong, num_trials=4, slots=1, rule=AshaRule((100, 200), 3))
    assert (nan.state, stop_reason(nan)) == (TrialState.PRUNED, "diverged")
    assert (diverged.state, stop_reason(diverged)) == (TrialState.PRUNED, "diverged")
    assert (failed.state, stop_reason(failed), message(failed)) == (TrialState.FAIL, "error", "ValueError: no")
    assert (well.state, well.value) == (TrialState.COMPLETE, 0.5)
    assert all(number == trial.number for number, trial in enumerate((nan, diverged, failed, well)))


def test_a_resumed_trial_is_not_judged_again_at_a_rung_that_it_has_passed(tmp_path: Path) -> None:
    """It passed rung 100 with 0.5; two better ones passed after it; then the driver died, and it reports that stage again."""
    study = SweepStudy(tmp_path / "study.journal", seed=0, num_startup_trials=2)
    for value in (0.5, 0.8, 0.9):
        number, _ = study.suggest(space)
        study.record_stage(number, 100, value)
        study.pass_rung(number, 100)
    trials = run(tmp_path, toys.dies_once, num_trials=3, rule=AshaRule((100,), 3))
    assert [stop_reason(trial) for trial in trials] == ["budget"] * 3
    assert [trial.intermediate_values[100] for trial in trials] == [0.5, 0.8, 0.9]


def test_a_space_that_fails_now_and_then_costs_those_trials_only(tmp_path: Path) -> None:
    def sometimes(trial: Any) -> Any:
        if trial.number in (0, 2):
            raise ZeroDivisionError("division by zero")
        return space(trial)

    trials = run(tmp_path, toys.dies_once, num_trials=4, space=sometimes)
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE", "FAIL", "COMPLETE"]
