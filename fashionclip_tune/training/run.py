"""One life of a run: stages of training, each evaluated, saved and reported."""

import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.batches import TrainBatch, copy_first_shards
from fashionclip_tune.data.dataset import BadSamples, cached_index, leaking_products, run_shards, storage_of, write_bad_samples
from fashionclip_tune.data.index import BadSample, gaps_in_captions
from fashionclip_tune.data.loader import train_loader
from fashionclip_tune.data.tokens import occurring_tokens
from fashionclip_tune.errors import StoppedError
from fashionclip_tune.evaluation.evaluate import Metrics
from fashionclip_tune.evaluation.protocols import QUERIES_FILE, save_retrieval
from fashionclip_tune.files import write_json
from fashionclip_tune.models.named_model import starting_point
from fashionclip_tune.models.openclip import load_model, load_weights, tokenizer_name
from fashionclip_tune.models.precision import PrecisionPlan
from fashionclip_tune.models.token_rows import plain_state, untrained_tables, use_token_rows
from fashionclip_tune.storage.checkpoint import Checkpoint, checkpoint_bytes, save_best, save_checkpoint, tables_to_save
from fashionclip_tune.training.callbacks import RunCallbacks, TrainResult
from fashionclip_tune.training.evaluator import RunEvaluator, memory_in_use
from fashionclip_tune.training.history import DeviceTime, History, Row, write_training_log
from fashionclip_tune.training.resume import checkpoint_to_resume
from fashionclip_tune.training.stop_request import children_without_sigterm
from fashionclip_tune.training.trainer import StageStats, Trainer

# Cosine similarities of real models lie tenths apart; those of one that says the same of everything, rounding errors.
_COLLAPSED_SPREAD = 1e-4


@dataclass(frozen=True)
class RunPlan:
    """How long a run is and how often it is evaluated, in optimizer steps."""

    total_steps: int
    stage_steps: int


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


