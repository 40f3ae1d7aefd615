#!/usr/bin/env python
"""What training only the rows of the token table that occur saves: bytes of training state and of checkpoints, time of a step.

    python -m benchmarks token_rows
    python -m benchmarks token_rows --peak --batch-size 64       # on a card: the allocator's peak over two steps

Edition 1 trains the whole table, edition 2 the rows that occur. Random weights; tokens are drawn from as many rows as a
caption set has (--clip-rows, twice as many of SigLIP2's tokenizer, which is on the hub), at random places of the table. Each
model has a process of its own with one thread, in which a step of either edition follows the other's.
"""

import argparse
import copy
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.speed.harness import in_own_process, in_turn

MODELS = ("ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP2-256")
EDITIONS = ("1", "2")
GIB = 2**30


def trainers(arguments: argparse.Namespace, editions: tuple[str, ...], device: str) -> tuple[dict[str, Any], Any]:
    """A trainer of each edition on the same weights, and a batch for them."""
    import torch

    from fashionclip_tune.config.project import ProjectConfig
    from fashionclip_tune.models.openclip import LoadedModel, load_random_model
    from fashionclip_tune.models.precision import plan_precision
    from fashionclip_tune.models.token_rows import use_token_rows
    from fashionclip_tune.profiling.probe import random_batch
    from fashionclip_tune.training.trainer import Trainer

    logging.disable(logging.WARNING)
    settings = {"model.pretrained": None, "training.batch_size": arguments.batch_size}
    config = ProjectConfig(clip_model=arguments.only, device=device).with_overrides(settings)
    loaded = load_random_model(config)
    torch.manual_seed(0)
    batch = random_batch(config, loaded)
    table = getattr(loaded.network, "text", loaded.network).token_embedding.weight
    is_clips = "hf_tokenizer_name" not in loaded.model_config["text_cfg"]
    num_rows = arguments.clip_rows if is_clips else 2 * arguments.clip_rows
    rows_U = torch.randperm(len(table))[:num_rows].sort().values
    batch.tokens_BL[:] = rows_U[torch.randint(num_rows, batch.tokens_BL.shape)]
    made = {}
    for edition in editions:
        copied = LoadedModel(**{**vars(loaded), "network": copy.deepcopy(loaded.network)})
        own = config.with_overrides({"training.edition": int(edition)})
        use_token_rows(copied.network, own, lambda: rows_U)
        made[edition] = Trainer(copied, own, 100, plan_precision(own))
    return made, batch


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from fashionclip_tune.models.token_rows import untrained_tables
    from fashionclip_tune.storage.checkpoint import save_checkpoint, tables_to_save

    torch.set_num_threads(1)
    made, batch = trainers(arguments, EDITIONS, "cpu")

    def step(edition: str) -> float:
        started = time.process_time()  # whatever else the machine does
        made[edition].run_stage(iter([batch]), 1, lambda batch: None)
        return time.process_time() - started

    in_turn(EDITIONS, 1, step)  # makes Adam's moments
    seconds = in_turn(EDITIONS, arguments.rounds, step)
    found: dict[str, Any] = {"ratio": statistics.median(a / b for a, b in zip(seconds["1"], seconds["2"], strict=True))}
    for edition, trainer in made.items():
        network, state = trainer.network, trainer.state_dict()
        on_card = [*network.parameters(), *network.buffers()]
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        moments = [tensor for each in state["optimizer"]["state"].values() for tensor in each.values()]
        trained_bytes = sum(each.nbytes for each in trained)
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            tables = tables_to_save(place, untrained_tables(network))
            record = {"step": trainer.step, "fingerprint": "", "config": {}, "history": []}
            checkpoint = save_checkpoint(place, network.state_dict(), state, record, tables)
            sizes = [sum(file.stat().st_size for file in each.glob("*")) for each in (checkpoint, place / "token_table")]
        found[edition] = {
            "trained": sum(each.numel() for each in trained),
            "state": sum(each.nbytes for each in on_card) + trained_bytes + sum(each.nbytes for each in moments),
            "checkpoint": sizes[0],
            "once": sizes[1],
            "seconds": statistics.median(seconds[edition]),
        }
    return found


def peak(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    found = {}
    for edition in EDITIONS:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        made, batch = trainers(arguments, (edition,), "cuda")
        made[edition].run_stage(iter([batch.pin_memory()] * 2), 2, lambda batch: None)
        found[edition] = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        del made
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--clip-rows", type=int, default=8_149, metavar="N", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--peak", action="store_true", help="on a card")
    parser.add_argument("--only", metavar="MODEL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps((peak if arguments.peak else measure)(arguments)))
        return
    flags = ["--clip-rows", arguments.clip_rows, "--batch-size", arguments.batch_size, "--rounds", arguments.rounds]
    if arguments.peak:
        print("| model | edition | allocated at most, GiB | reserved at most, GiB |\n|---|---|---|---|")
    else:
        print(
            f"| model | edition | parameters trained, M | training state, GiB | checkpoint, GB | beside it once, GB "
            f"| step of {arguments.batch_size}, CPU s | edition 1 over 2 |\n|---|---|---|---|---|---|---|---|"
        )
    for model in arguments.models:
        found = in_own_process(__file__, *flags, *(["--peak"] if arguments.peak else []), "--only", model)
        for edition in EDITIONS:
            each = found[edition]
            if arguments.peak:
                cells = [f"{each[what] / GIB:.2f}" for what in ("allocated", "reserved")]
            else:
                cells = [f"{each['trained'] / 1e6:.1f}", f"{each['state'] / GIB:.2f}"]
                cells += [f"{each[what] / 1e9:.2f}" for what in ("checkpoint", "once")]
                cells += [f"{each['seconds']:.2f}", f"{found['ratio']:.2f}" if edition == EDITIONS[-1] else ""]
            print(f"| {' | '.join([model, edition, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
