"""Assembles a run from a configuration. ``train`` is the one entry point of notebook, command line and trial alike."""

import json
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from fashionclip_tune.checkpoint import Checkpoint, newest_checkpoint, save_checkpoint, weights_at
from fashionclip_tune.config import ProjectConfig, override_paths
from fashionclip_tune.data import (
    BadSamples,
    RunShards,
    TrainBatch,
    cached_index,
    leaking_products,
    run_shards,
    storage_of,
    write_bad_samples,
)
from fashionclip_tune.errors import OutOfMemoryError, StoppedError, UserError
from fashionclip_tune.evaluate import Evaluation, Metrics, cached_zero_shot, evaluate
from fashionclip_tune.evaluation_set import evaluation_set
from fashionclip_tune.files import write_json
from fashionclip_tune.history import History, Row, read_history
from fashionclip_tune.index import BadSample
from fashionclip_tune.loader import train_loader
from fashionclip_tune.model import load_model, load_weights, tokenizer_name
from fashionclip_tune.oom import ran_out_of_memory
from fashionclip_tune.precision import PrecisionPlan, plan_precision
from fashionclip_tune.protocols import QUERIES_FILE, Retrieval, save_retrieval
from fashionclip_tune.stopping import StopRequest, children_without_sigterm
from fashionclip_tune.trainer import StageStats, Trainer

OnEval = Callable[[Row], None]

# Cosine similarities of real models lie tenths apart; those of one that says the same of everything, rounding errors.
_COLLAPSED_SPREAD = 1e-4