class Run:
    """One life of a run: from its first step or its checkpoint to its end."""

    def __init__(
        self,
        config: ProjectConfig,
        out_dir: Path,
        plan: PrecisionPlan,
        callbacks: RunCallbacks,
        *,
        resume_from: Path | None,
        keep_best: bool,
    ) -> None:
        self._started = time.perf_counter()
        self._out_dir = out_dir
        self._plan = plan
        self._callbacks = callbacks
        self._keep_best = keep_best
        self._synced_step = 0
        self._is_ending = False
        shards, storage, on_phase = run_shards(config), storage_of(config), callbacks.on_progress
        self._index, self._valid = (
            cached_index(some, storage, on_progress=partial(on_phase, "indexing shards"))
            for some in (shards.train, shards.valid)
        )
        if leaking := leaking_products(self._index, self._valid):
            warnings.warn(
                f"{len(leaking)} products are in both training and evaluation, such as {leaking[0]!r}: the metrics flatter",
                stacklevel=4,
            )
        if (gaps := gaps_in_captions(self._index, self._valid)) is not None:
            warnings.warn(gaps, stacklevel=4)
        self._bad = BadSamples(self._index, config.training.max_bad_share)
        self._loaded = load_model(starting_point(config))
        data = f"{self._index.fingerprint}:{self._valid.fingerprint}"
        weights = f"{self._loaded.weights_fingerprint}:{self._loaded.preprocessing}"
        found: Checkpoint | None = None
        if resume_from is not None:
            network = self._loaded.network
            found, config = checkpoint_to_resume(resume_from, config, data=data, weights=weights, network=network)
        tokenizer, on_tokens = self._loaded.tokenizer, partial(on_phase, "finding the tokens of all captions")
        use_token_rows(
            self._loaded.network,
            config,
            lambda: occurring_tokens(self._index, tokenizer, storage, on_progress=on_tokens),
        )
        self._config = config
        self._fingerprint = config.fingerprint(data=data, weights=weights)
        self._rows: list[Row] = []
        self._earlier_s = 0.0
        self._device_time = DeviceTime(out_dir, config.hardware.device_share)
        self._checkpoint: Path | None = None
        self._checkpoint_step = 0
        self._checkpoint_time = time.monotonic()
        self._run_plan = plan_run(config, len(self._index))
        self._trainer = Trainer(self._loaded, config, self._run_plan.total_steps, plan)
        self._evaluator = RunEvaluator(config, shards, self._loaded, plan, self._trainer.free_gradients, on_phase)
        if found is not None:
            self._restore(found)
        if resume_from is not None:
            self._device_time.go_on(found.record["device_s"] if found is not None else 0.0)

    def _restore(self, resumed: Checkpoint) -> None:
        load_weights(self._trainer.network, resumed.weights_file)
        self._trainer.load_state_dict(resumed.training_state())
        self._rows = list(resumed.record["history"])
        self._earlier_s = resumed.record["duration_s"]
        self._checkpoint, self._checkpoint_step = resumed.folder, resumed.step

    def run(self) -> TrainResult:
        total_steps, trainer = self._run_plan.total_steps, self._trainer
        with ExitStack() as stack:
            with children_without_sigterm():
                # First of all: it refuses a batch larger than the data before anything is written.
                batches = stack.enter_context(
                    train_loader(
                        self._config,
                        self._index,
                        self._loaded.preprocessing,
                        self._loaded.tokenizer,
                        first_step=trainer.step,
                        total_steps=total_steps,
                        pin_memory=self._plan.device.type == "cuda",
                    )
                )
            copy_first_shards(self._config, self._index, self._valid, self._on_copying, step=trainer.step)
            write_json(self._out_dir / "config.json", self._config.to_dict())
            last_row_examples = self._rows[-1]["examples_seen"] if self._rows else 0
            history = History(self._out_dir, first_new_examples=last_row_examples)
            stack.callback(history.close)
            stack.callback(lambda: write_bad_samples(self._out_dir / "bad_samples.csv", self._bad_samples()))
            if not self._rows:
                with self._device_time.counting():
                    zero_shot = self._evaluator.zero_shot()
                self._rows.append(self._row(zero_shot, None))
            self._report(self._rows[-1], history)
            while trainer.step < total_steps:
                stage_steps = self._run_plan.stage_steps
                stage_end = min(trainer.step - trainer.step % stage_steps + stage_steps, total_steps)
                with self._device_time.counting():
                    stats = trainer.run_stage(batches, stage_end - trainer.step, self._on_batch, self._should_pause)
                if stats is None:
                    self._sync()
                    if self._is_ending:
                        self._end_before_time()
                    continue
                with trainer.averaged(), self._device_time.counting():
                    metrics = self._evaluator.evaluate()
                self._rows.append(self._row(metrics, stats))
                self._warn_of_collapse()
                if self._keep_best and self._is_best():
                    with trainer.averaged():
                        save_best(self._out_dir / "checkpoints", plain_state(trainer.network), self._record())
                if self._checkpoint_is_due():
                    self._save_checkpoint()
                if self._is_sync_due():
                    self._sync()
                self._report(self._rows[-1], history)
        assert self._checkpoint is not None
        return TrainResult(self._out_dir, self._checkpoint, tuple(self._rows), self._bad_samples())

    def _bad_samples(self) -> tuple[BadSample, ...]:
        return tuple(dict.fromkeys([*self._bad.found.values(), *self._evaluator.bad_samples]))

    def _on_batch(self, batch: TrainBatch) -> None:
        self._bad.add(batch.bad)

    def _report(self, row: Row, history: History) -> None:
        if (retrieval := self._evaluator.retrieval) is not None:
            save_retrieval(self._out_dir / QUERIES_FILE, retrieval, step=row["step"], data=self._valid.fingerprint)
        history.show(self._evaluator.answer_sheet(), memory_in_use(self._plan.device), row["examples_seen"])
        difference = history.record(row)
        write_training_log(self._config, self._out_dir, self._rows)
        if difference:
            message = f"a stage that was trained again came out otherwise: {difference}"
            if self._plan.device.type == "cpu":
                message += " (same machine type, library versions and hardware.threads give equal numbers)"
            warnings.warn(message, stacklevel=2)
        try:
            self._callbacks.on_evaluation(dict(row))
        except BaseException:
            self._save_checkpoint_unless_there()
            raise

    def _on_copying(self, done: int, total: int) -> None:
        self._callbacks.on_progress("copying shards", done, total)
        if self._callbacks.should_stop():
            self._end_before_time()

    def _should_pause(self) -> bool:
        self._callbacks.on_progress("training", self._trainer.step, self._run_plan.total_steps)
        self._is_ending = self._is_ending or self._callbacks.should_stop()
        return self._is_ending or self._is_sync_due()

    def _is_sync_due(self) -> bool:
        return self._trainer.step > self._synced_step and self._callbacks.wants_checkpoint()

    def _sync(self) -> None:
        self._save_checkpoint_unless_there()
        if self._checkpoint is not None:
            self._callbacks.on_checkpoint(self._checkpoint)
            self._synced_step = self._trainer.step

    def _end_before_time(self) -> NoReturn:
        raise StoppedError(
            f"asked to end, after {self._trainer.step} of {self._run_plan.total_steps} steps; "
            f"{self._checkpoint or self._out_dir} can be resumed from"
        )

    def _save_checkpoint_unless_there(self) -> None:
        if self._trainer.step != self._checkpoint_step:
            self._save_checkpoint()

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
        return {**row, "duration_s": self._duration_s(), "device_s": self._device_time.seconds}

    def _duration_s(self) -> float:
        """Of all lives of the run."""
        return self._earlier_s + time.perf_counter() - self._started

    def _checkpoint_is_due(self) -> bool:
        is_last = self._trainer.step == self._run_plan.total_steps
        age_s = time.monotonic() - self._checkpoint_time
        return is_last or age_s >= 60 * self._config.training.checkpoint_minutes

    def _is_best(self) -> bool:
        """Whether the last evaluation is above all others of trained weights."""
        *others, last = (row["recall_at_10"] for row in self._rows[1:])
        return all(last > other for other in others)

    def _record(self) -> dict[str, Any]:
        return {
            "step": self._trainer.step,
            "fingerprint": self._fingerprint,
            "config": self._config.to_dict(),
            "preprocessing": vars(self._loaded.preprocessing),
            "tokenizer": tokenizer_name(self._loaded),
            "model_config": self._loaded.model_config,
            "card": self._loaded.card,
            "history": self._rows,
            "duration_s": self._duration_s(),
            "device_s": self._device_time.seconds,
        }

    def _save_checkpoint(self) -> None:
        training_state, checkpoints = self._trainer.state_dict(), self._out_dir / "checkpoints"
        tables = tables_to_save(checkpoints, untrained_tables(self._trainer.network))
        with self._trainer.averaged():
            weights = self._trainer.network.state_dict()
            with self._callbacks.reserve_space(checkpoint_bytes({**weights, **tables}, training_state)):
                self._checkpoint = save_checkpoint(checkpoints, weights, training_state, self._record(), tables)
        self._checkpoint_step = self._trainer.step
        self._checkpoint_time = time.monotonic()
