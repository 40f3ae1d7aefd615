"""``_pretrain`` with a small recipe, in this process (the real one takes a minute and runs in processes of its own)."""

from collections.abc import Sequence
from pathlib import Path

import open_clip
import pytest
import torch

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.models import tiny
from fashionclip_tune.models.openclip import load_model
from fashionclip_tune.models.tiny import pretrained_tiny_dir
from fashionclip_tune.synthetic import GarmentRecipe, cached_dataset
from fashionclip_tune.training import pretraining


@pytest.fixture
def small_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of a small data set of the pretraining collection; the recipe of the weights is 4 steps on it."""
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path / "cache"))
    for module in (tiny, pretraining):
        monkeypatch.setattr(module, "PRETRAINING_EXAMPLES", 256)
        monkeypatch.setattr(module, "PRETRAINING_PRODUCTS", 50)
    recipe = GarmentRecipe(collection="pretraining", num_products=50, views_per_product=2, image_size=32)
    return cached_dataset(recipe, tmp_path / "data")


@pytest.mark.parametrize(("name", "loss", "biased"), [("tiny-clip", "contrastive", False), ("tiny-sig", "siglip", True)])
def test_trained_weights_are_left_as_an_openclip_folder_even_after_a_killed_attempt(
    small_recipe: Path, name: str, loss: str, biased: bool
) -> None:
    target = pretrained_tiny_dir(name)
    for leftover in (f"{target.name}.run/evaluations", f"{target.name}.run/checkpoints/step_00000002", f"{target.name}.tmp"):
        (target.parent / leftover).mkdir(parents=True)
    (target.parent / f"{target.name}.run/evaluations/step_00000000.json").write_text("{")
    (target.parent / f"{target.name}.tmp/open_clip_model.safetensors").write_bytes(b"half")

    pretraining._pretrain(name, small_recipe)
    assert sorted(path.name for path in target.iterdir()) == ["open_clip_config.json", "open_clip_model.safetensors"]
    assert sorted(path.name for path in target.parent.iterdir() if path.is_dir()) == [target.name]

    theirs = open_clip.create_model(f"local-dir:{target}")
    ours = load_model(ProjectConfig(clip_model=name, loss_function=loss))
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in ours.network.state_dict().items())
    assert (getattr(theirs, "logit_bias", None) is not None) is biased
    assert (ours.preprocessing.mean, ours.preprocessing.resize_mode) == ((0.5, 0.5, 0.5), "squash")

    zero_shot = load_model(ProjectConfig(clip_model=name, loss_function=loss).with_overrides({"model.pretrained": None}))
    assert ours.weights_fingerprint != zero_shot.weights_fingerprint


def test_weights_that_are_there_are_not_made_again(small_recipe: Path, logged: Sequence[str]) -> None:
    for name in tiny.TINY_MODELS:
        pretrained_tiny_dir(name).mkdir(parents=True)
    pretraining.pretrain_missing([*tiny.TINY_MODELS, "ViT-B-32"])
    assert logged == []


def test_another_recipe_has_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: pretrained_tiny_dir(name) for name in tiny.TINY_MODELS}
    assert len(set(before.values())) == 2
    monkeypatch.setattr(tiny, "PRETRAINING_EXAMPLES", 512)
    for name, folder in before.items():
        assert pretrained_tiny_dir(name) not in before.values()
        assert pretrained_tiny_dir(name).name.startswith(f"{name}-")
        assert folder.parent == pretrained_tiny_dir(name).parent
