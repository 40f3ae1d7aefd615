"""A run's evaluations as one CSV file in the columns of the published runs, so that curves can be laid side by side."""

import csv
from collections.abc import Sequence
from pathlib import Path

from fashionclip_tune.config import LossFunctionOptions, ProjectConfig
from fashionclip_tune.history import Row

_DIRECTIONS = ("text_to_image", "image_to_text")
COLUMNS = (
    "step",
    "model",
    "loss_function",
    *(f"recall@{k}_mean" for k in (5, 10)),
    *(f"recall@{k}_{direction}" for k in (5, 10) for direction in _DIRECTIONS),
    "num_samples",
    "loss",
    "loss_type",
)


def write_training_log(config: ProjectConfig, out_dir: Path, rows: Sequence[Row]) -> Path:
    """Writes ``evaluations/training_log.csv`` below ``out_dir``, a line an evaluation.

    ``loss`` is the mean over the stage before an evaluation, and empty for the untouched weights.
    """
    path = out_dir / "evaluations" / "training_log.csv"
    loss_type = "siglip_bce" if config.loss_function is LossFunctionOptions.SIGLIP else "clip_contrastive"
    unfinished = path.with_name(f".{path.name}.tmp")
    with open(unfinished, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            means = [row[f"recall_at_{k}"] for k in (5, 10)]
            directions = [row[f"recall_at_{k}_{direction}"] for k in (5, 10) for direction in _DIRECTIONS]
            about = [row["step"], config.model_name, config.loss_function.value]
            writer.writerow([*about, *means, *directions, row["num_pairs"], row.get("loss", ""), loss_type])
    unfinished.replace(path)
    return path
