"""A sweep over starts of every kind, killed and resumed: each is told apart, and measured again by every name it has."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file

from fashionclip_tune.cli.main import main
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.evaluation.evaluate_model import EvaluateOptions, run_evaluate
from fashionclip_tune.models.openclip import export_openclip, load_model
from fashionclip_tune.progress import no_phases
from fashionclip_tune.storage.checkpoint import newest_weights
from fashionclip_tune.training.pretraining import pretrain_missing
from fashionclip_tune.training.train import train
from tests.support.transformers_models import clip_config, save
from tests.tuning.conftest import sweep_json

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
SPACE = """
STARTS = {starts!r}
BASE = {{"training.batch_size": 16, "training.checkpoint_minutes": 0, "training.num_workers": 0}}
POINTS = [{{"start": start}} for start in STARTS]


def space(trial):
    return {{"clip_model": trial.suggest_categorical("start", STARTS), "training.learning_rate": 1e-3}}
"""


@pytest.fixture
def starts(tmp_path: Path, garments: Path) -> list[str]:
    """Two weights of one architecture, a model in a hub's cache, the winner of a run, and a folder of transformers."""
    random = ProjectConfig(clip_model="tiny-clip", device="cpu").with_overrides({"model.pretrained": None, "training.seed": 7})
    network = load_model(random).network
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, tmp_path / "weights.safetensors")
    repository = tmp_path / "hub" / "hub" / "models--shop--garment-clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    sig = ProjectConfig(clip_model="tiny-sig").with_overrides({"model.pretrained": None, "training.seed": 8})
    export_openclip(load_model(sig), repository / "snapshots" / ("0" * 40))
    (repository / "snapshots" / ("0" * 40) / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    settings = {
        "training.batch_size": 16,
        "training.max_steps": 2,
        "training.checkpoint_interval": 1,
        "training.num_workers": 0,
    }
    train(random.with_overrides({"dataset_root": str(garments), **settings}), tmp_path / "winner")
    save(clip_config(), tmp_path / "fashion-clip")
    pretrain_missing(["tiny-clip"])
    file = f"tiny-clip={tmp_path / 'weights.safetensors'}"
    return ["tiny-clip", file, "hf-hub:shop/garment-clip", str(tmp_path / "winner"), str(tmp_path / "fashion-clip")]


@pytest.mark.slow
def test_five_starts_are_told_apart_and_measured_again_by_every_name(
    garments: Path, starts: list[str], tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(SPACE.format(starts=starts))
    words = ["--data", garments, "--results", tmp_path, "--name", "it", "--space", tmp_path / "mine.py", "--num-trials", "5"]
    words += ["--scheduler", "none", "--budget-examples", "48", "--samples-per-second", "100", "--max-concurrent", "1"]
    command = [sys.executable, str(ROOT / "sweeps" / "run_sweep.py"), *map(str, words)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    sweep_dir = tmp_path / "it"
    first = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(sweep_dir.glob("trials/0002-*/evaluations/*.json")):
        assert first.poll() is None
        assert time.monotonic() < deadline, "it did not get as far as the third start"
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr

    content = sweep_json(sweep_dir)
    rows = content["trials"]
    labels = ["tiny-clip", "tiny-clip=weights", "garment-clip", "winner/step_00000002", "fashion-clip"]
    assert [(row["state"], row["start"]) for row in rows] == [("COMPLETE", label) for label in labels]
    folders = sorted(path.name for path in (sweep_dir / "trials").iterdir())
    assert folders == [f"{row['trial_id']}-{row['start'].replace('/', '-')}-contrastive" for row in rows]
    facts = {each["label"]: each for each in content["starts"].values()}
    assert facts["garment-clip"]["licence"] == "apache-2.0"
    assert [facts[label]["architecture"] for label in labels] == [*["tiny-clip"] * 2, "tiny-sig", *["tiny-clip"] * 2]
    assert all(label in done.stdout for label in labels)
    assert len({row["untouched_recall_at_10"] for row in rows}) > 2

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub" / "hub"))
    config = ProjectConfig(device="cpu").with_overrides({"hardware.threads": 1})

    def recall(model: object) -> tuple[float, float | None]:
        report = run_evaluate(EvaluateOptions(model=str(model), data=garments, config=config), no_phases)
        return report.figures[0]["recall_at_10"], report.zero_shot and report.zero_shot[0]["recall_at_10"]

    for row, start, folder in zip(rows, starts, sorted((sweep_dir / "trials").iterdir()), strict=True):
        weights = newest_weights(folder)
        assert weights is not None
        wanted = (row["recall_at_10"], row["untouched_recall_at_10"])
        architecture = facts[row["start"]]["architecture"]
        exported = tmp_path / f"export-{row['trial_id']}"
        main(["export", str(folder), "--to", str(exported)])
        for model in (folder, weights.parent, weights):
            assert recall(model) == wanted
        file = exported / "open_clip_model.safetensors"
        for model in (exported, f"local-dir:{exported}", f"{architecture}={file}"):
            assert recall(model) == (row["recall_at_10"], None)
        assert recall(start)[0] == row["untouched_recall_at_10"]
    best = content["best"]["trial_id"]
    assert recall(sweep_dir) == recall(sweep_dir / "best") == recall(next(sweep_dir.glob(f"trials/{best}-*")))
