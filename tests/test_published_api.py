"""The published example as it stands, on a tree like Colab's, with tiny towers under the published model's name.

Its weights come from ``openclip_cache/`` on the Drive, in the hub's own layout; its shards have the names of Fashion-Gen's.
"""

import csv
import json
import re
import tarfile
from io import BytesIO
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from fashionclip_tune import ClipModelOptions, LossFunctionOptions, ProjectConfig, TrainingConfig, train, training_prep
from fashionclip_tune.config import project as config_module
from fashionclip_tune.errors import UserError
from fashionclip_tune.models import openclip as model_module
from fashionclip_tune.models.named_model import named_model
from fashionclip_tune.models.tiny import register_tiny_models
from fashionclip_tune.models.weights import read_weights
from fashionclip_tune.storage.checkpoint import best_checkpoint, open_checkpoint
from fashionclip_tune.training.history import read_history
from fashionclip_tune.training.run import plan_run


@pytest.fixture(scope="module")
def aug_root(garments: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """261 training and 7 validation shards, a photo in each of the first, two in each of the others."""
    folder = tmp_path_factory.mktemp("drive") / "clip_dataset_aug"
    folder.mkdir()
    for split, num_shards, num_photos in (("train", 261, 1), ("valid", 7, 2)):
        with tarfile.open(garments / f"clip_dataset_{split}_aug.000000.tar") as source:
            members = [(member.name, source.extractfile(member).read()) for member in source.getmembers()]
        keys = list(dict.fromkeys(name.split(".")[0] for name, _ in members))
        for shard in range(num_shards):
            with tarfile.open(folder / f"clip_dataset_{split}_aug.{shard:06d}.tar", "w") as target:
                for place in range(num_photos):
                    key = keys[(shard * num_photos + place) % len(keys)]
                    for name, content in members:
                        if name.startswith(f"{key}."):
                            info = tarfile.TarInfo(f"{shard:03d}_{name}")
                            info.size = len(content)
                            target.addfile(info, BytesIO(content))
    return folder


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The base path on a Drive that is mounted elsewhere, with the weights of SigLIP2's name in its cache."""
    base = tmp_path / "content" / "drive" / "MyDrive" / "fashionclip_tune"
    base.parent.mkdir(parents=True)
    monkeypatch.setattr(config_module, "COLAB_BASE_PATH", base)
    name = ClipModelOptions.ViT_SigLIP_2_16.value
    register_tiny_models()
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, open_clip.get_model_config("tiny-sig"))
    # OpenCLIP has SigLIP's tokenizers on the hub only.
    monkeypatch.setattr(model_module, "_tokenizer", lambda *_: open_clip.get_tokenizer("tiny-sig"))
    model_module._load_cached.cache_clear()
    torch.manual_seed(0)
    weights = open_clip.create_model("tiny-sig").state_dict()
    snapshot = base / "openclip_cache" / "models--timm--ViT-B-16-SigLIP2-256" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    save_file(weights, snapshot / "open_clip_model.safetensors")
    return base


def published(aug_root: Path) -> ProjectConfig:
    return ProjectConfig(
        clip_model=ClipModelOptions.ViT_SigLIP_2_16, loss_function=LossFunctionOptions.SIGLIP,
        on_colab=True, dataset_root=aug_root,
        training=TrainingConfig(batch_size=64, num_workers=2, learning_rate=1e-5,
                                checkpoint_interval=500, max_steps=None, epochs=5),
        train_shards_pattern="clip_dataset_train_aug.{000000..000260}.tar",
        valid_shards_pattern="clip_dataset_valid_aug.{000000..000006}.tar",
        train_eval_shards_pattern="clip_dataset_train_aug.{000000..000006}.tar",
        valid_eval_shards_pattern="clip_dataset_valid_aug.{000000..000006}.tar",
        shardshuffle=False)  # fmt: skip


