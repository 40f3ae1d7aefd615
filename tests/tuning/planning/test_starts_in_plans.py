"""Starts of a space in its plan: told apart, counted by the quota, compared when the sweep goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import optuna
import pytest
from safetensors.torch import load_file, save_file

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.openclip import export_openclip, load_model
from fashionclip_tune.models.start_facts import start_changes
from fashionclip_tune.models.tiny import TINY_PREPROCESSING
from fashionclip_tune.tuning.planning.plan import SweepPlan, plan_sweep
from fashionclip_tune.tuning.planning.settings import SweepSettings
from fashionclip_tune.tuning.sweep import prepared

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


RARE = """
def space(trial):
    rare = trial.suggest_float("x", 0, 1) > 0.9995
    return {{"clip_model": {start!r} if rare else "tiny-clip", "training.batch_size": 16}}
"""


@pytest.mark.parametrize("start", ["local-dir:/nowhere/at/all", "hf-hub:shop/clip", "tiny-sig"])
def test_a_start_that_no_draw_of_the_plan_had_is_refused_when_it_is_drawn(garments: Path, tmp_path: Path, start: str) -> None:
    plan = planned(garments, tmp_path, RARE.format(start=start))
    assert plan.draw(optuna.trial.FixedTrial({"x": 0.5}))["clip_model"] == "tiny-clip"
    with pytest.raises(UserError, match=f"{start} was drawn, of which the plan knows nothing: add a point"):
        plan.draw(optuna.trial.FixedTrial({"x": 0.9999}))


def test_all_choices_of_a_start_are_in_the_plan_however_many_there_are(garments: Path, tmp_path: Path) -> None:
    folder = exported("tiny-clip", tmp_path / "own")
    files = [
        f"tiny-clip={shutil.copy(folder / 'open_clip_model.safetensors', tmp_path / f'{n}.safetensors')}" for n in range(60)
    ]
    drawn = f'{{"clip_model": trial.suggest_categorical("start", {files!r}), "training.batch_size": 16}}'
    space = f"def space(trial):\n    return {drawn}\n"
    plan = planned(garments, tmp_path, space, scheduler="none")
    assert set(plan.starts) == set(files)


@pytest.mark.parametrize(
    ("drawn", "base"),
    [
        ('"model.pretrained": trial.suggest_categorical("w", ["default", None])', ""),
        ('"model.pretrained": None if trial.suggest_float("w", 0, 1) > 0.5 else "default"', ""),
        ('"model.pretrained": trial.suggest_categorical("w", [FILE, "default"])', '"clip_model": f"local-dir:{FOLDER}"'),
    ],
)
def test_two_starts_of_one_name_are_refused_with_what_to_write(garments: Path, tmp_path: Path, drawn: str, base: str) -> None:
    folder = exported("tiny-clip", tmp_path / "own")
    begin = f"FOLDER, FILE = {str(folder)!r}, {str(folder / 'open_clip_model.safetensors')!r}\n"
    base = base or '"clip_model": "tiny-clip"'
    space = f'{begin}BASE = {{{base}, "training.batch_size": 16}}\ndef space(trial):\n    return {{{drawn}}}\n'
    with pytest.raises(UserError, match=r"told apart by clip_model alone. Write clip_model = ARCHITECTURE/TAG"):
        planned(garments, tmp_path, space)
    planned(garments, tmp_path, space, begun={})  # as an older version began it


@pytest.mark.parametrize("where", ["drawn", "base", "set"])
def test_a_sweep_names_its_checkpoint_as_its_start(garments: Path, tmp_path: Path, where: str) -> None:
    folder = exported("tiny-clip", tmp_path / "own")
    given = {"should_load_checkpoint": True, "checkpoint_path": str(folder)}
    base = {"clip_model": "tiny-clip", "training.batch_size": 16, **(given if where == "base" else {})}
    space = f"BASE = {base!r}\ndef space(trial):\n    return {given if where == 'drawn' else {}!r}\n"
    overrides = given if where == "set" else {}
    with pytest.raises(UserError, match=f"say there what checkpoint_path says, local-dir:{folder}"):
        planned(garments, tmp_path, space, overrides=overrides)
    planned(garments, tmp_path, space, overrides=overrides, begun={})


@pytest.mark.slow
def test_the_fashion_space_is_planned_for_a_t4_before_anything_is_fetched(
    garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    plan = plan_sweep(SweepSettings(data=str(garments), space="fashion", gpu_memory_gb=15.8, device="cuda"), dry_run=True)
    labels = {facts.label for facts in plan.starts.values()}
    assert labels == {"ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP2-256", "fashionCLIP", "fashionSigLIP"}
    assert all("fetched when it begins" in facts.line() for facts in plan.starts.values())


def test_what_a_sweep_has_fetched_is_known_to_its_record(
    garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    tag = {"hf_hub": "shop/tagged/", **TINY_PREPROCESSING}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", {"shop": tag})
    space = 'def space(trial):\n    return {"clip_model": "tiny-clip/shop", "training.batch_size": 16}\n'
    plan = planned(garments, tmp_path, space)
    assert [(facts.is_at_hand, facts.licence) for facts in plan.starts.values()] == [(False, None)]
    repository = tmp_path / "hub" / "models--shop--tagged"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("1" * 40)
    exported("tiny-clip", repository / "snapshots" / ("1" * 40))
    (repository / "snapshots" / ("1" * 40) / "README.md").write_text("---\nlicense: mit\n---\n")
    facts = prepared(plan).starts
    assert [(each.is_at_hand, each.licence) for each in facts.values()] == [(True, "mit")]
