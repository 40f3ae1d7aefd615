"""The configuration: what it takes, what it refuses and how it says so, what its fingerprint covers."""

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fashionclip_tune import ClipModelOptions, LossFunctionOptions, ProjectConfig, TrainingConfig
from fashionclip_tune.config.choices import CaptionChoice, LearningRateSchedule, Precision
from fashionclip_tune.config.options import (
    AugmentationConfig,
    EvaluationConfig,
    FreezeConfig,
    HardwareConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from fashionclip_tune.config.project import override_paths
from fashionclip_tune.errors import UserError

# For every setting another value than the default, and whether it changes the numbers of a run.
OTHER_VALUES: dict[str, tuple[Any, bool]] = {
    "clip_model": ("ViT-B-16", True),
    "loss_function": ("siglip", True),
    "on_colab": (True, False),
    "device": ("cuda:1", False),
    "dataset_root": ("/elsewhere", False),
    "train_shards_pattern": ("a.{0..1}.tar", False),
    "valid_shards_pattern": ("b.tar", False),
    "train_eval_shards_pattern": ("c.tar", False),
    "valid_eval_shards_pattern": ("d.tar", False),
    "shardshuffle": (False, True),
    "should_load_checkpoint": (True, False),
    "checkpoint_path": ("/some/checkpoint", False),
    "training.batch_size": (128, True),
    "training.micro_batch_size": (16, False),
    "training.num_workers": (7, False),
    "training.learning_rate": (2e-5, True),
    "training.weight_decay": (0.1, True),
    "training.beta1": (0.8, True),
    "training.beta2": (0.99, True),
    "training.epsilon": (1e-8, True),
    "training.max_grad_norm": (None, True),
    "training.checkpoint_interval": (100, True),
    "training.max_steps": (100, True),
    "training.epochs": (6, True),
    "training.budget_examples": (64 * 500, True),
    "training.stage_examples": (640, True),
    "training.checkpoint_minutes": (0.0, False),
    "training.shuffle_buffer": (0, True),
    "training.unique_products": (True, True),
    "training.max_bad_share": (0.5, False),
    "training.seed": (1, True),
    "training.edition": (1, True),
    "model.pretrained": ("openai", False),
    "model.init_logit_bias": (-5.0, True),
    "model.patch_dropout": (0.5, True),
    "model.batch_norm": ("update", True),
    "model.cache_dir": ("/cache", False),
    "loss.positives": ("mask", True),
    "optimizer.image_rate": (0.5, True),
    "optimizer.text_rate": (0.5, True),
    "optimizer.layer_decay": (0.7, True),
    "optimizer.logit_learning_rate": (0.02, True),
    "optimizer.ema_decay": (0.99, True),
    "freeze.image_tower": (True, True),
    "freeze.text_tower": (True, True),
    "freeze.token_embedding": (True, True),
    "freeze.image_blocks": (3, True),
    "freeze.text_blocks": (3, True),
    "schedule.name": ("constant", True),
    "schedule.warmup_ratio": (0.1, True),
    "augmentation.caption": ("uniform", True),
    "augmentation.original_caption_probability": (0.2, True),
    "augmentation.image_strength": (0.5, True),
    "augmentation.rand_augment": (True, True),
    "augmentation.erasing": (True, True),
    "evaluation.batch_size": (32, True),
    "reading.allow_remote": (True, False),
    "reading.scratch": ("/scratch", False),
    "reading.scratch_gb": (5.0, False),
    "reading.stall_s": (60.0, False),
    "evaluation.protocol": ("product", True),
    "hardware.precision": ("bf16", True),
    "hardware.device_share": (0.5, False),
    "hardware.threads": (2, True),
    "hardware.gradient_checkpointing": (True, False),
    "hardware.compile": (True, True),
    "hardware.deterministic": (False, False),
}


def fingerprint(config: ProjectConfig) -> str:
    return config.fingerprint(data="d", weights="w")


def with_one(path: str, value: Any) -> ProjectConfig:
    others = {"checkpoint_path": "/some/checkpoint"} if path == "should_load_checkpoint" else {}
    return ProjectConfig().with_overrides({path: value, **others})


@pytest.mark.parametrize(
    ("path", "value", "allowed"),
    [
        ("clip_model", "", "an OpenCLIP architecture name"),
        ("clip_model", 5, "text expected"),
        ("loss_function", "triplet", "one of contrastive, siglip"),
        ("loss_function", 1, "one of contrastive, siglip"),
        ("on_colab", "yes", "true or false expected"),
        ("on_colab", 1, "true or false expected"),
        ("shardshuffle", None, "true or false expected"),
        ("device", "tpu", "auto, cpu, cuda or cuda:N"),
        ("device", "0", "auto, cpu, cuda or cuda:N"),
        ("device", "cuda:", "auto, cpu, cuda or cuda:N"),
        ("device", "cuda:x", "auto, cpu, cuda or cuda:N"),
        ("device", "cuda:-1", "auto, cpu, cuda or cuda:N"),
        ("device", "cuda:\N{SUPERSCRIPT TWO}", "auto, cpu, cuda or cuda:N"),
        ("dataset_root", 5, "text expected"),
        ("model.cache_dir", 5, "a path expected"),
        ("reading.scratch", "s3://bucket/scratch", "a path expected"),
        ("reading.scratch_gb", 0.0, "above 0"),
        ("reading.stall_s", -1.0, "above 0"),
        ("train_shards_pattern", 5, "text expected"),
        ("training.batch_size", 0, "at least 1"),
        ("training.batch_size", -64, "at least 1"),
        ("training.batch_size", "many", "a whole number expected"),
        ("training.batch_size", "", "a whole number expected"),
        ("training.batch_size", 1.5, "a whole number expected"),
        ("training.batch_size", "1.5", "a whole number expected"),
        ("training.batch_size", True, "a whole number expected"),
        ("training.batch_size", None, "a whole number expected"),
        ("training.batch_size", "none", "a whole number expected"),
        ("training.batch_size", [64], "a whole number expected"),
        ("training.batch_size", float("inf"), "a whole number expected"),
        ("training.batch_size", float("nan"), "a whole number expected"),
        ("training.micro_batch_size", 0, "above 0, or none"),
        ("training.micro_batch_size", "half", "a whole number expected"),
        ("training.num_workers", -1, "at least 0"),
        ("training.learning_rate", 0.0, "above 0, at most 1"),
        ("training.learning_rate", -1e-5, "above 0, at most 1"),
        ("training.learning_rate", 1.01, "above 0, at most 1"),
        ("training.learning_rate", "fast", "a number expected"),
        ("training.learning_rate", "nan", "a number expected"),
        ("training.learning_rate", "inf", "a number expected"),
        ("training.learning_rate", False, "a number expected"),
        ("training.learning_rate", 10**400, "a number expected"),
        ("training.weight_decay", -0.1, "at least 0"),
        ("training.beta1", 1.0, "at least 0, below 1"),
        ("training.beta2", -0.1, "at least 0, below 1"),
        ("training.epsilon", 0.0, "above 0"),
        ("training.max_grad_norm", 0.0, "above 0, or none"),
        ("training.checkpoint_interval", 0, "at least 1"),
        ("training.max_steps", 0, "above 0, or none"),
        ("training.epochs", 0, "at least 1"),
        ("training.budget_examples", 63, "a multiple of the stage of 32000 examples"),
        ("training.budget_examples", -1, "above 0, or none"),
        ("training.stage_examples", 100, "a multiple of training.batch_size = 64"),
        ("training.stage_examples", 0, "above 0, or none"),
        ("training.checkpoint_minutes", -1.0, "at least 0"),
        ("training.shuffle_buffer", -1, "at least 0"),
        ("training.max_bad_share", 1.0, "at least 0, below 1"),
        ("training.seed", -1, "at least 0"),
        ("model.pretrained", 3, "text expected"),
        ("model.init_logit_bias", "low", "a number expected"),
        ("model.cache_dir", 3, "a path expected"),
        ("model.patch_dropout", 1.0, "at least 0, below 1"),
        ("loss.positives", "some", "one of pair, all, mask"),
        ("optimizer.image_rate", 0.0, "above 0 (freeze.image_tower"),
        ("optimizer.text_rate", -1.0, "above 0 (freeze.image_tower"),
        ("optimizer.layer_decay", 0.0, "above 0, at most 1"),
        ("optimizer.layer_decay", 1.1, "above 0, at most 1"),
        ("optimizer.logit_learning_rate", -0.1, "from 0 to 1, or none"),
        ("optimizer.ema_decay", 1.0, "above 0, below 1, or none"),
        ("optimizer.ema_decay", 0.0, "above 0, below 1, or none"),
        ("freeze.image_tower", 1, "true or false expected"),
        ("freeze.image_blocks", -1, "at least 0"),
        ("freeze.text_blocks", -1, "at least 0"),
        ("hardware.compile", "yes", "true or false expected"),
        ("schedule.name", "linear", "one of cosine, constant"),
        ("schedule.warmup_ratio", 1.0, "at least 0, below 1"),
        ("augmentation.caption", "all", "one of original, uniform, weighted"),
        ("augmentation.original_caption_probability", 1.0, "at least 0, below 1"),
        ("augmentation.image_strength", 1.1, "from 0 to 1"),
        ("augmentation.image_strength", -0.1, "from 0 to 1"),
        ("augmentation.rand_augment", 2, "true or false expected"),
        ("augmentation.erasing", "often", "true or false expected"),
        ("evaluation.batch_size", 0, "at least 1"),
        ("evaluation.protocol", "shop", "one of instance, product, candidates_101, all_captions"),
        ("hardware.precision", "fp8", "one of auto, fp32, fp16, bf16"),
        ("hardware.threads", 0, "at least 1, or none"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_path_value_and_what_is_allowed(path: str, value: Any, allowed: str) -> None:
    with pytest.raises(UserError) as error:
        ProjectConfig().with_overrides({path: value})
    assert str(error.value).startswith(f"{path} = {value!r} is not allowed: ")
    assert allowed in str(error.value)


@pytest.mark.parametrize(
    "path", ["learning_rate", "training", "training.", "training.lr", "Training.seed", "", "model.pretrained.x"]
)
def test_a_wrong_path_is_an_error_that_names_it_and_all_allowed_ones(path: str) -> None:
    with pytest.raises(UserError) as error:
        ProjectConfig().with_overrides({path: 1})
    assert repr(path) in str(error.value)
    assert all(allowed in str(error.value) for allowed in OTHER_VALUES)


def test_loading_a_checkpoint_needs_its_path() -> None:
    with pytest.raises(UserError, match=r"^checkpoint_path = None is not allowed: a checkpoint, since should_load_checkpoint"):
        ProjectConfig(should_load_checkpoint=True)


def test_a_section_of_the_wrong_type_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"^training = \{'batch_size': 3\} is not allowed"):
        ProjectConfig(training={"batch_size": 3})


@pytest.mark.parametrize(
    ("section", "wrong", "path"),
    [
        (TrainingConfig, {"batch_size": 0}, "training.batch_size"),
        (ModelConfig, {"pretrained": 1}, "model.pretrained"),
        (LossConfig, {"positives": "x"}, "loss.positives"),
        (OptimizerConfig, {"layer_decay": 2}, "optimizer.layer_decay"),
        (FreezeConfig, {"image_tower": True, "text_tower": True}, "freeze.text_tower"),
        (ScheduleConfig, {"warmup_ratio": 2}, "schedule.warmup_ratio"),
        (AugmentationConfig, {"caption": "x"}, "augmentation.caption"),
        (EvaluationConfig, {"batch_size": 0}, "evaluation.batch_size"),
        (HardwareConfig, {"threads": -1}, "hardware.threads"),
    ],
)
def test_a_section_built_by_itself_is_checked_too(section: Any, wrong: dict[str, Any], path: str) -> None:
    with pytest.raises(UserError, match=f"^{path} = "):
        section(**wrong)


def test_values_may_be_text_as_a_command_line_gives_them() -> None:
    config = ProjectConfig().with_overrides(
        {
            "clip_model": "ViT_B_16",
            "loss_function": "SIGLIP",
            "shardshuffle": "false",
            "on_colab": "true",
            "dataset_root": "~/data",
            "valid_shards_pattern": "none",
            "training.learning_rate": "3e-5",
            "training.batch_size": "32",
            "training.shuffle_buffer": "2e4",
            "training.max_grad_norm": "none",
            "training.stage_examples": "64",
            "model.pretrained": "none",
            "augmentation.caption": "uniform",
            "hardware.precision": "bf16",
        }
    )
    assert config.clip_model is ClipModelOptions.ViT_B_16
    assert config.loss_function is LossFunctionOptions.SIGLIP
    assert config.shardshuffle is False
    assert config.on_colab is True
    assert config.dataset_root == Path.home() / "data"
    assert config.valid_shards_pattern is None
    assert config.training == TrainingConfig(
        learning_rate=3e-5, batch_size=32, shuffle_buffer=20_000, max_grad_norm=None, stage_examples=64
    )
    assert [type(value) for value in (config.training.batch_size, config.training.shuffle_buffer)] == [int, int]
    assert config.model.pretrained is None
    assert config.augmentation.caption is CaptionChoice.UNIFORM
    assert config.hardware.precision is Precision.BF16
    assert ProjectConfig().with_overrides({"schedule.name": "constant"}).schedule.name is LearningRateSchedule.CONSTANT


@given(seed=st.integers(0, 2**64))
@example(seed=2**53 + 1)  # no float is equal to it
@example(seed=2**63 - 1)
def test_whole_numbers_are_exact_as_numbers_and_as_text(seed: int) -> None:
    assert TrainingConfig(seed=seed).seed == seed
    assert TrainingConfig(seed=str(seed)).seed == seed


def test_any_architecture_name_is_taken_as_it_is() -> None:
    assert ProjectConfig(clip_model="tiny-clip").model_name == "tiny-clip"
    assert ProjectConfig(clip_model=ClipModelOptions.ViT_SigLIP_2_16).model_name == "ViT-B-16-SigLIP2-256"
    assert ProjectConfig(clip_model="ViT-B-16-SigLIP2-256").clip_model is ClipModelOptions.ViT_SigLIP_2_16


def test_settings_that_depend_on_each_other_are_overridden_together() -> None:
    overrides = {"training.budget_examples": 300, "training.stage_examples": 100, "training.batch_size": 50}
    for order in (list(overrides), list(overrides)[::-1]):
        config = ProjectConfig().with_overrides({path: overrides[path] for path in order})
        assert (config.training.budget_examples, config.training.batch_size) == (300, 50)


def test_a_config_is_frozen_and_overrides_leave_it_alone() -> None:
    config = ProjectConfig()
    with pytest.raises(FrozenInstanceError):
        config.device = "cpu"
    with pytest.raises(FrozenInstanceError):
        config.training.batch_size = 1
    config.with_overrides({"training.batch_size": 32, "device": "cpu"})
    assert config == ProjectConfig()
    assert {config: 1}[ProjectConfig()] == 1  # hashable, equal by value


def test_every_setting_survives_json() -> None:
    alone = ("training.budget_examples", "freeze.text_tower")  # not possible with the others
    values = {path: value for path, (value, _) in OTHER_VALUES.items() if path not in alone}
    config = ProjectConfig().with_overrides(values | {"training.budget_examples": 6400})
    flat = json.loads(json.dumps(config.to_dict()))
    assert ProjectConfig.from_dict(flat) == config
    assert {path: flat[path] for path in values} == values
    assert ProjectConfig.from_dict(json.loads(json.dumps(ProjectConfig().to_dict()))) == ProjectConfig()


def test_every_setting_is_in_the_table_of_this_test() -> None:
    assert set(override_paths()) == set(OTHER_VALUES)


@pytest.mark.parametrize("path", OTHER_VALUES)
def test_the_fingerprint_changes_with_numbers_and_not_with_paths_device_and_loading(path: str) -> None:
    value, changes_numbers = OTHER_VALUES[path]
    changed = with_one(path, value)
    assert changed.to_dict()[path] != ProjectConfig().to_dict()[path]
    assert (fingerprint(changed) != fingerprint(ProjectConfig())) == changes_numbers


def test_the_fingerprint_covers_data_and_weights_and_tells_them_apart() -> None:
    config = ProjectConfig()
    prints = {config.fingerprint(data=data, weights=weights) for data in ("a", "b") for weights in ("a", "b")}
    assert len(prints) == 4
    assert fingerprint(config) == fingerprint(ProjectConfig.from_dict(config.to_dict()))


@pytest.mark.parametrize("on_colab", [False, True])
def test_folders_lie_below_the_drive_on_colab_and_else_below_the_working_directory(
    on_colab: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = Path("/content/drive/MyDrive/fashionclip_tune") if on_colab else tmp_path
    config = ProjectConfig(on_colab=on_colab)
    assert config.base_path == base
    assert config.dataset_dir == base / "dataset"
    assert config.checkpoint_dir == base / "checkpoints"
    assert config.evaluation_dir == base / "evaluations"
    assert config.model_cache_dir == base / "openclip_cache"
    assert config.with_overrides({"model.cache_dir": "/shared/cache"}).model_cache_dir == Path("/shared/cache")
    assert config.with_overrides({"dataset_root": "/shared/data"}).dataset_dir == Path("/shared/data")


def test_weights_by_a_relative_path_are_recorded_by_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for said, recorded in (
        ("there/best", str(tmp_path / "there" / "best")),
        ("weights.pt", str(tmp_path / "weights.pt")),
        ("openai", "openai"),
        ("default", "default"),
        (None, None),
    ):
        assert ProjectConfig().with_overrides({"model.pretrained": said}).model.pretrained == recorded
