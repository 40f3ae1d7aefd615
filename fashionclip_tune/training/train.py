"""Assembles a run from a configuration: ``run_training`` for the package itself, ``train`` and ``training_prep`` for users."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.dataset import run_shards
from fashionclip_tune.errors import OutOfMemoryError, UserError
from fashionclip_tune.evaluation.evaluate import counted_as, coverage_line, gain
from fashionclip_tune.models.named_model import starting_point, use_zero_shot
from fashionclip_tune.models.precision import plan_precision
from fashionclip_tune.progress import phase_bars
from fashionclip_tune.storage.checkpoint import best_checkpoint, newest_checkpoint
from fashionclip_tune.training.callbacks import OnEval, RunCallbacks, TrainResult
from fashionclip_tune.training.device import ran_out_of_memory, repeatable
from fashionclip_tune.training.history import Row, read_history
from fashionclip_tune.training.run import Run
from fashionclip_tune.training.stop_request import StopRequest


def train(
    config: ProjectConfig,
    out_dir: Path | str,
    *,
    on_eval: OnEval | None = None,
    resume_from: Path | str | None = None,
    keep_best: bool = False,
) -> TrainResult:
    """Fine-tunes as ``config`` says, evaluating before the first step and after each stage.

    Writes below ``out_dir``: ``config.json``, ``evaluations/`` (a JSON file each, and all of them in ``training_log.csv``, in
    the columns of the published runs), ``checkpoints/`` (the last two), TensorBoard events and, where photos could not be
    read, ``bad_samples.csv``. A stage ends with its evaluation, a checkpoint, its record and ``on_eval(row)``, in this order.
    SIGTERM ends the run at the next step with a checkpoint, if this is the main thread (a second one acts as ever).

    Args:
        config: the run; ``config.dataset_dir`` holds the shards.
        out_dir: a folder without a run in it, or the one that is resumed.
        on_eval: called with each row, a flat dict with ``step``, ``examples_seen``, ``recall_at_10`` and more. When it
            raises (SystemExit included), the run ends with a checkpoint of the stage just finished. A resumed run calls
            it again with its checkpoint's row, which its last life may not have got round to.
        resume_from: a run's folder (its newest whole checkpoint is used, or none if there is none) or one checkpoint.
        keep_best: ``checkpoints/best_NNNNNNNN/`` has the weights of the step with the highest recall_at_10, without a
            training state. A maximum over noisy evaluations flatters: trials are ranked by their last one.

    Raises:
        UserError: a wrong configuration, missing data or weights, or a checkpoint of another run.
        DivergedError: the loss is not a finite number any more.
        BadDataError: too many samples cannot be read.
        OutOfMemoryError: even one photo at a time does not fit the device, or the evaluation does not.
        StoppedError: SIGTERM came; ``resume_from=out_dir`` goes on from the very step.
    """
    callbacks = RunCallbacks(on_evaluation=on_eval) if on_eval is not None else RunCallbacks()
    return run_training(config, out_dir, callbacks, resume_from=resume_from, keep_best=keep_best)


def run_training(
    config: ProjectConfig,
    out_dir: Path | str,
    callbacks: RunCallbacks,
    *,
    resume_from: Path | str | None = None,
    keep_best: bool = False,
) -> TrainResult:
    """``train`` for callers that watch, stop or copy the run; raises as it does, and what the callbacks raise."""
    out_dir = Path(out_dir).absolute()
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir} is a file: give a folder for the run")
    if config.hardware.threads is not None:
        torch.set_num_threads(config.hardware.threads)
    plan = plan_precision(config)
    source = Path(resume_from).absolute() if resume_from is not None else None
    goes_on_here = source is not None and source.is_relative_to(out_dir)
    if not goes_on_here and (read_history(out_dir) or newest_checkpoint(out_dir) != (None, [])):
        raise UserError(f"{out_dir} holds a run already: give another folder, or resume it (resume_from=the folder)")
    stop, too_small = StopRequest(callbacks.should_stop), ""
    is_repeatable = plan.device.type == "cuda" and config.hardware.deterministic
    with stop.listening(), repeatable(is_repeatable, plan.device):
        try:
            callbacks = replace(callbacks, should_stop=stop.received)
            return Run(config, out_dir, plan, callbacks, resume_from=source, keep_best=keep_best).run()
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            too_small = str(error).splitlines()[0]
    # Outside of the handler: the error's traceback would keep the run's tensors alive as long as the new error is.
    raise OutOfMemoryError(f"{plan.device} has too little memory to hold the model and its optimizer: {too_small}")


@dataclass(frozen=True)
class PreparedTraining:
    """A run that has been checked and can be started."""

    config: ProjectConfig

    def train(self) -> TrainResult:
        """Runs in ``config.base_path`` (its ``checkpoints/`` and ``evaluations/``), printing each evaluation.

        ``checkpoints/best_NNNNNNNN/`` has the weights of the best one.
        """
        with phase_bars() as on_phase:
            callbacks = RunCallbacks(on_evaluation=print_row, on_progress=on_phase)
            result = run_training(self.config, self.config.base_path, callbacks, keep_best=True)
        print("\n".join([*outcome_lines(self.config, result), f"best weights: {best_checkpoint(result.out_dir)}"]), flush=True)
        return result


def training_prep(config: ProjectConfig) -> PreparedTraining:
    """Checks that a configuration's data is there and its model known; the published entry point.

    Raises:
        UserError: on Colab without a mounted Drive, or shards that are not there.
    """
    if config.on_colab and not config.base_path.parent.is_dir():
        raise UserError(
            f"on_colab is set but {config.base_path.parent} is not there: mount Google Drive first "
            '(from google.colab import drive; drive.mount("/content/drive"))'
        )
    run_shards(config)
    return PreparedTraining(config)


def print_row(row: Row) -> None:
    """One line an evaluation."""
    loss = "  (zero-shot weights)"
    if "loss" in row:
        loss = f"  loss {row['loss']:.4f}  {row['samples_per_second']:,.0f} examples/s"
    print(
        f"step {row['step']:>6}  {row['examples_seen']:>9,} examples  recall_at_10 {row['recall_at_10']:.4f}  "
        f"recall_at_5 {row['recall_at_5']:.4f}{loss}",
        flush=True,
    )


def outcome_lines(config: ProjectConfig, result: TrainResult) -> list[str]:
    """The last evaluation beside zero-shot, and which weights to use where training has made them worse."""
    zero_shot, last = (row["recall_at_10"] for row in (result.history[0], result.metrics))
    lines = [f"recall_at_10 {last:.4f}: {counted_as(result.metrics)}; zero-shot {zero_shot:.4f}, {gain(last, zero_shot)}"]
    if (asked := coverage_line(result.metrics)) is not None:
        lines.append(asked)
    if last < zero_shot:
        start = starting_point(config)
        lines.append(use_zero_shot(start.model_name, start.model.pretrained))
    return lines
