#!/usr/bin/env python
"""Samples per second and peak memory of this project's training step beside open_clip_train's ``train_one_epoch``.

    python -m benchmarks training_step --rounds 5

Both have the same architecture, batch, loss, precision, clipping, AdamW with the same groups and the same kernel, and data
that is in memory already; each runs in a process of its own, in turn. On a CPU it is one thread and CPU time, on a GPU (where
torch sees one) wall time. open_clip_train is given photos as ready floats; this project's step is measured with those
too, and with what it gets in a run: bytes of the size of Fashion-Gen's photos (256 pixels for an input of 224), which
it resizes and normalises, or augments, on the training device. From edition 2 on it cuts captions to the longest of the batch,
which open_clip_train does not.
"""

import argparse
import json
import logging
import platform
import resource
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.harness import in_own_process, in_turn, median_ratio, spread

# Model, batch size, timed steps on a CPU; and the batch on a GPU.
CASES = {"tiny-clip": (64, 40, 1024), "ViT-B-32": (8, 4, 64)}
_WARM_UP_STEPS, _GPU_STEPS = 2, 50
_CANVAS = 256 / 224
_LEARNING_RATE = 1e-5
Run = Callable[[int], None]
"""Trains so many steps."""


def open_clip_train(loaded: Any, config: Any, plan: Any) -> Run:
    """``open_clip_train.train.train_one_epoch``."""
    from open_clip.loss import ClipLoss
    from open_clip_train.scheduler import cosine_lr
    from open_clip_train.train import train_one_epoch

    from fashionclip_tune.training.optimizer import build_optimizer

    batch_size, network = config.training.batch_size, loaded.network.to(plan.device)
    optimizer = build_optimizer(network, config.training, config.optimizer)
    batch = _pinned((_floats(loaded, batch_size), _tokens(loaded, batch_size)), plan)
    args = SimpleNamespace(
        device=str(plan.device),
        precision={None: "fp32", torch.float16: "amp", torch.bfloat16: "amp_bf16"}[plan.autocast_dtype],
        grad_clip_norm=config.training.max_grad_norm,
        batch_size=batch_size,
        accum_freq=1,
        world_size=1,
        rank=0,
        log_every_n_steps=100,
        distill=False,
        skip_scheduler=False,
        horovod=False,
        wandb=False,
    )
    scaler = torch.amp.GradScaler(plan.device.type) if plan.needs_grad_scaler else None
    scheduler = cosine_lr(optimizer, _LEARNING_RATE, 1, 10**6)
    loss = ClipLoss(cache_labels=True)

    def run(num_steps: int) -> None:
        loader = _Batches([batch] * num_steps)
        loader.num_batches, loader.num_samples = num_steps, num_steps * batch_size
        data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
        train_one_epoch(network, data, loss, 0, optimizer, scaler, scheduler, None, args)

    return run


class _Batches(list[Any]):
    num_batches: int
    num_samples: int


def ours_ready(loaded: Any, config: Any, plan: Any) -> Run:
    """This project's step on ready floats (it still multiplies each by a number once)."""
    images_BCHW = _floats(loaded, config.training.batch_size)
    loaded.preprocessing = SimpleNamespace(size=loaded.preprocessing.size, resize_canvas=_same, normalise=_same)
    return _ours(loaded, config, plan, images_BCHW)


def ours_bytes(loaded: Any, config: Any, plan: Any) -> Run:
    """The step of a run: bytes are resized and normalised."""
    side = round(_CANVAS * loaded.preprocessing.size)
    generator = torch.Generator().manual_seed(0)
    shape = (config.training.batch_size, 3, side, side)
    images_BCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return _ours(loaded, config, plan, images_BCHW)


def ours_before(loaded: Any, config: Any, plan: Any) -> Run:
    """Of a run that began with the first edition: torch's attention in OpenCLIP's towers, captions of full length."""
    return ours_bytes(loaded, config.with_overrides({"training.edition": 1}), plan)


def ours_augmented(loaded: Any, config: Any, plan: Any) -> Run:
    """Bytes are cropped, mirrored and jittered, as with ``augmentation.image_strength=0.5``."""
    return ours_bytes(loaded, config.with_overrides({"augmentation.image_strength": 0.5}), plan)


