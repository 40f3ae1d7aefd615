"""How fast each model of a sweep trains here, and where that is known from."""

import hashlib
import json
import logging
import math
import platform
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.config.stored import EDITION_PATH, UNSAID
from fashionclip_tune.files import cache_dir, write_json
from fashionclip_tune.machine.gpus import T4, find_gpu
from fashionclip_tune.machine.hardware import available_cores
from fashionclip_tune.models.architecture import forward_flops, planned_network
from fashionclip_tune.profiling.probe import known_peak
from fashionclip_tune.profiling.roofline import Passes, evaluation_rate, passes_of, training_rate
from fashionclip_tune.profiling.throughput import known_pace
from fashionclip_tune.progress import progress_bar
from fashionclip_tune.training.callbacks import RunCallbacks
from fashionclip_tune.training.history import read_history
from fashionclip_tune.training.train import run_training
from fashionclip_tune.tuning.planning.forecast import ModelPace
from fashionclip_tune.tuning.planning.gpu_memory import autocast_dtype, is_described_here, photo_side

_log = logging.getLogger(__name__)

_MEASURED_FLOPS = 1e9  # of a photo and a caption: below, a short run takes seconds
_FORWARD_SHARE = 1 / 3  # of a training step's work: what an evaluation does; the backward pass takes two thirds
_DECODED_PER_SECOND = 487  # photos to evaluate on, by one core, as measured
_START_S = {"cpu": 1.0, "cuda": 20.0}
_MEASURED_EXAMPLES = 512


@dataclass(frozen=True)
class Measured:
    """What trials of one model have shown."""

    samples_per_second: float
    start_s: float
    evaluation_s: float

    def stage_s(self, stage_examples: int) -> float:
        return stage_examples / self.samples_per_second + self.evaluation_s


def model_paces(
    configs: Sequence[ProjectConfig],
    at_a_time: Callable[[ProjectConfig], int],
    *,
    num_valid: int,
    stated: float | None,
) -> list[ModelPace] | None:
    """Of each configuration, the best known: stated, of an earlier sweep, by ``probe``, measured now, estimated for the card.

    Where one configuration's is not measured it follows from the slowest of its model's that are, by what the two compute in a
    step; None where nothing is known of a model. Only small towers on a CPU are measured now, in a few seconds for each
    batch size, once.
    """
    by_kind: dict[Path, ModelPace | None] = {}
    measured: dict[str, list[tuple[float, ModelPace]]] = {}
    first: dict[tuple[Any, ...], ProjectConfig] = {}
    counts = [at_a_time(config) for config in configs]
    kinds = [_path(config, count, num_valid) for config, count in zip(configs, counts, strict=True)]
    for kind, config, count in zip(kinds, configs, counts, strict=True):
        training = config.training
        alone = first.setdefault((config.model_name, training.batch_size, training.micro_batch_size), config)
        if kind not in by_kind:
            by_kind[kind] = pace = _pace(config, alone, count, num_valid, stated)
            if pace is not None:
                measured.setdefault(config.model_name, []).append((_load(config, count), pace))
    found = []
    for kind, config, count in zip(kinds, configs, counts, strict=True):
        pace = by_kind[kind]
        if pace is None and config.model_name in measured:
            load, like = min(measured[config.model_name], key=lambda each: each[0] * each[1].samples_per_second)
            pace = replace(like, samples_per_second=like.samples_per_second * load / _load(config, count))
        if (pace := pace or _estimated(config, count, num_valid)) is None:
            return None
        found.append(pace)
    return found


def _step_work(config: ProjectConfig) -> float:
    """Of a training step, as a multiple of one with neither micro-batches nor gradient checkpointing: each is one more forward
    pass beside the three that a step takes as much time as."""
    training = config.training
    is_cut = training.micro_batch_size is not None and training.micro_batch_size < training.batch_size
    return 1 + _FORWARD_SHARE * (is_cut + config.hardware.gradient_checkpointing)


def _load(config: ProjectConfig, at_a_time: int) -> float:
    """What a trial's rate is divided by."""
    return _step_work(config) * _on_a_card(config, at_a_time)


