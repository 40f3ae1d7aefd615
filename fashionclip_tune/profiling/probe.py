"""``python -m fashionclip_tune probe``: what a step of a configuration needs on this card, measured once and kept."""

import copy
import hashlib
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.batches import TrainBatch
from fashionclip_tune.errors import OutOfMemoryError
from fashionclip_tune.files import cache_dir, write_json
from fashionclip_tune.machine.hardware import cuda_of_driver
from fashionclip_tune.models.batch_norms import needs_one_pass
from fashionclip_tune.models.openclip import LoadedModel, load_random_model
from fashionclip_tune.models.precision import PrecisionPlan, plan_precision
from fashionclip_tune.models.token_rows import USUAL_ROWS, use_token_rows
from fashionclip_tune.models.towers import prepare_towers
from fashionclip_tune.profiling.memory import CONTEXT_BYTES, MemoryEstimate, estimate_memory
from fashionclip_tune.training.device import free_memory, ran_out_of_memory, repeatable
from fashionclip_tune.training.trainer import Trainer

# The first step makes Adam's moments, the second is like all that follow.
_STEPS = 2
_CANVAS = 1.25  # side of a photo before augmentation crops it, at most, of what the model sees


@dataclass(frozen=True)
class Probe:
    """One micro-batch: the estimate, and the measured peak on this card with CUDA's context (None: not measured)."""

    micro_batch_size: int
    estimate: MemoryEstimate
    measured_bytes: int | None
    fits: bool | None
    """None where nothing was measured."""


@dataclass(frozen=True)
class ProbeReport:
    """``card`` is None where there is no GPU; then nothing is measured."""

    card: str | None
    card_bytes: int | None
    probes: tuple[Probe, ...]
    """From the configured one downwards by halves, to the first that fits."""

    @property
    def best(self) -> Probe | None:
        """The largest micro-batch that fits."""
        return next((probe for probe in self.probes if probe.fits), None)


def probe(config: ProjectConfig) -> ProbeReport:
    """Measures micro-batches from the configured one downwards until one fits; the answer is kept in the cache.

    On a machine without a GPU each is estimated only.

    Raises:
        UserError: a GPU is asked for that is not there, or the model lacks what is to be frozen or dropped.
    """
    plan = plan_precision(config)
    loaded = load_random_model(config)
    use_token_rows(loaded.network, config, USUAL_ROWS)
    prepare_towers(loaded.network, config)  # as a trainer does; done twice it changes nothing more
    if plan.device.type != "cuda":
        # What would be computed in on a T4, where nothing else is asked for.
        dtype = plan.autocast_dtype or (torch.float16 if config.hardware.precision.value == "auto" else None)
        sizes = _sizes(config, loaded)
        return ProbeReport(None, None, tuple(Probe(size, _estimate(config, loaded, size, dtype), None, None) for size in sizes))
    card = torch.cuda.get_device_properties(plan.device)
    known = cache_dir() / "probes" / f"{probe_identity(config)}.json"
    measured: dict[str, int | None] = json.loads(known.read_text()) if known.is_file() else {}
    probes = list[Probe]()
    for size in _sizes(config, loaded):
        if str(size) not in measured:
            measured[str(size)] = _measure(config, loaded, plan, size)
            write_json(known, measured)
        peak = measured[str(size)]
        probes.append(Probe(size, _estimate(config, loaded, size, plan.autocast_dtype), peak, peak is not None))
        if peak is not None:
            break
    return ProbeReport(card.name, card.total_memory, tuple(probes))


def _sizes(config: ProjectConfig, loaded: LoadedModel) -> list[int]:
    training = config.training
    sizes = [min(training.micro_batch_size or training.batch_size, training.batch_size)]
    while sizes[-1] > 1 and not needs_one_pass(loaded.network, config):
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


