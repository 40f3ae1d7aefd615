"""Starts of a space in its plan: told apart, counted by the quota, compared when the sweep goes on."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from safetensors.torch import load_file, save_file

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.openclip import export_openclip, load_model
from fashionclip_tune.models.start_facts import start_changes
from fashionclip_tune.tuning.planning.plan import SweepPlan, plan_sweep
from fashionclip_tune.tuning.planning.settings import SweepSettings

TWO = """
BASE = {{"training.batch_size": 16}}


def space(trial):
    start = trial.suggest_categorical("begin", ["tiny-clip", {folder!r}])
    return {{"clip_model": start, "training.learning_rate": trial.suggest_float("rate", 1e-5, 1e-3)}}
"""
SEPARATE = """
def space(trial):
    model = trial.suggest_categorical("model", ["tiny-clip", "tiny-sig"])
    weights = FOLDERS[model] if trial.suggest_categorical("weights", ["none", "own"]) == "own" else None
    return {"clip_model": model, "model.pretrained": weights, "training.batch_size": 16}
"""


def exported(name: str, folder: Path) -> Path:
    export_openclip(load_model(ProjectConfig(clip_model=name).with_overrides({"model.pretrained": None})), folder)
    return folder


def planned(garments: Path, tmp_path: Path, space: str, *, begun: dict[str, Any] | None = None, **flags: Any) -> SweepPlan:
    (tmp_path / "mine.py").write_text(space)
    wanted = {"num_trials": 12, "budget_examples": 48, "samples_per_second": 100.0, **flags}
    settings = SweepSettings(data=str(garments), space=str(tmp_path / "mine.py"), device="cpu", **wanted)
    return plan_sweep(settings, begun=begun)


def test_a_start_that_is_named_from_here_has_its_minimum_of_trials(
    garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exported("tiny-sig", tmp_path / "last" / "best")
    plan = planned(garments, tmp_path, TWO.format(folder="./last/best"), scheduler="asha-stopping")
    assert plan.quota is not None
    assert (plan.quota.parameter, plan.quota.min_trials) == ("begin", 3)
    labels = {name: facts.label for name, facts in plan.starts.items()}
    assert labels == {"tiny-clip": "tiny-clip", f"local-dir:{tmp_path / 'last' / 'best'}": "last/best"}
    assert sum(plan.course.counts) == pytest.approx(12)
    assert plan.forecast.hours is not None
    drawn = plan.draw(optuna.trial.FixedTrial({"begin": "./last/best", "rate": 1e-4}))
    assert drawn["clip_model"] == f"local-dir:{tmp_path / 'last' / 'best'}"


def test_weights_beside_the_architecture_are_one_name_but_for_a_sweep_of_an_older_version(
    garments: Path, tmp_path: Path
) -> None:
    folders = {name: str(exported(name, tmp_path / name)) for name in ("tiny-clip", "tiny-sig")}
    space = f"FOLDERS = {folders!r}\n{SEPARATE}"
    point = optuna.trial.FixedTrial({"model": "tiny-sig", "weights": "own"})
    plan = planned(garments, tmp_path, space, scheduler="asha-stopping")
    drawn = plan.draw(point)
    assert drawn["clip_model"] == f"tiny-sig={folders['tiny-sig']}"
    assert drawn["model.pretrained"] == "default"
    assert plan.build(drawn).model_name in plan.starts
    based = planned(garments, tmp_path, 'BASE = {"model.pretrained": None}\n' + space)
    assert based.build(based.draw(point)).model.pretrained == "default", "never random where weights were drawn"
    assert plan.quota is not None, "the architectures alone are drawn by name"
    older = planned(garments, tmp_path, space, begun={}, min_trials_per_model=plan.quota.min_trials)
    assert older.draw(point)["clip_model"] == "tiny-sig"
    assert older.draw(point)["model.pretrained"] == folders["tiny-sig"]
    assert older.quota is not None
    assert older.quota.min_trials == plan.quota.min_trials


def test_a_start_that_is_another_now_is_said_before_a_sweep_goes_on(garments: Path, tmp_path: Path) -> None:
    folder = exported("tiny-sig", tmp_path / "last")
    plan = planned(garments, tmp_path, TWO.format(folder=str(folder)))
    saved = {name: {"label": facts.label, "weights_hash": facts.weights_hash} for name, facts in plan.starts.items()}
    assert start_changes(saved, plan.starts) == []
    assert start_changes(None, plan.starts) == [], "an older version's"
    weights = load_file(folder / "open_clip_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, folder / "open_clip_model.safetensors")
    again = planned(garments, tmp_path, TWO.format(folder=str(folder)))
    assert start_changes(saved, again.starts) == [(f"local-dir:{folder}", "its weights are others")]
    ((name, _),) = start_changes({**saved, "local-dir:/elsewhere": {}}, plan.starts)
    assert name == "local-dir:/elsewhere"


def test_photos_that_are_not_square_are_refused_in_the_plan(garments: Path, tmp_path: Path) -> None:
    folder = exported("tiny-clip", tmp_path / "oblong")
    path = folder / "open_clip_config.json"
    described = json.loads(path.read_text())
    described["model_cfg"]["vision_cfg"]["image_size"] = [32, 64]
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"photos of 32 x 64 pixels are not supported, only square ones"):
        planned(garments, tmp_path, TWO.format(folder=str(folder)))
