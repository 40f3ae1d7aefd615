#!/usr/bin/env python
"""What a card has to show of memory and shares, below Ray: peaks against the estimate, a capped card, trials side by side.

    python -m benchmarks gpu_shares peaks                # three models, micro-batch 16 to 256, checkpointing off and on
    python -m benchmarks gpu_shares cap --card-gib 15    # largest micro-batch; out of memory and survived; its neighbour
    python -m benchmarks gpu_shares side --card-gib 15   # one, two and three capped processes

``--card-gib`` makes a larger card stand for a smaller one: each process's allocator is capped to its part, less CUDA's context,
as ``tuning/gpu_share`` does it for a trial. Each measurement is a process of its own, with random weights and photos of
noise; nothing is downloaded. Rows are Markdown, as results/README.md has them.

Without a GPU ``peaks`` prints estimates, and ``--models tiny-clip --device cpu --limit-photos 8`` goes through the rest: a
micro-batch of more photos than that raises the error of a card that is full.
"""

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

MODELS = ("ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP2-256")
MICRO_BATCHES = (16, 32, 64, 128, 256)
GIB = 2**30
_STEPS = 2  # the first one makes Adam's moments
_NEIGHBOUR_STEPS = 40
# Else Adam makes a sign of a gradient's rounding error; and its first moment is a tenth of the first gradient.
_EPSILON, _GRADIENT_OF_MOMENT = 1e-4, 10.0


def config_of(job: Mapping[str, Any]) -> Any:
    from fashionclip_tune.config.project import ProjectConfig

    return ProjectConfig(clip_model=job["model"], device=job["device"]).with_overrides(
        {
            "model.pretrained": None,
            "training.batch_size": job["batch_size"],
            "training.micro_batch_size": job["micro_batch"],
            "training.epsilon": _EPSILON,
            "hardware.threads": 1 if job["device"] == "cpu" else None,
            "hardware.gradient_checkpointing": job["checkpointing"],
            "freeze.token_embedding": job["model"].endswith("SigLIP2-256"),
        }
    )


def without_hub() -> None:
    """SigLIP2's tokenizer is on the hub; what a text says changes no memory and no time."""
    import open_clip

    get_tokenizer = open_clip.get_tokenizer

    def tokenizer(name: str, **options: Any) -> Any:
        if "SigLIP" in name:
            return lambda texts: torch.ones(len(texts), 64, dtype=torch.long)
        return get_tokenizer(name, **options)

    open_clip.get_tokenizer = tokenizer