def probe_identity(config: ProjectConfig) -> str | None:
    """All that memory and speed of a step depend on: card, driver, libraries, settings; None where there is no card."""
    if not torch.cuda.is_available() or config.device == "cpu":
        return None
    plan = plan_precision(config)
    card = torch.cuda.get_device_properties(plan.device)
    settings = {path: value for path, value in config.to_dict().items() if path.startswith(_RELEVANT)}
    settings["ema"] = config.optimizer.ema_decay is not None
    parts = [
        card.name,
        card.total_memory,
        cuda_of_driver(),
        torch.__version__,
        torch.version.cuda,
        str(plan.autocast_dtype),
        settings,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


# Trials that differ in other settings (rates, captions, augmentation) share a measurement, whatever part of the machine they
# have: ``hardware.threads`` and ``hardware.device_share`` change nothing of what a card measures.
_RELEVANT = (
    *("clip_model", "training.batch_size", "training.edition", "freeze.", "model.patch_dropout", "model.batch_norm"),
    *("hardware.precision", "hardware.gradient_checkpointing", "hardware.compile", "hardware.deterministic"),
)


def known_peak(config: ProjectConfig) -> int | None:
    """Peak bytes measured here at ``training.micro_batch_size``: ``sys.maxsize`` where it ran out, None: not measured."""
    identity = probe_identity(config)
    known = cache_dir() / "probes" / f"{identity}.json"
    if identity is None or not known.is_file():
        return None
    measured = json.loads(known.read_text())
    size = str(config.training.micro_batch_size or config.training.batch_size)
    if size not in measured:
        return None
    return sys.maxsize if measured[size] is None else int(measured[size])


def _estimate(config: ProjectConfig, loaded: LoadedModel, micro_batch_size: int, dtype: torch.dtype | None) -> MemoryEstimate:
    return estimate_memory(
        loaded.network,
        batch_size=config.training.batch_size,
        micro_batch_size=micro_batch_size,
        autocast_dtype=dtype,
        gradient_checkpointing=config.hardware.gradient_checkpointing,
        averages_weights=config.optimizer.ema_decay is not None,
    )


def _measure(config: ProjectConfig, loaded: LoadedModel, plan: PrecisionPlan, size: int) -> int | None:
    """Peak bytes of a micro-batch, None where memory ran out."""
    return _peak_of(lambda: _train(config, loaded, plan, size), plan)


def _peak_of(work: Callable[[], None], plan: PrecisionPlan) -> int | None:
    free_memory()
    torch.cuda.reset_peak_memory_stats(plan.device)
    try:
        work()
        torch.cuda.synchronize(plan.device)
        # Reserved, not allocated: what lies between blocks is lost to others, too.
        return int(torch.cuda.max_memory_reserved(plan.device)) + CONTEXT_BYTES
    except (OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, OutOfMemoryError) and not ran_out_of_memory(error):
            raise
        return None


def _train(config: ProjectConfig, loaded: LoadedModel, plan: PrecisionPlan, micro_batch_size: int) -> None:
    """Steps on random photos. A trainer that runs out of memory would go on by itself with less: that is the answer."""
    copied = LoadedModel(**{**vars(loaded), "network": copy.deepcopy(loaded.network)})
    trainer = Trainer(copied, config.with_overrides({"training.micro_batch_size": micro_batch_size}), _STEPS, plan)
    batch = random_batch(config, loaded).pin_memory()
    with repeatable(config.hardware.deterministic, plan.device), warnings.catch_warnings():
        warnings.filterwarnings("error", "out of memory", UserWarning)
        try:
            trainer.run_stage(iter([batch] * _STEPS), _STEPS, lambda batch: None)
        except UserWarning as warning:
            raise OutOfMemoryError(str(warning)) from None


def random_batch(config: ProjectConfig, loaded: LoadedModel) -> TrainBatch:
    """A batch of the configured size, with photos of noise as large as they come, pixel by pixel as a loader's."""
    batch_size, side = config.training.batch_size, round(loaded.preprocessing.size * _CANVAS)
    images_BCHW = torch.randint(0, 256, (batch_size, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    tokens_1L = loaded.tokenizer(["a photo of a red dress"])
    tokens_BL = tokens_1L.expand(batch_size, -1).contiguous()
    return TrainBatch(images_BCHW, tokens_BL, torch.arange(batch_size), ("",) * batch_size, ())


def report_lines(report: ProbeReport) -> list[str]:
    """For people: a line a micro-batch."""
    if report.card is None:
        head = "no GPU here: nothing was measured, these are estimates (fp16 unless hardware.precision says otherwise)"
    else:
        assert report.card_bytes is not None
        head = f"measured on {report.card}, {report.card_bytes / 2**30:.1f} GiB"
    lines = [head]
    for each in report.probes:
        found = "" if each.fits is None else "  out of memory"
        if each.measured_bytes is not None:
            found = f"  measured {each.measured_bytes / 2**30:.2f} GiB"
        lines.append(f"micro-batch {each.micro_batch_size:>5}  estimate {each.estimate.total_bytes / 2**30:6.2f} GiB{found}")
    return lines
