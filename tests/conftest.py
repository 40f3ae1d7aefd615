"""Shared by all tests: a cache of their own, a small data set, a configuration that trains in a second."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported: no test reaches out


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing is read from or left in the user's cache; subprocesses inherit it."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASHIONCLIP_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def garments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 100 synthetic products with 2 photos each: 160 photos to train on, 20 to evaluate on. Do not change it."""
    from fashionclip_tune.synthetic import GarmentRecipe, render_dataset

    folder = tmp_path_factory.mktemp("garments")
    render_dataset(folder, GarmentRecipe(num_products=100, views_per_product=2, image_size=48))
    return folder


@pytest.fixture
def tiny_config(garments: Path):
    """``tiny-clip`` from random weights, 10 steps of 16 photos in stages of 2, on one thread."""
    from fashionclip_tune.config import ProjectConfig

    return ProjectConfig(clip_model="tiny-clip", dataset_root=garments, device="cpu").with_overrides(
        {
            "model.pretrained": None,
            "training.batch_size": 16,
            "training.num_workers": 0,
            "training.learning_rate": 1e-3,
            "training.budget_examples": 160,
            "training.stage_examples": 32,
            "training.checkpoint_minutes": 0,
            "hardware.threads": 1,
        }
    )


@pytest.fixture(scope="session")
def real_photos() -> Path:
    """The folder fpi60 of real catalogue photos, kept outside the repository; tests that need it are skipped without."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "fpi60"
    if not folder.is_dir():
        pytest.skip(f"real photos are not at {folder}")
    return folder
