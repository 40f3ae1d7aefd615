"""Runs in which everything random is switched on, and runs as processes of their own."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fashionclip_tune.config.project import ProjectConfig


def hard(config: ProjectConfig, name: str = "tiny-clip", loss: str = "contrastive") -> ProjectConfig:
    """Everything random is switched on, and batches run across the border of an epoch (of 160) at step 9 of 9."""
    return replace(config, clip_model=name, loss_function=loss).with_overrides(
        {
            "augmentation.image_strength": 0.5,
            "augmentation.rand_augment": True,
            "augmentation.erasing": True,
            "augmentation.caption": "uniform",
            "training.batch_size": 20,
            "training.micro_batch_size": 8,
            "loss.positives": "all",
            "optimizer.ema_decay": 0.9,
            "optimizer.layer_decay": 0.9,
            "model.patch_dropout": 0.25,
            "training.stage_examples": 60,
            "training.budget_examples": 180,
            "training.shuffle_buffer": 50,
        }
    )


def started(config: ProjectConfig, run: Path, **options: Any) -> "subprocess.Popen[bytes]":
    """The run as a process of its own, begun on the command line, when it has reported its first stage."""
    settings = {path: value for path, value in config.to_dict().items() if value is not None and path != "dataset_root"}
    command = [sys.executable, "-m", "fashionclip_tune", "train", "--resume"]
    command += ["--data", str(config.dataset_dir), "--out", str(run)]
    for path, value in {**settings, "model.pretrained": "none", "should_load_checkpoint": "false"}.items():
        command += ["--set", f"{path}={str(value).lower() if isinstance(value, bool) else value}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    first_stage = run / "evaluations" / "step_00000003.json"
    deadline = time.monotonic() + 120
    while not first_stage.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    return process
