"""What a Ray worker runs: one trial, through the same ``train`` as everyone else."""

import gc
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from ray import tune

from fashionclip_tune.config import ProjectConfig
from fashionclip_tune.errors import BadDataError, DivergedError, OutOfMemoryError, StoppedError
from fashionclip_tune.history import Row
from fashionclip_tune.training import train
from fashionclip_tune.tuning.engine import TrialPlan
from fashionclip_tune.tuning.stop_signal import INTERRUPTED, StopPoll
from fashionclip_tune.tuning.study import METRIC


def run_trial(ray_config: dict[str, Any]) -> None:
    """Starts or continues a trial in its folder and reports each evaluation.

    Ray stops it by SystemExit out of ``tune.report``. How a trial fails of itself is reported like a result, so that Ray
    retries only what it should: a process that died.
    """
    plan = TrialPlan.from_ray(ray_config)
    trial_dir = Path(plan.trial_dir)
    trial_dir.mkdir(parents=True, exist_ok=True)
    reported = {"examples_seen": 0, METRIC: 0.0}

    def report(row: Row) -> None:
        reported.update(row)
        tune.report(dict(row))

    def log_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        with open(trial_dir / "warnings.log", "a") as file:  # nobody sees a worker's own output
            file.write(f"{message}\n")

    # What the actor's last trial left is freed now: its traceback held on to it until it was gone.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    # A worker may outlive its driver for seconds: its successor waits until it is gone.
    with FileLock(trial_dir / ".lock"), warnings.catch_warnings():
        warnings.showwarning = log_warning
        stop_reason, message = "", ""
        try:
            config = ProjectConfig.from_dict(plan.config)
            train(config, trial_dir, on_eval=report, resume_from=trial_dir, should_stop=StopPoll())
        except StoppedError as error:
            stop_reason, message = INTERRUPTED, str(error)
        except DivergedError as error:
            stop_reason, message = "diverged", str(error)
        except BadDataError as error:
            stop_reason, message = "bad_data", str(error)
        except OutOfMemoryError as error:
            stop_reason, message = "out_of_memory", str(error)
        except Exception as error:
            (trial_dir / "error.log").write_text(traceback.format_exc())
            stop_reason, message = "error", f"{type(error).__name__}: {error} (see {trial_dir / 'error.log'})"
        if stop_reason:
            tune.report({**reported, "stop_reason": stop_reason, "message": message})
