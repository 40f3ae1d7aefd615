"""Which trials of an older sweep a new one takes, and why it refuses others. Nothing here starts Ray or trains."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from fashionclip_tune.config.choices import BatchNorms
from fashionclip_tune.errors import UserError
from fashionclip_tune.storage.folder import RemoteFolder
from fashionclip_tune.tuning.persistence.location import SweepCatalog
from fashionclip_tune.tuning.persistence.mirror import SweepMirror
from fashionclip_tune.tuning.persistence.record import sweep_header
from fashionclip_tune.tuning.planning.plan import plan_sweep
from fashionclip_tune.tuning.planning.settings import SweepSettings
from fashionclip_tune.tuning.study.freeze_thaw import FreezeThaw
from fashionclip_tune.tuning.study.study import SweepStudy, origin, settings
from fashionclip_tune.tuning.sweep import _reopened
from fashionclip_tune.tuning.warm_start import older_trials
from tests.support.networks import lite

SPACE = """
BASE = {'training.batch_size': 16, 'training.num_workers': 0, 'model.pretrained': None}

def space(trial):
    settings = {
        'clip_model': trial.suggest_categorical('clip_model', ['tiny-clip', 'tiny-sig']),
        'training.learning_rate': trial.suggest_float('learning_rate', 1e-4, 1e-2, log=True),
    }
    return settings
"""


@pytest.fixture
def older(garments: Path, tmp_path: Path) -> Any:
    """A sweep as ``sweep`` leaves it, its trials' results made up: COMPLETE, PRUNED, FAIL and one that is unfinished."""
    (tmp_path / "mine.py").write_text(SPACE)
    plan = planned(garments, tmp_path, scheduler="asha-stopping")
    folder = tmp_path / "older"
    folder.mkdir()
    begin(folder, plan)
    return folder


def begin(folder: Path, plan: Any) -> None:
    study = SweepStudy(folder / "study.journal", seed=0, num_startup_trials=4, quota=plan.quota)
    for state, reason in (("COMPLETE", "budget"), ("FAIL", "error"), ("PRUNED", "rung_1"), (None, None)):
        number, _ = study.suggest(plan.draw)
        study.record_stage(number, 16, 0.3)
        if state:
            study.end(number, TrialState[state], reason)
    about = {"name": "older", "data_fingerprint": plan.data_fingerprint, "base_config": plan.base.to_dict()}
    (folder / "sweep.json").write_text(json.dumps(about))


def planned(data: Any, tmp_path: Path, **changed: Any) -> Any:
    sizes = {"num_trials": 8, "budget_examples": 144, "samples_per_second": 100.0}  # a stated rate is not measured
    chosen = SweepSettings(data=str(data), space=str(tmp_path / "mine.py"), device="cpu", **sizes)
    return plan_sweep(replace(chosen, **changed))


def test_ended_trials_with_a_result_are_taken(older: Path, garments: Path, tmp_path: Path) -> None:
    trials = older_trials(planned(garments, tmp_path, warm_start=str(older)))
    assert [trial.state for trial in trials] == [TrialState.COMPLETE, TrialState.PRUNED]
    assert [origin(trial) for trial in trials] == [{"sweep": "older", "trial_id": f"{number:04d}"} for number in (0, 2)]
    assert all(trial.intermediate_values == {16: 0.3} for trial in trials)
    assert older_trials(planned(garments, tmp_path)) == []


@pytest.mark.parametrize("location", ["{folder}", "file://{folder}"])
def test_of_a_sweep_that_has_a_durable_side_only_too(older: Path, garments: Path, tmp_path: Path, location: Any) -> None:
    """Its journal lies there in pieces, and what is rewritten for people is not needed."""
    drive = tmp_path / "drive"
    mirror = SweepMirror(RemoteFolder(drive), older)
    mirror.start(json.loads((older / "sweep.json").read_text()))
    mirror.append_journal()
    expected = older_trials(planned(garments, tmp_path, warm_start=str(older)))
    shutil.rmtree(older)
    found = older_trials(planned(garments, tmp_path, warm_start=location.format(folder=drive)))
    assert [(each.params, each.intermediate_values, origin(each)) for each in found] == [
        (each.params, each.intermediate_values, origin(each)) for each in expected
    ]


def from_before_batch_norms_were_a_choice(older: Path) -> None:
    about = json.loads((older / "sweep.json").read_text())
    del about["base_config"]["model.batch_norm"]
    (older / "sweep.json").write_text(json.dumps(about))