def _on_a_card(config: ProjectConfig, at_a_time: int) -> int:
    """Trials that share a card's time, of those side by side on all cards; on a CPU each has cores of its own."""
    return math.ceil(at_a_time / max(1, torch.cuda.device_count())) if _device_type(config) == "cuda" else 1


def _device_type(config: ProjectConfig) -> str:
    return config.device.partition(":")[0]


def _pace(
    config: ProjectConfig,
    to_measure: ProjectConfig,
    at_a_time: int,
    num_valid: int,
    stated: float | None,
) -> ModelPace | None:
    """As measured or stated; ``to_measure``: one of this model and batch size, where a small tower is measured now."""
    device = _device_type(config)
    if stated is not None:
        return _with_evaluation(stated, config, num_valid, "stated")
    path = _path(config, at_a_time, num_valid)
    if path.is_file():
        return _read_pace(path, "measured in an earlier sweep")
    if device == "cuda" and (pace := known_pace(config)) is not None:
        on_a_card = _on_a_card(config, at_a_time)
        shared = pace.side_by_side / on_a_card if on_a_card > 1 and pace.side_by_side is not None else pace.alone
        whole = config.with_overrides({"training.micro_batch_size": None})
        if (known_peak(whole) or sys.maxsize) < sys.maxsize:  # it fitted, and so that is what was timed
            shared *= _step_work(whole) / _step_work(config)
        return _with_evaluation(shared, config, num_valid, "measured by probe")
    if device == "cpu" and forward_flops(config.model_name) < _MEASURED_FLOPS:
        alone = _path(to_measure, 0, num_valid)
        if not alone.is_file():
            _log.info(f"measuring how fast {config.model_name} trains here: once, some seconds")
            try:
                write_json(alone, asdict(_measure(to_measure)))
            except RuntimeError:  # bad data and the like: the sweep will say it, trial by trial
                return None
        return _read_pace(alone, "measured in a short run")
    return None


