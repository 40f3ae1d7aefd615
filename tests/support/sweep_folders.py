"""Folders of sweeps as a report reads them, made without a run, and what is printed of them."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fashionclip_tune.config.choices import RetrievalProtocol as Protocol
from fashionclip_tune.evaluation.protocols import QUERIES_FILE, Direction, Retrieval, save_retrieval
from fashionclip_tune.metrics import QueryRanks
from fashionclip_tune.reporting.terminal import comparison


def queries(num_right: int, seed: int) -> Retrieval:
    """200 queries of 100 products; ``num_right`` of them, here and there, are found first."""
    ranks = torch.full((200,), 50)
    ranks[torch.randperm(200, generator=torch.Generator().manual_seed(seed))[:num_right]] = 0
    one = torch.ones(200, dtype=torch.long)
    direction = Direction(QueryRanks(ranks, one, one), torch.arange(200) // 2, 200)
    return Retrieval(Protocol.INSTANCE, direction, direction)


def trial_row(number: int, recall: float, *, step: int = 10, state: str = "COMPLETE") -> dict[str, Any]:
    return {
        "trial_id": f"{number:04d}",
        "state": state,
        "stop_reason": "budget" if state == "COMPLETE" else None,
        "config": {"clip_model": "tiny-clip", "training.learning_rate": 1e-3},
        "step": step,
        "examples_seen": 16 * step,
        "duration_s": 3.0 * step,
        "device_s": 2.0 * step,
        "recall_at_10": recall,
        "recall_at_10_low": recall - 0.05,
        "recall_at_10_high": recall + 0.07,
        "untouched_recall_at_10": 0.25,
        "gain": recall - 0.25,
        "relative_gain": (recall - 0.25) / 0.25,
        "protocol": "instance",
        "num_gallery_images": 1200,
        "num_gallery_texts": 190,
    }


def write_sweep(folder: Path, num_right: list[int], *, data: str = "abc", kept_step: int = 10) -> Path:
    rows = [trial_row(number, right / 200) for number, right in enumerate(num_right)]
    for number, right in enumerate(num_right):
        path = folder / "trials" / f"{number:04d}-tiny-clip-contrastive" / QUERIES_FILE
        save_retrieval(path, queries(right, seed=number), step=kept_step, data=data)
    best = max(rows, key=lambda each: each["recall_at_10"])
    names = ("recall_at_10", "recall_at_10_low", "recall_at_10_high")
    metrics = {name: best[name] for name in names} | {
        "recall_at_5": 0.3,
        "protocol": "instance",
        "num_pairs": 200,
        "num_gallery_images": 1200,
        "num_gallery_texts": 190,
    }
    sweep = {
        "name": folder.name,
        "state": "FINISHED",
        "trials": rows,
        "zero_shot": {"tiny-clip": {"recall_at_10": 0.25}},
        "best": {"trial_id": best["trial_id"], "config": best["config"], "metrics": metrics},
    }
    (folder / "sweep.json").write_text(json.dumps(sweep))
    return folder


def printed(*folders: Path) -> str:
    """What a comparison of these sweeps prints."""
    written = io.StringIO()
    console = Console(width=200, file=written)
    for part in comparison(folders):
        console.print(part, soft_wrap=isinstance(part, str))
    return written.getvalue()


def change_sweep(folder: Path, **changes: Any) -> None:
    path = folder / "sweep.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
