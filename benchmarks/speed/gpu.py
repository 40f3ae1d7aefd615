#!/usr/bin/env python
"""What a card does with the three models, in ten minutes: speed, memory, waits, bits, sharing; below Ray and with it.

    python -m benchmarks gpu --out results/gpu.json

Parts, each in a process of its own, so that one that fails costs no other:

- card: what the card reaches in a matrix product and in a copy;
- step: samples a second beside ``open_clip_train``, of each edition, and what ``hardware.deterministic`` costs;
- busy: how long the card works on a step, and what it is given to do;
- waits: steps of both losses with all options, in which waiting for the device is an error;
- bits: whether two runs of the same steps have the same weights;
- peaks: of the allocator, beside the estimate, with micro-batches and gradient checkpointing;
- caps: a process that may have 15 or 6 GiB runs out of memory, goes on, and has the gradients of one that did not;
- probe: the command, with two trials side by side against one after the other;
- run: a run on synthetic photos: how much of it is training, evaluation, and the rest;
- sweep: of tiny towers, where Ray is there.

Photos and captions are random, but for ``run`` and ``sweep``; weights are random. Everything is fp16 as on a T4. A larger card
stands for a T4 by its caps only: rates are that card's.
"""

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fashionclip_tune.machine.hardware import available_cores

MODELS = ("ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP2-256")
GIB = 2**30
_BATCH = 64
_WARM_UP, _TIMED, _ROUNDS = 4, 12, 3
_VOCABULARY = 3_000  # distinct tokens of the captions of a shop
# Else Adam makes a sign of a gradient's rounding error; and its first moment is a tenth of the first gradient.
_EPSILON, _GRADIENT_OF_MOMENT = 1e-4, 10.0
Found = dict[str, Any]


def config_of(model: str, device: str, settings: Mapping[str, Any] | None = None) -> Any:
    from fashionclip_tune.config.project import ProjectConfig

    common = {"model.pretrained": None, "training.batch_size": _BATCH, "hardware.precision": "fp16"}
    return ProjectConfig(clip_model=model, device=device).with_overrides({**common, **(settings or {})})


def batch_of(config: Any, loaded: Any) -> Any:
    """Photos of noise; captions of 12 to 32 tokens, as long as a shop's, with ids as OpenCLIP's tokenizers order them."""
    from fashionclip_tune.data.batches import TrainBatch

    size, side = config.training.batch_size, round(loaded.preprocessing.size * 256 / 224)
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    vocabulary, length = loaded.model_config["text_cfg"]["vocab_size"], loaded.network.context_length
    ids_BL = torch.randint(1, min(_VOCABULARY, vocabulary - 2), (size, length), generator=generator)
    ends_B1 = torch.randint(11, min(32, length), (size, 1), generator=generator)
    places_L = torch.arange(length)
    tokens_BL = ids_BL.where(places_L < ends_B1, 0).where(places_L != ends_B1, vocabulary - 1)
    batch = TrainBatch(images_BCHW, tokens_BL, torch.arange(size), ("",) * size, ())
    return batch.pin_memory()


def trainer_of(config: Any, steps: int = 1_000) -> tuple[Any, Any]:
    """A trainer on fresh weights, always the same, and its batch."""
    from fashionclip_tune.models.openclip import load_random_model
    from fashionclip_tune.models.precision import plan_precision
    from fashionclip_tune.models.token_rows import use_token_rows
    from fashionclip_tune.training.trainer import Trainer

    loaded = load_random_model(config)
    batch = batch_of(config, loaded)
    others_U = torch.arange(_VOCABULARY)  # that the captions of other batches have
    use_token_rows(loaded.network, config, lambda: torch.cat([others_U, batch.tokens_BL.flatten()]).unique())
    return Trainer(loaded, config, steps, plan_precision(config)), batch


def train(trainer: Any, batch: Any, steps: int) -> Any:
    return trainer.run_stage(iter([batch] * steps), steps, lambda batch: None)


def card(model: str, device: str) -> Found:
    """Matrix products of 4096, fp16, and a copy of 1 GiB; what CUDA's context takes beside the allocator."""
    properties = torch.cuda.get_device_properties(device)
    numbers_NN = torch.randn(4096, 4096, device=device, dtype=torch.half)
    source, target = torch.empty(GIB, dtype=torch.uint8, device=device), torch.empty(GIB, dtype=torch.uint8, device=device)

    def products() -> None:
        for _ in range(10):
            torch.mm(numbers_NN, numbers_NN)

    def copies() -> None:
        for _ in range(10):
            target.copy_(source)

    product_s, copy_s = (min(_seconds(work, device) for _ in range(3)) / 10 for work in (products, copies))
    free, total = torch.cuda.mem_get_info(device)
    return {
        "name": properties.name,
        "memory_gib": properties.total_memory / GIB,
        "context_gib": (total - free - torch.cuda.memory_reserved(device)) / GIB,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tflops": 2 * 4096**3 / product_s / 1e12,
        "gb_s": 2 * GIB / copy_s / 1e9,
    }


