"""A real sweep that starts from an OpenCLIP folder: everything that is measured of its winner is the winner's."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.evaluation.evaluate_model import EvaluateOptions, run_evaluate
from fashionclip_tune.evaluation.examples import fixed_queries
from fashionclip_tune.evaluation.metric import METRICS
from fashionclip_tune.models.openclip import export_openclip, load_model
from fashionclip_tune.models.weights import read_weights
from fashionclip_tune.progress import no_phases
from fashionclip_tune.reporting.gallery import make_gallery
from fashionclip_tune.reporting.sweep_files import last_queries, ranked
from fashionclip_tune.reporting.sweep_view import read_trials
from fashionclip_tune.storage.checkpoint import newest_weights
from fashionclip_tune.training.history import read_history
from tests.tuning.conftest import RunSweep, sweep_json

pytestmark = pytest.mark.ray
METRIC = METRICS["recall_at_5_image_to_text"]


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """Of an architecture that OpenCLIP does not list."""
    folder = tmp_path / "start"
    export_openclip(load_model(ProjectConfig(clip_model="tiny-clip").with_overrides({"model.pretrained": None})), folder)
    described = json.loads((folder / "open_clip_config.json").read_text())
    described["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {}  # changes nothing
    described["preprocess_cfg"]["mean"] = [0.4, 0.5, 0.6]
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return folder


def test_a_sweep_from_a_folder_is_measured_by_its_own_weights(
    garments: Path, start: Path, tmp_path: Path, local_ray: None, run_sweep: RunSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside").mkdir()
    monkeypatch.chdir(tmp_path / "beside")
    fixed = ("clip_model=local-dir:../start", "training.batch_size=16", "training.learning_rate=1e-3", "hardware.threads=1")
    flags = ["--data", garments, "--results", tmp_path, "--name", "it", "--num-trials", "2", "--budget-examples", "96"]
    flags += ["--metric", METRIC.name]
    code, out, err = run_sweep(*flags, *(part for setting in fixed for part in ("--set", setting)))
    assert code == 0, err
    sweep_dir = tmp_path / "it"
    content = sweep_json(sweep_dir)
    best = ranked(content["trials"], METRIC)[0]
    assert content["metric"] == METRIC.name
    assert content["best"]["trial_id"] == best["trial_id"]
    for row, known in zip(content["trials"], read_trials(sweep_dir / "study.journal"), strict=True):
        (folder,) = sweep_dir.glob(f"trials/{row['trial_id']}-*")
        assert known.intermediate_values == {each["examples_seen"]: each[METRIC.name] for each in read_history(folder)}
        assert known.value in (None, row[METRIC.name])
        assert METRIC.interval(row) is not None
    assert best["config"]["clip_model"] == f"local-dir:{start.resolve()}"
    assert "else from the hub" not in out

    (trial,) = sweep_dir.glob(f"trials/{best['trial_id']}-*")
    (hparams,) = trial.glob("*.hparams")
    assert f"recall_by_direction/{METRIC.name}".encode() in hparams.read_bytes()
    trained, exported = read_weights(newest_weights(trial)), load_file(sweep_dir / "best" / "open_clip_model.safetensors")
    assert trained.keys() == exported.keys()
    assert all(torch.equal(trained[key], exported[key]) for key in trained)
    assert not torch.equal(trained["text_projection"], load_file(start / "open_clip_model.safetensors")["text_projection"])

    monkeypatch.chdir("/")
    config = ProjectConfig(device="cpu").with_overrides({"hardware.threads": 1})
    named = (sweep_dir, sweep_dir / "best", trial, f"local-dir:{sweep_dir / 'best'}")
    for model in named:
        report = run_evaluate(EvaluateOptions(model=str(model), data=garments, config=config), no_phases)
        assert report.notes == []
        assert report.figures[0][METRIC.name] == METRIC.of(best)
        assert report.figures[0]["recall_at_10"] == best["recall_at_10"]
        assert report.zero_shot[0]["recall_at_10"] == best["untouched_recall_at_10"]
    zero_shot = run_evaluate(EvaluateOptions(model=os.path.relpath(start), data=garments, config=config), no_phases)
    assert zero_shot.figures[0]["recall_at_10"] == best["untouched_recall_at_10"] != best["recall_at_10"]

    # It goes on from another folder than it was started in.
    code, out, err = run_sweep("--results", tmp_path, "--name", "it", "--refit", "2")
    assert code == 0, err
    refitted = read_weights(newest_weights(sweep_dir / "refit"))
    exported = load_file(sweep_dir / "refit" / "best" / "open_clip_model.safetensors")
    assert all(torch.equal(refitted[key], exported[key]) for key in refitted)
    assert not torch.equal(refitted["text_projection"], trained["text_projection"])

    gallery = make_gallery(sweep_dir, best)
    retrieval, _ = last_queries(sweep_dir, best)
    ranks_N = retrieval.text_to_image.ranks.expected_rank()
    wanted = [max(1, round(float(ranks_N[query]))) for query in fixed_queries(gallery.num_photos, len(gallery.fixed))]
    assert [query.rank for query in gallery.fixed] == wanted


def test_a_trials_folder_has_a_name_that_a_disk_takes(tmp_path: Path) -> None:
    from fashionclip_tune.tuning.trial import trial_dir

    for letter in ("x", "é"):
        trial_dir(tmp_path, 7, f"local-dir:/{letter * 400}", "siglip").mkdir(parents=True)
    assert len(list(tmp_path.glob("trials/0007-*"))) == 2
