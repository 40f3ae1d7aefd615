#!/usr/bin/env python
"""sweeps/run_sweep.py, with trials that note each step in ``SWEEP.steps``: ``counted_sweep.py {toy,real} WORKERS FLAGS``.

For kill_sweep.py, which starts and kills it. ``toy`` trains nothing: a number that forgets no step stands for the model. Real
trials have WORKERS loader processes each, where the sweep itself would cut them to the cores.
"""

import functools
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fashionclip_tune.files import write_json
from fashionclip_tune.models.openclip import load_model
from fashionclip_tune.storage.checkpoint import newest_checkpoint, save_checkpoint
from fashionclip_tune.training.callbacks import RunCallbacks
from fashionclip_tune.training.history import History
from fashionclip_tune.training.trainer import Trainer

_SCRIPT = Path(__file__).parents[2] / "sweeps" / "run_sweep.py"
_TOY_STEP_S = 0.02


def toy_train(config: Any, out_dir: Path, callbacks: RunCallbacks, *, resume_from: Path) -> None:
    """In place of ``run_training``: the same files in the same order, but a step is one of a chaotic map."""
    started, training = time.perf_counter(), config.training
    stage_steps, total_steps = (n // training.batch_size for n in (training.stage_examples, training.budget_examples))
    weights = dict(load_model(config).network.state_dict())
    found, refused = newest_checkpoint(resume_from)
    assert not refused, refused
    state = found.training_state() if found else {"step": 0, "optimizer": torch.tensor(0.3 + training.learning_rate).double()}
    rows = list(found.record["history"]) if found else []
    step, value = state["step"], state["optimizer"]

    def row() -> dict[str, Any]:
        recall = float(value) * 0.1 - abs(float(torch.tensor(training.learning_rate).log10()) + 3) / 5 + 0.8
        figures = {"recall_at_10": recall, "recall_at_5": recall / 2, "protocol": "instance"}
        counts = {"num_gallery_images": 1, "num_gallery_texts": 1, "duration_s": time.perf_counter() - started}
        counts["device_s"] = counts["duration_s"]
        speed = {"samples_per_second": training.batch_size / _TOY_STEP_S} if step else {}  # what later plans go by
        return {"step": step, "examples_seen": step * training.batch_size, **figures, **counts, **speed}

    write_json(out_dir / "config.json", config.to_dict())
    history = History(out_dir, first_new_examples=rows[-1]["examples_seen"] if rows else 0)
    rows = rows or [row()]
    while True:
        difference = history.record(rows[-1])
        assert difference is None, difference
        callbacks.on_evaluation(dict(rows[-1]))
        if step == total_steps:
            break
        for _ in range(stage_steps):
            time.sleep(_TOY_STEP_S)
            value = 3.99 * value * (1 - value)
            step += 1
            log_step(out_dir, step)
        rows.append(row())
        state = {"step": step, "micro_batch_size": 1, "stage": {}, "optimizer": value, "scaler": {}, "raw_weights": {}}
        record = {"step": step, "fingerprint": "toy", "config": {}, "history": rows, "duration_s": 0.0}
        save_checkpoint(out_dir / "checkpoints", weights, state, record)
    history.close()


def log_step(trial_dir: Path, step: int) -> None:
    """Beside the sweep, one short line: appended whole or not at all."""
    with open(trial_dir.parents[1].with_suffix(".steps"), "a") as file:
        file.write(f"{time.time()} {trial_dir.name[:4]} {step}\n")


def toy_trial(ray_config: dict[str, Any]) -> None:
    from fashionclip_tune.tuning.backend import worker as trainable

    trainable.run_training = toy_train  # type: ignore[attr-defined]
    trainable.run_trial(ray_config)


def real_trial(ray_config: dict[str, Any], workers: int) -> None:
    """The trial as it is, its steps noted down; the number of loader processes changes no bit of it."""
    from fashionclip_tune.tuning.backend import worker as trainable

    plan = json.loads(ray_config["plan"])
    trial_dir = Path(plan["trial_dir"])
    plan["config"]["training.num_workers"] = workers
    attempt_step = Trainer._attempt_step

    def noted(self: Trainer, batch: Any) -> None:
        attempt_step(self, batch)
        log_step(trial_dir, self.step)

    Trainer._attempt_step = noted
    try:
        trainable.run_trial({**ray_config, "plan": json.dumps(plan)})
    finally:
        Trainer._attempt_step = attempt_step


def drive(toy: bool, workers: int, arguments: list[str]) -> None:
    """sweeps/run_sweep.py in this process, with a trainable whose steps are counted."""
    from fashionclip_tune.tuning import session as driver
    from fashionclip_tune.tuning.backend.runner import run_trials

    def trial(ray_config: dict[str, Any]) -> None:
        real_trial(ray_config, workers)

    driver.run_trials = functools.partial(run_trials, trainable=toy_trial if toy else trial)  # type: ignore[attr-defined]
    script = importlib.util.spec_from_file_location("run_sweep", _SCRIPT)
    assert script is not None
    assert script.loader is not None
    module = importlib.util.module_from_spec(script)
    script.loader.exec_module(module)
    sys.argv = ["run_sweep.py", *arguments]
    module.main()


if __name__ == "__main__":
    drive(sys.argv[1] == "toy", int(sys.argv[2]), sys.argv[3:])