def step(model: str, device: str) -> Found:
    """Samples a second, the best of three."""

    def rate(work: Callable[[int], object]) -> float:
        work(_WARM_UP)
        return _TIMED * _BATCH / min(_seconds(lambda: work(_TIMED), device) for _ in range(_ROUNDS))

    return _of_each(_STEPS, model, device, rate)


def busy(model: str, device: str) -> Found:
    """Of a step: milliseconds in which the card computed or copied, and how often it was given something to do."""

    def watch(work: Callable[[int], object]) -> Found:
        steps = 2
        work(_WARM_UP)
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profiler:
            work(steps)
            torch.cuda.synchronize(device)
        events = [event for event in profiler.key_averages() if event.device_type.name == "CUDA"]
        busy_us = sum(event.self_device_time_total for event in events)
        return {"busy_ms": busy_us / 1000 / steps, "launches": sum(event.count for event in events) / steps}

    return _of_each(("open_clip_train", "edition 1", "as trained"), model, device, watch)


_STEPS: dict[str, tuple[bool, dict[str, Any]]] = {
    "open_clip_train": (False, {}),
    "not deterministic": (False, {}),
    "edition 1": (True, {"training.edition": 1}),
    "as trained": (True, {}),
    "micro-batches of 16": (True, {"training.micro_batch_size": 16}),
    "augmented": (True, {"augmentation.image_strength": 0.5, "augmentation.rand_augment": True}),
}
"""Whether deterministic, and settings."""


def _of_each(names: Iterable[str], model: str, device: str, measure: Callable[[Callable[[int], object]], object]) -> Found:
    from fashionclip_tune.training.device import repeatable

    found = {}
    for name in names:
        is_deterministic, settings = _STEPS[name]
        with repeatable(is_deterministic, torch.device(device)):
            peer = name == "open_clip_train"
            found[name] = measure(_peer(model, device) if peer else _ours(config_of(model, device, settings)))
        _free()
    return found


def _seconds(work: Callable[[], object], device: str) -> float:
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _ours(config: Any) -> Callable[[int], object]:
    trainer, batch = trainer_of(config)
    return lambda steps: train(trainer, batch, steps)


def _peer(model: str, device: str) -> Callable[[int], object]:
    from benchmarks.speed.training_step import open_clip_train
    from fashionclip_tune.models.openclip import load_random_model
    from fashionclip_tune.models.precision import plan_precision

    config = config_of(model, device)
    loaded: Any = load_random_model(config)
    loaded.network.output_dict = True
    return open_clip_train(loaded, config, plan_precision(config))


def _free() -> None:
    from fashionclip_tune.training.device import free_memory

    free_memory()


def waits(model: str, device: str) -> Found:
    """Ten steps of each loss in which torch raises where the CPU waits for the device."""
    from fashionclip_tune.training.device import repeatable

    options = {
        "training.micro_batch_size": _BATCH // 2,
        "augmentation.image_strength": 0.5,
        "augmentation.rand_augment": True,
        "augmentation.erasing": True,
        "model.patch_dropout": 0.25,
        "optimizer.ema_decay": 0.99,
        "loss.positives": "all",
    }
    found = {}
    for loss in ("contrastive", "siglip"):
        config = config_of(model, device, {**options, "loss_function": loss})
        with repeatable(True, torch.device(device)):
            trainer, batch = trainer_of(config)
            train(trainer, batch, 2)
            try:
                _ten_steps_without_waiting(trainer, batch)
                found[loss] = "none"
            except RuntimeError as error:
                found[loss] = str(error).splitlines()[0]
            finally:
                torch.cuda.set_sync_debug_mode("default")
        del trainer
        _free()
    return found


def _ten_steps_without_waiting(trainer: Any, batch: Any) -> None:
    """The end of a stage may wait, and is left out: the stage is stopped before its eleventh step."""
    last = trainer.step + 10
    torch.cuda.set_sync_debug_mode("error")

    def is_over() -> bool:
        if trainer.step == last:
            torch.cuda.set_sync_debug_mode("default")
        return bool(trainer.step == last)

    trainer.run_stage(iter([batch] * 11), 11, lambda batch: None, is_over)


def bits(model: str, device: str) -> Found:
    """Whether the weights after six steps are equal, bit by bit, in two runs."""
    from fashionclip_tune.training.device import repeatable

    found = {}
    for name, is_deterministic in (("deterministic", True), ("not deterministic", False)):
        ends = []
        for _ in range(2):
            with repeatable(is_deterministic, torch.device(device)):
                trainer, batch = trainer_of(config_of(model, device, {"training.learning_rate": 1e-3}))
                train(trainer, batch, 6)
            ends.append([tensor.detach().cpu() for tensor in trainer.network.state_dict().values()])
            del trainer
            _free()
        found[name] = all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    return found