def test_trials_from_before_batch_norms_were_a_choice_are_taken_where_there_are_none(
    older: Path, garments: Path, tmp_path: Path
) -> None:
    from_before_batch_norms_were_a_choice(older)
    assert len(older_trials(planned(garments, tmp_path, warm_start=str(older)))) == 2
    for space in (SPACE, SPACE.replace("'tiny-clip'", f"'{lite(tmp_path, 'test_efficientnet')}'")):
        (tmp_path / "mine.py").write_text(space)
    shutil.rmtree(older)
    older.mkdir()
    begin(older, planned(garments, tmp_path))
    assert len(older_trials(planned(garments, tmp_path, warm_start=str(older)))) == 2
    from_before_batch_norms_were_a_choice(older)
    with pytest.raises(UserError, match=r"model\.batch_norm was legacy in trial \d+, here it is fixed"):
        older_trials(planned(garments, tmp_path, warm_start=str(older)))


def test_a_sweep_that_goes_on_updates_batch_norms_if_it_began_before_they_were_a_choice(garments: Path, tmp_path: Path) -> None:
    """Through two lives, trials that are drawn anew included; a new sweep does not."""
    (tmp_path / "mine.py").write_text(SPACE)
    sweeps = SweepCatalog(str(tmp_path / "results"))
    plan = planned(garments, tmp_path)
    state = {"name": "begun", "state": "RUNNING", "trials": [], "two_tiers": False}
    saved = {**sweep_header(plan, sweeps.place("begun", None)), **state}
    assert saved["base_config"]["model.batch_norm"] == "fixed"

    def life(saved: dict[str, Any]) -> Any:
        again = _reopened(SweepSettings(), sweeps, "begun", json.loads(json.dumps(saved)), dry_run=True).plan
        config = again.build({"clip_model": "tiny-clip"})
        assert config.model.batch_norm is again.base.model.batch_norm
        return again

    assert life(saved).base.model.batch_norm is BatchNorms.FIXED
    del saved["base_config"]["model.batch_norm"]
    second = life(saved)
    assert second.base.model.batch_norm is BatchNorms.LEGACY
    assert life({**saved, "base_config": second.base.to_dict()}).base.model.batch_norm is BatchNorms.LEGACY


def test_another_seed_scheduler_and_number_of_trials_are_no_obstacle(older: Path, garments: Path, tmp_path: Path) -> None:
    more = {"seed": 7, "scheduler": "median", "num_trials": 30, "max_concurrent": 1}
    plan = planned(garments, tmp_path, warm_start=str(older), **more)
    assert len(older_trials(plan)) == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"budget_examples": 288}, ["training.budget_examples was 144 in trial 0000, here it is 288"]),
        ({"grace_examples": 48}, ["training.stage_examples was 16 in trial 0000, here it is 48"]),
        ({"metric": "recall_at_5"}, ["it maximised recall_at_10, this sweep recall_at_5"]),
        (
            {"overrides": {"evaluation.protocol": "product"}},
            ["evaluation.protocol was instance in trial 0000, here it is product"],
        ),
        ({"overrides": {"training.weight_decay": 0.5}}, ["training.weight_decay was", "here it is 0.5"]),
        ({"overrides": {"training.learning_rate": 0.5}}, ["training.learning_rate was", "here it is 0.5"]),
    ],
    ids=["budget", "stage", "metric", "protocol", "setting", "drawn"],
)
def test_what_changes_numbers_must_be_the_same(older: Path, garments: Path, tmp_path: Path, changed: Any, said: Any) -> None:
    plan = planned(garments, tmp_path, warm_start=str(older), **changed)
    with pytest.raises(UserError, match=f"^--warm-start {older} cannot be used: ") as refused:
        older_trials(plan)
    assert all(part in str(refused.value) for part in said)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ("1e-4, 1e-2", "1e-5, 1e-2", "parameter learning_rate was drawn from FloatDistribution"),
        ("'learning_rate'", "'rate'", "parameter learning_rate was drawn from"),
        ("['tiny-clip', 'tiny-sig']", "['tiny-sig', 'tiny-clip']", "parameter clip_model was drawn from"),
        ("'training.batch_size': 16", "'training.batch_size': 8", "training.batch_size was 16 in trial 0000, here it is 8"),
        ("return", "settings['training.learning_rate'] /= 2\n    return", "training.learning_rate was"),
        (
            "return",
            "settings['training.weight_decay'] = trial.suggest_float('weight_decay', 0, 1)\n    return",
            "trial 0000 has no value for a parameter",
        ),
    ],
    ids=["range", "name", "choices", "base", "meaning", "new parameter"],
)
def test_the_space_must_make_the_same_trials_of_the_same_draws(
    older: Path, garments: Path, tmp_path: Path, before: Any, now: Any, said: Any
) -> None:
    (tmp_path / "mine.py").write_text(SPACE.replace(before, now))
    plan = planned(garments, tmp_path, warm_start=str(older))
    with pytest.raises(UserError, match="cannot be used") as refused:
        older_trials(plan)
    assert said in str(refused.value)