def test_the_published_example_constructs_as_it_stands(tmp_path: Path) -> None:
    config = published(tmp_path)
    assert config.dataset_dir == tmp_path
    assert config.model_name == "ViT-B-16-SigLIP2-256"
    assert config.checkpoint_dir == Path("/content/drive/MyDrive/fashionclip_tune/checkpoints")


@pytest.mark.slow
def test_the_published_example_runs_as_it_stands(aug_root: Path, drive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = published(aug_root)
    training_prep(config).train()

    num_steps = 5 * 261 // 64
    assert sorted(path.name for path in drive.iterdir() if path.is_dir()) == ["checkpoints", "evaluations", "openclip_cache"]
    assert sorted(path.name for path in (drive / "checkpoints").iterdir()) == ["best_00000020", "step_00000020", "token_table"]
    rows = [json.loads(path.read_text()) for path in sorted((drive / "evaluations").glob("*.json"))]
    assert [row["step"] for row in rows] == [0, num_steps]
    assert all("train_recall_at_10" in row and row["num_pairs"] == 14 for row in rows)
    lines = capsys.readouterr().out.splitlines()
    # A busy machine takes long enough for lines of progress.
    zero_shot, end, *outcome, best = [line for line in lines if not re.fullmatch(r".+: [\d,]+ of [\d,]+", line)]
    assert "zero-shot weights" in zero_shot
    assert f"recall_at_10 {rows[1]['recall_at_10']:.4f}" in end
    assert f"zero-shot {rows[0]['recall_at_10']:.4f}" in outcome[0]
    assert best == f"best weights: {drive / 'checkpoints' / 'best_00000020'}"
    with open(drive / "evaluations" / "training_log.csv", newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [0, num_steps]


def test_of_fashion_gen_the_example_is_evaluated_every_500_steps(aug_root: Path) -> None:
    plan = plan_run(published(aug_root), 260_480)
    assert (plan.stage_steps, plan.total_steps) == (500, 20_350)


def test_the_best_evaluation_is_kept_beside_the_last_two_checkpoints(aug_root: Path, drive: Path) -> None:
    config = published(aug_root).with_overrides(
        {
            "training.batch_size": 16,
            "training.num_workers": 0,
            "training.checkpoint_interval": 2,
            "training.max_steps": 10,
            "training.learning_rate": 0.01,
        }
    )
    result = training_prep(config).train()
    recalls = {row["step"]: row["recall_at_10"] for row in read_history(drive) if row["step"] > 0}
    assert list(recalls) == [2, 4, 6, 8, 10]
    expected = max(recalls, key=lambda step: (recalls[step], -step))
    best = best_checkpoint(drive)
    assert best is not None
    assert best.name == f"best_{expected:08d}"

    # The same steps without keeping anything: the weights after `expected` of them.
    other = config.with_overrides({"training.checkpoint_minutes": 0})

    def stop_at_best(row: dict[str, float]) -> None:
        if row["step"] == expected:
            raise SystemExit

    with pytest.raises(SystemExit):
        train(other, drive.parent / "other", on_eval=stop_at_best)
    again = read_weights(drive.parent / "other" / "checkpoints" / f"step_{expected:08d}" / "model.safetensors")
    kept = load_file(best / "model.safetensors")  # as OpenCLIP reads it
    assert again.keys() == kept.keys()
    assert all(torch.equal(again[name], kept[name]) for name in again)
    assert not list((drive.parent / "other" / "checkpoints").glob("best_*"))

    # It can be evaluated, and started from, not gone on from.
    assert torch.equal(named_model(str(best), config).loaded.network.state_dict()["logit_scale"], kept["logit_scale"])
    with pytest.raises(UserError, match="weights only"):
        open_checkpoint(best)
    assert result.checkpoint.name == "step_00000010"


def test_without_the_drive_it_says_how_to_mount_it(aug_root: Path, drive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "COLAB_BASE_PATH", drive.parent.parent / "Elsewhere" / "fashionclip_tune")
    with pytest.raises(UserError, match=r"Elsewhere is not there: mount Google Drive first .*drive\.mount"):
        training_prep(published(aug_root))