@dataclass(frozen=True)
class RunPlan:
    """How long a run is and how often it is evaluated, in optimizer steps."""

    total_steps: int
    stage_steps: int


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves. ``history`` has a row an evaluation, the untouched weights (step 0) first."""

    out_dir: Path
    checkpoint: Path
    history: tuple[Row, ...]
    bad_samples: tuple[BadSample, ...]
    """Which photos, to train or to evaluate on, could not be read, and why."""

    @property
    def metrics(self) -> Row:
        """Of the last evaluation."""
        return self.history[-1]


def plan_run(config: ProjectConfig, num_train: int) -> RunPlan:
    """Steps from ``budget_examples``, else ``max_steps``, else ``epochs`` over ``num_train`` photos."""
    training = config.training
    if training.budget_examples is not None:
        total_steps = training.budget_examples // training.batch_size
    elif training.max_steps is not None:
        total_steps = training.max_steps
    else:
        total_steps = max(1, training.epochs * num_train // training.batch_size)
    if training.stage_examples is not None:
        return RunPlan(total_steps, training.stage_examples // training.batch_size)
    return RunPlan(total_steps, training.checkpoint_interval)


def train(
    config: ProjectConfig, out_dir: Path | str, *, on_eval: OnEval | None = None, resume_from: Path | str | None = None
) -> TrainResult:
    """Fine-tunes as ``config`` says, evaluating before the first step and after each stage.

    Writes below ``out_dir``: ``config.json``, ``evaluations/`` (a JSON file each), ``checkpoints/`` (the last two),
    TensorBoard events and, where photos could not be read, ``bad_samples.csv``. A stage ends with its evaluation, a
    checkpoint, its record and ``on_eval(row)``, in this order.
    SIGTERM ends the run at the next step with a checkpoint, if this is the main thread (a second one acts as ever).

    Args:
        config: the run; ``config.dataset_dir`` holds the shards.
        out_dir: a folder without a run in it, or the one that is resumed.
        on_eval: called with each row, a flat dict with ``step``, ``examples_seen``, ``recall_at_10`` and more. When it
            raises (SystemExit included), the run ends with a checkpoint of the stage just finished. A resumed run calls
            it again with its checkpoint's row, which its last life may not have got round to.
        resume_from: a run's folder (its newest whole checkpoint is used, or none if there is none) or one checkpoint.

    Raises:
        UserError: a wrong configuration, missing data or weights, or a checkpoint of another run.
        DivergedError: the loss is not a finite number any more.
        BadDataError: too many samples cannot be read.
        OutOfMemoryError: even one photo at a time does not fit the device, or the evaluation does not.
        StoppedError: SIGTERM came; ``resume_from=out_dir`` goes on from the very step.
    """
    out_dir = Path(out_dir).absolute()
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir} is a file: give a folder for the run")
    if config.hardware.threads is not None:
        torch.set_num_threads(config.hardware.threads)
    plan = plan_precision(config)
    shards = run_shards(config)
    source = Path(resume_from).absolute() if resume_from is not None else None
    resumed, refused = newest_checkpoint(source) if source is not None else (None, [])
    for reason in refused:
        warnings.warn(f"passed over: {reason}", stacklevel=2)
    goes_on_here = source is not None and source.is_relative_to(out_dir)
    if not goes_on_here and (read_history(out_dir) or newest_checkpoint(out_dir) != (None, [])):
        raise UserError(f"{out_dir} holds a run already: give another folder, or resume it (resume_from=the folder)")
    if goes_on_here and resumed is None and (out_dir / "config.json").is_file():  # killed before its first checkpoint
        _check_same(json.loads((out_dir / "config.json").read_text()), config, out_dir)
    stop, too_small = StopRequest(), ""
    with stop.listening():
        try:
            return _Run(config, out_dir, plan, shards, resumed, stop).run(on_eval or (lambda row: None))
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            too_small = str(error).splitlines()[0]
    # Outside of the handler: the error's traceback would keep the run's tensors alive as long as the new error is.
    raise OutOfMemoryError(f"{plan.device} has too little memory to hold the model and its optimizer: {too_small}")


class _Run:
    """One life of a run: from its first step or its checkpoint to its end."""

    def __init__(
        self,
        config: ProjectConfig,
        out_dir: Path,
        plan: PrecisionPlan,
        shards: RunShards,
        resumed: Checkpoint | None,
        stop: StopRequest,
    ) -> None:
        self._started = time.perf_counter()
        self._config = config
        self._out_dir = out_dir
        self._plan = plan
        self._shards = shards
        self._stop = stop
        self._storage = storage_of(config)
        self._index = cached_index(shards.train, self._storage)
        valid = cached_index(shards.valid, self._storage)
        if leaking := leaking_products(self._index, valid):
            warnings.warn(
                f"{len(leaking)} products are in both training and evaluation, such as {leaking[0]!r}: the metrics flatter",
                stacklevel=4,
            )
        self._bad = BadSamples(self._index, config.training.max_bad_share)
        self._evaluation_bad: dict[BadSample, None] = {}
        self._retrieval: Retrieval | None = None
        self._loaded = load_model(_starting_point(config))
        self._fingerprint = config.fingerprint(
            data=f"{self._index.fingerprint}:{valid.fingerprint}",
            weights=f"{self._loaded.weights_fingerprint}:{self._loaded.preprocessing}",
        )
        self._rows: list[Row] = []
        self._earlier_s = 0.0
        self._checkpoint: Path | None = None
        self._checkpoint_step = 0
        self._checkpoint_time = time.monotonic()
        self._run_plan = plan_run(config, len(self._index))
        self._trainer = Trainer(self._loaded, config, self._run_plan.total_steps, plan)
        if resumed is not None:
            self._restore(resumed)

    def _restore(self, resumed: Checkpoint) -> None:
        if resumed.record["fingerprint"] != self._fingerprint:
            _check_same(resumed.record["config"], self._config, resumed.folder)
            raise UserError(f"{resumed.folder} is of another run: its data or its first weights have changed")
        load_weights(self._trainer.network, resumed.weights_file)
        self._trainer.load_state_dict(resumed.training_state())
        self._rows = list(resumed.record["history"])
        self._earlier_s = resumed.record["duration_s"]
        self._checkpoint, self._checkpoint_step = resumed.folder, resumed.step

    def run(self, on_eval: OnEval) -> TrainResult:
        total_steps, trainer = self._run_plan.total_steps, self._trainer
        with ExitStack() as stack:
            with children_without_sigterm():
                # First of all: it refuses a batch larger than the data before anything is written.
                batches = stack.enter_context(
                    train_loader(
                        self._config,
                        self._index,
                        self._loaded,
                        first_step=trainer.step,
                        total_steps=total_steps,
                        pin_memory=self._plan.device.type == "cuda",
                    )
                )
            write_json(self._out_dir / "config.json", self._config.to_dict())
            last_row_examples = self._rows[-1]["examples_seen"] if self._rows else 0
            history = History(self._out_dir, first_new_examples=last_row_examples)
            stack.callback(history.close)
            stack.callback(lambda: write_bad_samples(self._out_dir / "bad_samples.csv", self._bad_samples()))
            if not self._rows:
                self._rows.append(self._row(self._zero_shot(), None))
            self._report(self._rows[-1], history, on_eval)
            while trainer.step < total_steps:
                stage_steps = self._run_plan.stage_steps
                stage_end = min(trainer.step - trainer.step % stage_steps + stage_steps, total_steps)
                stats = trainer.run_stage(batches, stage_end - trainer.step, self._on_batch, lambda: self._stop.received)
                if stats is None:
                    self._end_before_time()
                self._rows.append(self._row(self._evaluate(), stats))
                self._warn_of_collapse()
                if self._checkpoint_is_due():
                    self._save_checkpoint()
                self._report(self._rows[-1], history, on_eval)
        assert self._checkpoint is not None
        return TrainResult(self._out_dir, self._checkpoint, tuple(self._rows), self._bad_samples())

    def _bad_samples(self) -> tuple[BadSample, ...]:
        return tuple(dict.fromkeys([*self._bad.found.values(), *self._evaluation_bad]))

    def _on_batch(self, batch: TrainBatch) -> None:
        self._bad.add(batch.bad)

    def _report(self, row: Row, history: History, on_eval: OnEval) -> None:
        if self._retrieval is not None:
            data = cached_index(self._shards.valid, self._storage).fingerprint
            save_retrieval(self._out_dir / QUERIES_FILE, self._retrieval, step=row["step"], data=data)
        if difference := history.record(row):
            message = f"a stage that was trained again came out otherwise: {difference}"
            if self._plan.device.type == "cpu":
                message += " (same machine type, library versions and hardware.threads give equal numbers)"
            warnings.warn(message, stacklevel=2)
        try:
            on_eval(dict(row))
        except BaseException:
            self._save_checkpoint_unless_there()
            raise

    def _end_before_time(self) -> NoReturn:
        self._save_checkpoint_unless_there()
        raise StoppedError(
            f"asked to end (SIGTERM), after {self._trainer.step} of {self._run_plan.total_steps} steps; "
            f"{self._checkpoint or self._out_dir} can be resumed from"
        )

    def _save_checkpoint_unless_there(self) -> None:
        if self._trainer.step != self._checkpoint_step:
            self._save_checkpoint()

    def _zero_shot(self) -> Metrics:
        return self._recalls(cached_zero_shot)

    def _evaluate(self) -> Metrics:
        with self._trainer.averaged():
            return self._recalls(evaluate)

    def _recalls(self, measure: Callable[..., Evaluation]) -> Metrics:
        metrics: Metrics = {}
        for prefix, shards in (("train_", self._shards.train_eval), ("", self._shards.valid)):
            if shards:
                photos = evaluation_set(shards, self._loaded.preprocessing, self._storage)
                measured = self._within_memory(
                    partial(measure, self._loaded, photos, protocol=self._config.evaluation.protocol)
                )
                metrics |= {prefix + name: value for name, value in measured.metrics.items()}
                self._evaluation_bad |= dict.fromkeys(measured.bad_samples)
                self._retrieval = measured.retrieval  # the validation set's is the last one
        return metrics

    def _within_memory(self, measure: Callable[..., Evaluation]) -> Evaluation:
        """The evaluation's batch is fixed, or metrics would depend on the card: what else there is to free is freed once."""
        batch_size, reason = self._config.evaluation.batch_size, ""
        for _ in range(2):
            try:
                return measure(batch_size=batch_size, plan=self._plan, max_bad_share=self._config.training.max_bad_share)
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            self._trainer.free_gradients()
        raise OutOfMemoryError(
            f"out of memory in the evaluation, with evaluation.batch_size = {batch_size} ({reason}): start the run with a "
            "smaller one, which is then kept, so that all metrics are computed alike"
        )

    def _warn_of_collapse(self) -> None:
        spread = self._rows[-1].get("similarity_spread")
        if spread is not None and spread < _COLLAPSED_SPREAD:
            warnings.warn(
                f"the embeddings have collapsed by step {self._trainer.step}: all similarities lie within {spread:.2g}, so "
                "that nothing can be retrieved; a lower learning rate helps most often",
                stacklevel=2,
            )

    def _row(self, metrics: Metrics, stats: StageStats | None) -> Row:
        training = self._config.training
        row: Row = {
            "step": self._trainer.step,
            "examples_seen": self._trainer.step * training.batch_size,
            "epoch": self._trainer.step * training.batch_size / len(self._index),
            **metrics,
        }
        if stats is not None:
            row |= {name: value for name, value in vars(stats).items() if value is not None}
        return {**row, "duration_s": self._duration_s()}

    def _duration_s(self) -> float:
        """Of all lives of the run."""
        return self._earlier_s + time.perf_counter() - self._started

    def _checkpoint_is_due(self) -> bool:
        is_last = self._trainer.step == self._run_plan.total_steps
        age_s = time.monotonic() - self._checkpoint_time
        return is_last or age_s >= 60 * self._config.training.checkpoint_minutes

    def _save_checkpoint(self) -> None:
        record: dict[str, Any] = {
            "step": self._trainer.step,
            "fingerprint": self._fingerprint,
            "config": self._config.to_dict(),
            "preprocessing": vars(self._loaded.preprocessing),
            "tokenizer": tokenizer_name(self._loaded),
            "model_config": self._loaded.model_config,
            "history": self._rows,
            "duration_s": self._duration_s(),
        }
        training_state = self._trainer.state_dict()
        with self._trainer.averaged():
            weights = self._trainer.network.state_dict()
            self._checkpoint = save_checkpoint(self._out_dir / "checkpoints", weights, training_state, record)
        self._checkpoint_step = self._trainer.step
        self._checkpoint_time = time.monotonic()