def test_other_data_and_folders_that_are_no_sweep_are_refused(older: Path, garments: Path, tmp_path: Path) -> None:
    from fashionclip_tune.synthetic import GarmentRecipe, render_dataset

    render_dataset(tmp_path / "other", GarmentRecipe(num_products=100, views_per_product=2, image_size=48, seed=99))
    with pytest.raises(UserError, match=r"its data is not .*other"):
        older_trials(planned(tmp_path / "other", tmp_path, warm_start=str(older), scheduler="asha-stopping"))
    with pytest.raises(UserError, match="nowhere is no sweep"):
        older_trials(planned(garments, tmp_path, warm_start=str(tmp_path / "nowhere")))
    shutil.move(older / "study.journal", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"it has no study\.journal"):
        older_trials(planned(garments, tmp_path, warm_start=str(older)))


def test_a_sweep_in_which_nothing_has_ended_is_refused(older: Path, garments: Path, tmp_path: Path) -> None:
    (older / "study.journal").unlink()
    study = SweepStudy(older / "study.journal", seed=0, num_startup_trials=4)
    study.suggest(planned(garments, tmp_path).draw)
    with pytest.raises(UserError, match="no trial of it has ended"):
        older_trials(planned(garments, tmp_path, warm_start=str(older)))


def test_an_extension_counts_its_own_trials_and_fills_up_the_quota(older: Path, garments: Path, tmp_path: Path) -> None:
    """Both trials that were taken from the older sweep are of tiny-clip."""
    plan = planned(garments, tmp_path, warm_start=str(older), scheduler="asha-stopping", min_trials_per_model=3, seed=1)
    assert plan.quota is not None
    assert list(plan.quota.cost_of_model) == ["tiny-clip", "tiny-sig"]
    (tmp_path / "new").mkdir()
    study = SweepStudy(
        tmp_path / "new" / "study.journal",
        seed=1,
        num_startup_trials=plan.num_startup_trials,
        quota=plan.quota,
        older=lambda: older_trials(plan),
    )
    drawn = [study.suggest(plan.draw)[1]["clip_model"] for _ in range(4)]
    assert [settings(trial)["clip_model"] for trial in study.older_trials()] == ["tiny-clip"] * 2
    assert drawn == ["tiny-sig", "tiny-sig", "tiny-clip", "tiny-sig"]  # like turns of what was not had yet
    assert [trial.number for trial in study.trials()] == [2, 3, 4, 5]


def test_trials_on_other_data_are_learnt_from_by_the_search_that_lets_trials_wait(
    older: Path, many_captions: Path, tmp_path: Path
) -> None:
    """With a budget of its own; what they reached is of their data alone."""
    sizes = {"warm_start": str(older), "budget_examples": 288, "grace_examples": 32}
    plan = planned(many_captions, tmp_path, **sizes)
    trials = older_trials(plan)
    (data,) = {(origin(trial) or {}).get("data") for trial in trials}
    assert data not in (None, plan.data_fingerprint)
    assert {(origin(trial) or {}).get("budget_examples") for trial in trials} == {144}
    with pytest.raises(UserError, match="only --scheduler asha learns from other data"):
        older_trials(planned(many_captions, tmp_path, scheduler="median", **sizes))
    (tmp_path / "new").mkdir()
    study = SweepStudy(
        tmp_path / "new" / "study.journal", seed=0, num_startup_trials=None, points=plan.space.points, older=lambda: trials
    )
    search = FreezeThaw(study, plan.search_terms, seed=0, fresh=plan.fresh)
    known = search._known(None)
    assert [(trial.data, trial.state, dict(trial.curve)) for trial in known] == [(data, "ended", {16 / 144: 0.3})] * 2
    # Points come first; then the model knows the older trials' settings.
    number, drawn = study.suggest(plan.draw)
    assert drawn is not None
    study.record_stage(number, 32, 0.1)
    search.goes_on(number, 32)
    assert study.decisions[-1].reporter == number