def _ours(loaded: Any, config: Any, plan: Any, images_BCHW: Tensor) -> Run:
    from fashionclip_tune.data.batches import TrainBatch
    from fashionclip_tune.training.trainer import Trainer

    batch_size = config.training.batch_size
    trainer = Trainer(loaded, config, 10**6, plan)
    batch = TrainBatch(images_BCHW, _tokens(loaded, batch_size), torch.arange(batch_size), ("",) * batch_size, ())
    if plan.device.type == "cuda":
        batch = batch.pin_memory()

    def run(num_steps: int) -> None:
        trainer.run_stage(iter([batch] * num_steps), num_steps, lambda batch: None)

    return run


def _same(images: Tensor) -> Tensor:
    return images


def _floats(loaded: Any, batch_size: int) -> Tensor:
    side = loaded.preprocessing.size
    return torch.randn(batch_size, 3, side, side, generator=torch.Generator().manual_seed(0))


def _tokens(loaded: Any, batch_size: int) -> Tensor:
    """Titles of 12 tokens and one of 20: the longest of 64 titles of a shop has 21 on average, of 64 descriptions all 77."""
    title = "Women Navy Striped Short Sleeve Crew Neck T-Shirt"
    titles = [f"{title} and Wide Grey Linen Trousers with a Belt"] + [title] * (batch_size - 1)
    tokens_BL: Tensor = loaded.tokenizer(titles)
    return tokens_BL


def _pinned(tensors: tuple[Tensor, ...], plan: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.pin_memory() for tensor in tensors) if plan.device.type == "cuda" else tensors


STEPS = {
    "open_clip_train, ready floats": open_clip_train,
    "ours, ready floats": ours_ready,
    "ours, bytes resized": ours_bytes,
    "ours, bytes resized, edition 1": ours_before,
    "ours, bytes augmented": ours_augmented,
}


def measure(name: str, model: str) -> dict[str, float]:
    """Samples per second after the first steps, and the process's peak memory in MiB (on a GPU: its allocator's)."""
    import open_clip

    from fashionclip_tune.config.project import ProjectConfig
    from fashionclip_tune.data.preprocessing import Preprocessing
    from fashionclip_tune.models.openclip import LoadedModel
    from fashionclip_tune.models.precision import plan_precision
    from fashionclip_tune.models.starts import check_architecture

    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    on_gpu = torch.cuda.is_available()
    cpu_batch, cpu_steps, gpu_batch = CASES[model]
    batch_size, num_steps = (gpu_batch, _GPU_STEPS) if on_gpu else (cpu_batch, cpu_steps)
    settings = {"training.batch_size": batch_size, "training.learning_rate": _LEARNING_RATE, "hardware.threads": 1}
    config = ProjectConfig(clip_model=model).with_overrides(settings)
    plan = plan_precision(config)
    model_config = check_architecture(model)
    network = open_clip.create_model(model, pretrained_text=False, output_dict=True)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    preprocessing = Preprocessing(model_config["vision_cfg"]["image_size"], mean, std, "shortest", "bicubic")
    tokenizer = open_clip.get_tokenizer(model, context_length=network.context_length)
    loaded = LoadedModel(model, network, preprocessing, tokenizer, model_config, "", clamps_logit_scale=True)
    run = STEPS[name](loaded, config, plan)
    run(_WARM_UP_STEPS)
    now = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    started = now()
    run(num_steps)
    if on_gpu:
        torch.cuda.synchronize()
    rate = num_steps * batch_size / (now() - started)
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"rate": rate, "peak": peak, "batch_size": batch_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", action="append", choices=CASES, help="one of them only (default: all)")
    parser.add_argument("--only", nargs=2, metavar=("STEP", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(*arguments.only)))
        return
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"one CPU thread ({platform.machine()})"
    print(f"{card}, Python {platform.python_version()}, torch {torch.__version__}")
    print(
        "| model, batch | step | samples/s, median | lowest | highest | over open_clip_train, median of the rounds | peak MiB |"
    )
    print("|---|---|---|---|---|---|---|")
    for model in arguments.model or CASES:
        found = in_turn(STEPS, arguments.rounds, lambda name: in_own_process(__file__, "--only", name, model))  # noqa: B023
        theirs = [each["rate"] for each in found["open_clip_train, ready floats"]]
        for name, measured in found.items():
            rates = [each["rate"] for each in measured]
            figures, ratio = spread(rates, ",.1f"), median_ratio(rates, theirs)
            peak = statistics.median(each["peak"] for each in measured)
            print(f"| {model}, {measured[0]['batch_size']} | {name} | {figures} | {ratio:.2f} | {peak:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