def _starting_point(config: ProjectConfig) -> ProjectConfig:
    """``should_load_checkpoint`` starts from the weights of a file, an OpenCLIP folder or one of our checkpoints."""
    if not config.should_load_checkpoint:
        return config
    assert config.checkpoint_path is not None
    return config.with_overrides({"model.pretrained": str(weights_at(config.checkpoint_path))})


def _check_same(before: dict[str, Any], config: ProjectConfig, where: Path) -> None:
    now = config.to_dict()
    counted = override_paths(only_fingerprinted=True)
    changes = [f"{path} was {before[path]!r}, is {now[path]!r}" for path in counted if now[path] != before[path]]
    if changes:
        raise UserError(f"{where} is of another run: {'; '.join(changes)}")


@dataclass(frozen=True)
class PreparedTraining:
    """A run that has been checked and can be started."""

    config: ProjectConfig

    def train(self) -> TrainResult:
        """Runs in ``config.base_path`` (its ``checkpoints/`` and ``evaluations/``), printing each evaluation."""
        return train(self.config, self.config.base_path, on_eval=print_row)


def training_prep(config: ProjectConfig) -> PreparedTraining:
    """Checks that a configuration's data is there and its model known; the published entry point.

    Raises:
        UserError: on Colab without a mounted Drive, or shards that are not there.
    """
    if config.on_colab and not config.base_path.parent.is_dir():
        raise UserError(f"on_colab is set but {config.base_path.parent} is not there: mount Google Drive first")
    run_shards(config)
    return PreparedTraining(config)


def print_row(row: Row) -> None:
    """One line an evaluation."""
    loss = "  (untouched weights)"
    if "loss" in row:
        loss = f"  loss {row['loss']:.4f}  {row['samples_per_second']:,.0f} samples/s"
    print(
        f"step {row['step']:>6}  {row['examples_seen']:>9,} examples  recall_at_10 {row['recall_at_10']:.4f}  "
        f"recall_at_5 {row['recall_at_5']:.4f}{loss}",
        flush=True,
    )
