#!/usr/bin/env python
"""The estimate of ``fashionclip_tune.profiling.memory`` beside what a step truly takes, on a CPU in fp32.

    python -m benchmarks memory_estimate

Each model is built with random weights in a process of its own; measured is by how much the process's resident memory grows
at most in a forward and a backward pass, and estimated are the gradients and what is kept for the backward pass. (On a GPU
``python -m fashionclip_tune probe`` measures whole steps.)
"""

import argparse
import json
import logging
import resource
from pathlib import Path

from benchmarks.speed.harness import in_own_process


def measure(model: str, batch_size: int, checkpointing: bool) -> dict[str, float]:
    import open_clip
    import torch

    from fashionclip_tune.losses import sigmoid_bce
    from fashionclip_tune.profiling.memory import estimate_memory

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    network = open_clip.create_model(model, pretrained=None, pretrained_text=False).train()
    estimate = estimate_memory(
        network,
        batch_size=batch_size,
        micro_batch_size=batch_size,
        autocast_dtype=None,
        gradient_checkpointing=checkpointing,
    )
    if checkpointing:
        network.set_grad_checkpointing(True)
    size = network.visual.image_size
    images = torch.rand(batch_size, 3, *(size if isinstance(size, tuple) else (size, size)))
    tokens = torch.randint(1, 1000, (batch_size, network.context_length))
    before = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line).split()[1])
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image, text = network.encode_image(images, normalize=True), network.encode_text(tokens, normalize=True)
    sigmoid_bce(image, text, network.logit_scale.exp(), torch.zeros(())).backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak > peak_before, "the peak was before the step: a larger batch is needed to see it"
    estimated = estimate.gradients_bytes + estimate.activations_bytes
    return {"measured": (peak - before) / 2**20, "estimated": estimated / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32, help="photos (default: %(default)s)")
    parser.add_argument("--only", nargs=2, metavar=("MODEL", "CHECKPOINTING"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        model, checkpointing = arguments.only
        print(json.dumps(measure(model, arguments.batch_size, checkpointing == "on")))
        return
    print(f"| model, {arguments.batch_size} photos, fp32 | gradient checkpointing | measured GiB | estimated GiB | ratio |")
    print("|---|---|---|---|---|")
    for model in ("ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP2-256"):
        for checkpointing in ("off", "on"):
            # Else the C library keeps freed blocks of up to 32 MB, and the process seems to need them still.
            environment = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
            flags = ("--batch-size", arguments.batch_size, "--only", model, checkpointing)
            found = in_own_process(__file__, *flags, environment=environment)
            ratio = found["estimated"] / found["measured"]
            print(
                f"| {model} | {checkpointing} | {found['measured']:.2f} | {found['estimated']:.2f} | {ratio:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