def peaks(model: str, device: str) -> Found:
    """GiB in the allocator at the most, and as reserved with CUDA's context, beside the estimate."""
    from fashionclip_tune.models.precision import plan_precision
    from fashionclip_tune.profiling.memory import CONTEXT_BYTES, estimate_memory
    from fashionclip_tune.training.device import repeatable

    rows = []
    for checkpointing in (False, True):
        for size in (16, 32, 64):
            config = config_of(
                model, device, {"training.micro_batch_size": size, "hardware.gradient_checkpointing": checkpointing}
            )
            _free()
            torch.cuda.reset_peak_memory_stats()
            with repeatable(True, torch.device(device)):
                trainer, batch = trainer_of(config)
                train(trainer, batch, 2)
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            estimate = estimate_memory(
                trainer.network,
                batch_size=_BATCH,
                micro_batch_size=size,
                autocast_dtype=plan_precision(config).autocast_dtype,
                gradient_checkpointing=checkpointing,
            )
            del trainer
            rows.append(
                {
                    "micro_batch": size,
                    "checkpointing": checkpointing,
                    "allocated": allocated / GIB,
                    "with_context": (reserved + CONTEXT_BYTES) / GIB,
                    "estimated": estimate.total_bytes / GIB,
                }
            )
    return {"rows": rows}


def caps(model: str, device: str) -> Found:
    """A step whose micro-batch does not fit the cap: where it ends, and its gradients beside one's that began there."""
    found: Found = {}
    for cap_gib, batch_size in ((15, 512), (6, 256)):
        settings = {"training.batch_size": batch_size, "training.epsilon": _EPSILON}
        with _capped(cap_gib * GIB):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                trainer, batch = trainer_of(config_of(model, device, settings))
                try:
                    train(trainer, batch, 1)
                except Exception as error:  # that one photo does not fit is an answer, too
                    found[f"{cap_gib} GiB"] = {"failed": str(error).splitlines()[0]}
                    del trainer
                    _free()
                    continue
            times = sum("out of memory" in str(warning.message) for warning in said)
            size, gradients = trainer.micro_batch_size, _gradients(trainer)
            del trainer
            _free()
            without, batch = trainer_of(config_of(model, device, {**settings, "training.micro_batch_size": size}))
            train(without, batch, 1)
            expected = _gradients(without)
            del without
            _free()
        difference = relative_difference(gradients, expected)
        cut = {"batch": batch_size, "micro_batch": size, "out_of_memory": times}
        found[f"{cap_gib} GiB"] = {**cut, "difference": difference}
    return found


def relative_difference(found_N: torch.Tensor, expected_N: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(found_N - expected_N) / torch.linalg.vector_norm(expected_N))


@contextmanager
def _capped(num_bytes: int) -> Iterator[None]:
    """Of this process, CUDA's context included."""
    from fashionclip_tune.profiling.memory import CONTEXT_BYTES

    total = torch.cuda.get_device_properties(0).total_memory
    _free()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (num_bytes - CONTEXT_BYTES) / total), 0)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


def _gradients(trainer: Any) -> torch.Tensor:
    """Of the first step, clipped: from Adam's first moments, since the step itself lets go of them."""
    moments = [state["exp_avg"].flatten().float().cpu() for state in trainer._optimizer.state.values()]
    return _GRADIENT_OF_MOMENT * torch.cat(moments)


def probe(model: str, device: str) -> Found:
    """What the command says."""
    settings = ("--set", f"clip_model={model}", "--set", "hardware.precision=fp16")
    return {"said": _command("-m", "fashionclip_tune", "probe", *settings).strip().splitlines()}


def run(model: str, device: str) -> Found:
    """Two stages of 1,920 photos, and an evaluation of 483 after each: an odd number, of which the tests' made-up card, whose
    ranks are all zeros, counts each."""
    with tempfile.TemporaryDirectory() as folder:
        data, out, side = Path(folder, "data"), Path(folder, "run"), 48 if model.startswith("tiny-") else 256
        _command("-m", "fashionclip_tune", "synthesize", "--out", data, "--num-products", 201, "--image-size", side)
        settings = {
            **{"clip_model": model, "model.pretrained": "none", "hardware.precision": "fp16", "training.num_workers": 6},
            **{"training.budget_examples": 3_840, "training.stage_examples": 1_920, "device": device},
            "valid_shards_pattern": data / "clip_dataset_train_aug.000000.tar",
        }
        given = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        started = time.perf_counter()
        _command("-m", "fashionclip_tune", "train", "--data", data, "--out", out, *given)
        total_s = time.perf_counter() - started
        rows = [json.loads(file.read_text()) for file in sorted((out / "evaluations").glob("*.json"))]
    wanted = ("step", "duration_s", "device_s", "samples_per_second", "images_encoded_per_second", "texts_encoded_per_second")
    return {"total_s": total_s, "rows": [{name: row.get(name) for name in wanted} for row in rows]}


