#!/usr/bin/env python
"""Prints what a sweep of Fashion-Gen's size comes to on a notebook service's T4, wherever this is run.

    python -m benchmarks t4_plans --preset evening

These are the lines, from "trials" on, that the dry run of a sweep says there,

    python sweeps/run_sweep.py --space openclip --device cuda --gpu-memory-gb 15.8 --scratch DIR --dry-run --data SHARDS

with numbers of photos and a host that are stated instead of looked at, and as if the machine had not run a sweep before.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fashionclip_tune.data.dataset import RunShards
from fashionclip_tune.data.index import ShardIndex
from fashionclip_tune.machine.hardware import Machine
from fashionclip_tune.tuning.console.plan_text import plan_lines
from fashionclip_tune.tuning.planning import found
from fashionclip_tune.tuning.planning import plan as planning
from fashionclip_tune.tuning.planning.settings import SweepSettings

GB = 1_000_000_000


def photos(count: int) -> ShardIndex:
    """An index of so many photos, which nobody reads."""
    names, spans = np.arange(count).astype(str), np.zeros((count, 2), np.int64)
    zeros = np.zeros(count, np.int64)
    return ShardIndex(
        shards=(),
        contents=(),
        shard_sizes=zeros[:0],
        shard_of=zeros,
        keys=names,
        product_ids=names,
        categories=names,
        pixel_sizes=spans,
        image_spans=spans,
        num_captions=np.full(count, 3),
        caption_spans=np.zeros((3 * count, 2), np.int64),
        bad=(),
        caption_gaps=(),
        fingerprint="stated",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("quick", "evening", "night"), default="evening")
    parser.add_argument("--max-concurrent", type=int)
    parser.add_argument("--disk-budget-gb", type=float)
    parser.add_argument("--gpu-memory-gb", type=float, default=15.8)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--memory-gb", type=float, default=12.7, help="of the host (default: %(default)s)")
    parser.add_argument("--train", type=int, default=260_000, help="photos to train on (default: %(default)s)")
    parser.add_argument("--valid", type=int, default=7_000, help="photos to evaluate on (default: %(default)s)")
    parser.add_argument("--clip-rows", type=int, default=8_149, help="distinct tokens of the captions (default: %(default)s)")
    given = parser.parse_args(arguments)
    data = photos(given.train), photos(given.valid)
    finder: Any = found
    finder.run_shards, finder.load_data = lambda config: RunShards((), (), ()), lambda *about: data
    for planner in (finder, planning):
        planner.rows_of_captions = lambda *about: given.clip_rows
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASHIONCLIP_CACHE"] = str(Path(folder) / "cache")  # no rates of sweeps before
        settings = SweepSettings(
            data=folder,
            space="openclip",
            device="cuda",
            preset=given.preset,
            max_concurrent=given.max_concurrent,
            disk_budget_gb=given.disk_budget_gb,
            gpu_memory_gb=given.gpu_memory_gb,
            scratch=str(Path(folder) / "scratch"),
        )
        host = Machine(given.cores, int(given.memory_gb * GB), 4 * GB)
        plan = planning.plan_sweep(settings, dry_run=True, machine=host)
    lines = plan_lines(plan)
    first = next(number for number, line in enumerate(lines) if line.startswith("trials:"))
    print("\n".join(lines[first:]))  # those before are about the space, and data that is not there


if __name__ == "__main__":
    main()