def trainer_of(job: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """A trainer on its part of the card, a batch for it, and its model."""
    from fashionclip_tune.models.openclip import load_model
    from fashionclip_tune.models.precision import plan_precision
    from fashionclip_tune.profiling.memory import CONTEXT_BYTES
    from fashionclip_tune.profiling.probe import random_batch
    from fashionclip_tune.training.trainer import Trainer

    without_hub()
    config = config_of(job)
    if config.hardware.threads is not None:
        torch.set_num_threads(config.hardware.threads)
    plan = plan_precision(config)
    if plan.device.type == "cuda" and job["part_bytes"]:
        total = torch.cuda.get_device_properties(plan.device).total_memory
        torch.cuda.set_per_process_memory_fraction((job["part_bytes"] - CONTEXT_BYTES) / total, plan.device)
    loaded = load_model(config)
    trainer = Trainer(loaded, config, _NEIGHBOUR_STEPS, plan)
    if job["limit_photos"]:
        _limit(trainer, job["limit_photos"])
    torch.manual_seed(0)  # the same photos in each process
    batch = random_batch(config, loaded)
    return trainer, batch.pin_memory() if plan.device.type == "cuda" else batch, loaded


def _limit(trainer: Any, photos: int) -> None:
    """In the place of a card that is full."""
    encode_text = trainer._encode_text

    def encode(tokens_BL: torch.Tensor, **options: Any) -> torch.Tensor:
        if len(tokens_BL) > photos:
            raise torch.cuda.OutOfMemoryError(f"CUDA out of memory: {len(tokens_BL)} photos, {photos} are allowed")
        found: torch.Tensor = encode_text(tokens_BL, **options)
        return found

    trainer._encode_text = encode


def train(trainer: Any, batch: Any, steps: int) -> Any:
    return trainer.run_stage(iter([batch] * steps), steps, lambda batch: None)


def peak(job: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes of a step with CUDA's context, as estimated and as measured; None: no GPU, or it ran out."""
    from fashionclip_tune.errors import OutOfMemoryError
    from fashionclip_tune.models.precision import plan_precision
    from fashionclip_tune.models.towers import prepare_towers
    from fashionclip_tune.profiling.memory import CONTEXT_BYTES, estimate_memory
    from fashionclip_tune.training.device import ran_out_of_memory

    trainer, batch, loaded = trainer_of(job)
    plan = plan_precision(config_of(job))
    prepare_towers(loaded.network, config_of(job))
    estimate = estimate_memory(
        loaded.network,
        batch_size=job["batch_size"],
        micro_batch_size=job["micro_batch"],
        autocast_dtype=plan.autocast_dtype or torch.float16,
        gradient_checkpointing=job["checkpointing"],
    )
    measured = None
    if plan.device.type == "cuda":
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # that it goes on with less: then this one does not fit
                train(trainer, batch, _STEPS)
            measured = torch.cuda.max_memory_reserved(plan.device) + CONTEXT_BYTES
        except (UserWarning, OutOfMemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not isinstance(error, OutOfMemoryError) and not ran_out_of_memory(error):
                raise
    return {"estimated": estimate.total_bytes, "measured": measured}


def survive(job: Mapping[str, Any]) -> dict[str, Any]:
    """One step that begins with a micro-batch that may not fit: where it ended, and its gradients beside those of a step
    that began there."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer, batch, _ = trainer_of(job)
        train(trainer, batch, 1)
    gradients, micro_batch = _gradients(trainer), trainer.micro_batch_size
    times = sum("out of memory" in str(warning.message) for warning in said)
    del trainer
    without, batch, _ = trainer_of({**job, "micro_batch": micro_batch})
    train(without, batch, 1)
    expected = _gradients(without)
    difference = torch.linalg.vector_norm(gradients - expected) / torch.linalg.vector_norm(expected)
    return {"micro_batch": micro_batch, "out_of_memory": times, "difference": float(difference)}


def _gradients(trainer: Any) -> torch.Tensor:
    """Of the first step, clipped: from Adam's first moments, since the step itself lets go of them."""
    moments = [state["exp_avg"].flatten().float().cpu() for state in trainer._optimizer.state.values()]
    return _GRADIENT_OF_MOMENT * torch.cat(moments)


def neighbour(job: Mapping[str, Any]) -> dict[str, Any]:
    """A run that minds its own business: its loss and its rate."""
    trainer, batch, _ = trainer_of(job)
    train(trainer, batch, _STEPS)
    stats = train(trainer, batch, _NEIGHBOUR_STEPS - _STEPS)
    return {"loss": stats.loss, "samples_per_second": stats.samples_per_second, "micro_batch": trainer.micro_batch_size}


JOBS = {"peak": peak, "survive": survive, "neighbour": neighbour}


def start(kind: str, job: Mapping[str, Any]) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, "job", kind, json.dumps(job)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def ended(process: "subprocess.Popen[str]") -> dict[str, Any]:
    out, _ = process.communicate()
    if process.returncode:
        return {"failed": f"status {process.returncode}"}
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def job_of(arguments: argparse.Namespace, model: str, batch_size: int, **more: Any) -> dict[str, Any]:
    common = {"device": arguments.device, "limit_photos": arguments.limit_photos, "part_bytes": None}
    return {"model": model, "batch_size": batch_size, "micro_batch": batch_size, "checkpointing": False, **common, **more}


def peaks(arguments: argparse.Namespace) -> Iterator[str]:
    yield "| model | gradient checkpointing | micro-batch | measured GiB | estimated GiB | ratio |"
    yield "|---|---|---|---|---|---|"
    for model in arguments.models:
        for checkpointing in (False, True):
            for size in arguments.micro_batches:
                found = ended(start("peak", job_of(arguments, model, size, checkpointing=checkpointing)))
                measured, estimated = found.get("measured"), found.get("estimated")
                cells = [model, "on" if checkpointing else "off", str(size)]
                cells += [found["failed"]] if "failed" in found else [f"{measured / GIB:.2f}" if measured else "not measured"]
                cells += [f"{estimated / GIB:.2f}" if estimated else "", f"{estimated / measured:.2f}" if measured else ""]
                yield f"| {' | '.join(cells)} |"


def cap(arguments: argparse.Namespace) -> Iterator[str]:
    yield f"a card of {arguments.card_gib:g} GiB, batches of {max(arguments.micro_batches)}"
    yield "| model | largest micro-batch | out of memory on the way | gradients, relative difference to a step without |"
    yield "|---|---|---|---|"
    card_bytes = int(arguments.card_gib * GIB)
    for model in arguments.models:
        job = job_of(arguments, model, max(arguments.micro_batches), part_bytes=card_bytes)
        found = ended(start("survive", job))
        cells = [found["failed"]] if "failed" in found else [f"{found[each]:.3g}" for each in _SURVIVED]
        yield f"| {' | '.join([model, *cells])} |"
    # Half of the card each: one that fits, beside one that runs out again and again.
    small, largest = arguments.models[0], arguments.models[-1]
    calm = job_of(arguments, small, min(arguments.micro_batches), part_bytes=card_bytes // 2)
    wild = job_of(arguments, largest, max(arguments.micro_batches), part_bytes=card_bytes // 2)
    alone = ended(start("neighbour", calm))
    processes = start("neighbour", calm), start("survive", wild)
    beside, other = map(ended, processes)
    yield f"neighbour {small}, micro-batch {calm['micro_batch']}: alone {alone}"
    yield f"beside {largest}, which ran out of memory {other.get('out_of_memory')} times: {beside}"


_SURVIVED = ("micro_batch", "out_of_memory", "difference")


def side(arguments: argparse.Namespace) -> Iterator[str]:
    from fashionclip_tune.errors import OutOfMemoryError
    from fashionclip_tune.profiling.throughput import run_side_by_side

    yield "| model | micro-batch | processes | samples/s together | against one after the other |"
    yield "|---|---|---|---|---|"
    card_bytes = int(arguments.card_gib * GIB)
    for model in arguments.models:
        if model.endswith("SigLIP2-256"):
            continue  # one fills such a card
        for size in arguments.micro_batches[:2]:
            config, alone = config_of(job_of(arguments, model, size)), None
            for count in (1, 2, 3):
                try:
                    together = sum(run_side_by_side(config, count, card_bytes=card_bytes))
                except OutOfMemoryError:
                    yield f"| {model} | {size} | {count} | does not fit | |"
                    continue
                alone = alone or together
                yield f"| {model} | {size} | {count} | {together:,.0f} | {together / alone - 1:+.0%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("peaks", "cap", "side"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--micro-batches", nargs="+", type=int, default=list(MICRO_BATCHES), metavar="N")
    parser.add_argument("--card-gib", type=float, default=15.0, metavar="G", help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit-photos", type=int, metavar="N", help="without a GPU: where memory is to run out")
    arguments = parser.parse_args()
    for line in {"peaks": peaks, "cap": cap, "side": side}[arguments.what](arguments):
        print(line, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["job"]:
        print(json.dumps(JOBS[sys.argv[2]](json.loads(sys.argv[3]))))
    else:
        main()