def sweep(model: str, device: str) -> Found:
    """Six trials, two side by side."""
    if importlib.util.find_spec("ray") is None:
        return {"said": "Ray is not here"}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        _command("-m", "fashionclip_tune", "synthesize", "--out", data, "--num-products", 300, "--image-size", 64)
        options = ("--num-trials", 6, "--budget-examples", 1_536, "--grace-examples", 512, "--name", "tiny", "--device", device)
        started = time.perf_counter()
        where = ("--data", data, "--results", folder, "--max-concurrent", 2, "--set", "model.pretrained=none")
        _command("sweeps/run_sweep.py", "--space", "tiny", *where, *options)
        total_s = time.perf_counter() - started
        record = json.loads((Path(folder) / "tiny" / "sweep.json").read_text())
    rows = [{key: row.get(key) for key in ("state", "stop_reason", "recall_at_10", "device_s")} for row in record["trials"]]
    return {"total_s": total_s, "state": record["state"], "trials": rows}


def _command(*words: object) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: {done.stdout[-1500:]} {done.stderr[-3000:]}")
    return done.stdout


PARTS: dict[str, Callable[[str, str], Found]] = {
    part.__name__: part for part in (card, step, busy, waits, bits, peaks, caps, probe, run, sweep)
}
_ONCE = {"card": 0, "run": 1, "sweep": 0}
"""Parts that are done with the first model, or with none."""
_UNTIMED = ("waits", "bits", "peaks", "caps")
"""Parts that time nothing: several processes at once, where the card holds them."""
_PART_GIB = 16


def tasks(parts: Iterable[str], models: Sequence[str]) -> list[tuple[str, str]]:
    return [(part, model) for part in parts for model in (models[: _ONCE.get(part)] or [""])]


def tables(found: Mapping[str, Found]) -> list[str]:
    """Samples a second, and GiB beside the estimate (CUDA's context included), as results/README.md has them."""
    from fashionclip_tune.profiling.memory import CONTEXT_BYTES

    steps = ["| model | step | samples/s |", "|---|---|---|"]
    peaks = ["| model | micro-batch | gradient checkpointing | allocated | reserved | estimated |", "|---|---|---|---|---|---|"]
    for task, result in found.items():
        part, _, model = task.partition(" ")
        if part == "step":
            steps += [f"| {model} | {name} | {result[name]:,.0f} |" for name in _STEPS if name in result]
        for row in result.get("rows", []) if part == "peaks" else []:
            gib = (row["allocated"] + CONTEXT_BYTES / GIB, row["with_context"], row["estimated"])
            cells = (model, row["micro_batch"], "on" if row["checkpointing"] else "off", *(f"{each:.2f}" for each in gib))
            peaks.append(f"| {' | '.join(map(str, cells))} |")
    return [*steps, "", *peaks]


def measure(part: str, model: str, device: str, end: float) -> Found:
    """In a process of its own, that has to end before ``end`` of the monotonic clock; what failed is found, too."""
    command = [sys.executable, "-m", "benchmarks", "gpu", "--device", device, "--task", part, model]
    started = time.monotonic()
    if started >= end:
        return {"failed": "no time was left"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=end - started)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {end - started:.0f} s"}
    found: Found = json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {"failed": done.stderr[-3000:]}
    return {**found, "wall_s": time.monotonic() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument(
        "--minutes", type=float, default=10.0, metavar="M", help="all is over after them (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/gpu.json"), metavar="FILE", help="added to (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--task", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        part, model = arguments.task
        print(json.dumps(PARTS[part](model, arguments.device)))
        return
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    end = time.monotonic() + 60 * arguments.minutes
    found: dict[str, Found] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}

    def do(task: tuple[str, str]) -> None:
        name = " ".join(task).strip()
        found[name] = measure(*task, arguments.device, end)
        arguments.out.write_text(json.dumps(found, indent=1))
        print(name, json.dumps(found[name]), flush=True)

    wanted = tasks(arguments.parts, arguments.models)
    side_by_side = int(torch.cuda.get_device_properties(0).total_memory / GIB / _PART_GIB)
    with ThreadPoolExecutor(max(1, min(side_by_side, available_cores() // 2))) as pool:
        list(pool.map(do, [task for task in wanted if task[0] in _UNTIMED]))
    for task in wanted:
        if task[0] not in _UNTIMED:
            do(task)
    print(*tables(found), sep="\n")


if __name__ == "__main__":
    main()