def _estimated(config: ProjectConfig, at_a_time: int, num_valid: int) -> ModelPace | None:
    """By what is computed and moved, at the rates of the card that is here, or of a T4."""
    if _device_type(config) != "cuda" or not is_described_here(config):
        return None
    training, side_by_side = config.training, _on_a_card(config, at_a_time)
    gpu = (find_gpu(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None) or T4
    passes = _passes(min(training.micro_batch_size or training.batch_size, training.batch_size), *_towers(config))
    rate = training_rate(
        passes,
        gpu,
        batch_size=training.batch_size,
        gradient_checkpointing=config.hardware.gradient_checkpointing,
        averages_weights=config.optimizer.ema_decay is not None,
        side_by_side=side_by_side,
    )
    evaluation_s = num_valid / evaluation_rate(passes, gpu, side_by_side=side_by_side)
    source = f"estimate for {gpu.with_article}"
    return ModelPace(rate, _START_S["cuda"] + evaluation_s, evaluation_s, source, is_estimate=True)


def _towers(config: ProjectConfig) -> tuple[ProjectConfig, torch.dtype | None]:
    """What else a pass depends on."""
    wanted: dict[str, Any] = {"model.patch_dropout": config.model.patch_dropout, "model.batch_norm": config.model.batch_norm}
    wanted["training.edition"] = config.training.edition
    plain = ProjectConfig(clip_model=config.clip_model).with_overrides(wanted)
    return replace(plain, freeze=config.freeze), autocast_dtype(config)


@lru_cache(maxsize=64)
def _passes(num_photos: int, towers: ProjectConfig, dtype: torch.dtype | None) -> Passes:
    return passes_of(planned_network(towers), num_photos, dtype)


def decoding_s(configs: Sequence[ProjectConfig], cores: float, num_valid: int) -> float:
    """Once a sweep on GPUs, whose trials share what has been decoded: for each size in which models see photos."""
    sizes = {photo_side(config.model_name) for config in configs if _device_type(config) == "cuda"}
    return len(sizes) * num_valid / (_DECODED_PER_SECOND * max(1.0, cores))


def _read_pace(path: Path, source: str) -> ModelPace:
    return ModelPace(**json.loads(path.read_text()), source=source)


def _with_evaluation(rate: float, config: ProjectConfig, num_valid: int, source: str) -> ModelPace:
    evaluation_s = _FORWARD_SHARE * num_valid / (rate * _step_work(config))
    return ModelPace(rate, _START_S[_device_type(config)] + evaluation_s, evaluation_s, source)


def _measure(config: ProjectConfig) -> Measured:
    """A short run like a trial's, alone on its cores: two stages, of which the second is timed."""
    stage = max(1, _MEASURED_EXAMPLES // config.training.batch_size) * config.training.batch_size
    settings = {"model.pretrained": None, "training.budget_examples": 2 * stage, "training.stage_examples": stage}
    threads = torch.get_num_threads()
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(),
        progress_bar(f"measuring how fast {config.model_name} trains here") as on_progress,
    ):
        warnings.simplefilter("ignore")  # of the data: the sweep itself says it

        def on_phase(what: str, done: int, total: int) -> None:
            if what == "training":
                on_progress(done, total)

        try:
            run_training(config.with_overrides(settings), folder, RunCallbacks(on_progress=on_phase))
        finally:
            torch.set_num_threads(threads)
        found = measured_in([Path(folder)])
    assert found is not None
    return found


def measured_in(run_dirs: Sequence[Path]) -> Measured | None:
    """Medians over the stages of runs of one model; None where none has ended."""
    rates, starts, evaluations = [], [], []
    for run_dir in run_dirs:
        rows = read_history(run_dir)
        starts += [row["duration_s"] for row in rows[:1] if row["step"] == 0]
        # The first stage has what happens once in it: it counts where there is no other.
        known = rows[1:] if len(rows) > 2 else rows
        for before, row in pairwise(known):
            rates.append(row["samples_per_second"])
            trained_s = (row["examples_seen"] - before["examples_seen"]) / row["samples_per_second"]
            evaluations.append(max(0.0, row["duration_s"] - before["duration_s"] - trained_s))
    if not rates or not starts:
        return None
    return Measured(statistics.median(rates), statistics.median(starts), statistics.median(evaluations))


def runs_of(sweep_dir: Path, model: str) -> list[Path]:
    """The folders of trials that started from what ``clip_model`` names so."""
    return [run for run in sorted(sweep_dir.glob("trials/[0-9]*")) if _settings_of(run).get("clip_model") == model]


def keep_measured(
    sweep_dir: Path, configs: Sequence[ProjectConfig], at_a_time: Callable[[ProjectConfig], int], num_valid: int
) -> None:
    """After a sweep: the next one on this machine plans with its rates."""
    for path, config in {_path(config, at_a_time(config), num_valid): config for config in configs}.items():
        wanted = _kind(config.to_dict())
        runs = [run for run in runs_of(sweep_dir, config.model_name) if _kind(_settings_of(run)) == wanted]
        if (measured := measured_in(runs)) is not None:
            write_json(path, asdict(measured))


def _settings_of(run_dir: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((run_dir / "config.json").read_text())
        return settings
    except (OSError, ValueError):
        return {}


def _kind(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of what ``_path`` goes by, what trials of one sweep may differ in."""
    return {path: value for path, value in {**UNSAID, **settings}.items() if path.startswith(_DIFFERS)}


_DIFFERS = (
    EDITION_PATH,  # in which a sweep goes on that was begun before
    *("clip_model", "training.batch_size", "training.micro_batch_size", "training.num_workers", "freeze."),
    "hardware.gradient_checkpointing",
)


def _path(config: ProjectConfig, at_a_time: int, num_valid: int) -> Path:
    """What a rate depends on, but for the settings that trials differ in."""
    device = "cpu"
    if config.device != "cpu" and torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0).name
    parts = [platform.machine(), available_cores(), device, torch.__version__, config.model_name, at_a_time, num_valid]
    parts += [config.training.batch_size, config.training.num_workers, config.hardware.threads, str(config.dataset_dir)]
    parts += [config.training.micro_batch_size, config.hardware.gradient_checkpointing, vars(config.freeze)]
    parts += [config.training.edition]
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
    return cache_dir() / "rates" / f"{name}.json"
