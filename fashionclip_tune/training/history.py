"""What a run reported: an evaluation a JSON file, TensorBoard scalars over examples seen, a CSV, the seconds of its device."""

import csv
import io
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from fashionclip_tune.config.choices import LossFunctionOptions
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.evaluation.encode import EncodingSpeed
from fashionclip_tune.evaluation.protocols import DIRECTIONS
from fashionclip_tune.files import atomic_write, write_json

Row = dict[str, Any]
_EVENT_FILES = "events.out.tfevents.*"
# These say how long it took, not what came out: a stage that is trained again may differ in them.
TIMING = ("duration_s", "device_s", "samples_per_second", *EncodingSpeed._fields)
_TRAINING = (
    "loss",
    "learning_rate",
    "logit_scale",
    "logit_bias",
    "samples_per_second",
    *EncodingSpeed._fields,
    "micro_batch_size",
    "skipped_steps",
    "similarity_spread",
)


def read_history(run_dir: Path) -> list[Row]:
    """The rows of a run's evaluations, in the order of their steps.

    Raises:
        UserError: one cannot be read. Who goes on from them must not take a history with a hole for a whole one.
    """
    rows, torn = read_whole_rows(run_dir)
    if torn:
        raise UserError(
            f"{torn[0]} is torn or no JSON: put it back from a copy; a run that has not ended begins again without {run_dir}"
        )
    return rows


def read_whole_rows(run_dir: Path) -> tuple[list[Row], list[Path]]:
    """For people: the rows that can be read, and the files that cannot.

    On a durable side torn ones are to be expected after the loss of a machine; a sweep that goes on writes them again.
    """
    rows: list[Row] = []
    torn: list[Path] = []
    for file in sorted((run_dir / "evaluations").glob("step_*.json")):
        try:
            rows.append(json.loads(file.read_text()))
        except ValueError:
            torn.append(file)
    return rows, torn


class History:
    """Records a run's rows in its folder; a row that is there already is compared, not written again."""

    def __init__(self, run_dir: Path, *, first_new_examples: int) -> None:
        """``first_new_examples``: a resumed run writes from there on; TensorBoard drops what an earlier life wrote later.

        Where the rows before that were restored without their events, as after the loss of a machine, their scalars are
        written again.
        """
        self._run_dir = run_dir
        self._recorded = {row["step"]: row for row in read_history(run_dir)}
        has_events = any(run_dir.glob(_EVENT_FILES))
        _wait_for_a_later_name(run_dir)
        self._writer = SummaryWriter(str(run_dir), purge_step=first_new_examples)
        for row in self._recorded.values():
            if not has_events and row["examples_seen"] < first_new_examples:
                self._write_scalars(row)

    def show(self, answer_sheet: bytes | None, memory_bytes: int, examples_seen: int) -> None:
        """For TensorBoard only: a picture of what a few captions find (JPEG), and the memory in use."""
        self._writer.add_scalar("train/memory_gb", memory_bytes / 1e9, examples_seen)
        if answer_sheet is not None:
            with Image.open(io.BytesIO(answer_sheet)) as image:
                picture = Summary.Image(height=image.height, width=image.width, colorspace=3, encoded_image_string=answer_sheet)
            summary = Summary(value=[Summary.Value(tag="answers", image=picture)])
            self._writer.file_writer.add_summary(summary, examples_seen)  # type: ignore[attr-defined]

    def record(self, row: Row) -> str | None:
        """Writes a row, and returns how it differs from one that an earlier life of the run recorded, if it does."""
        self._write_scalars(row)
        self._writer.flush()
        earlier = self._recorded.get(row["step"])
        if earlier is None:
            write_json(self._run_dir / "evaluations" / f"step_{row['step']:08d}.json", row)
            self._recorded[row["step"]] = row
            return None
        return _difference(earlier, row)

    def _write_scalars(self, row: Row) -> None:
        for name, value in row.items():
            if (tag := scalar_tag(name)) is not None:
                self._writer.add_scalar(tag, value, row["examples_seen"])

    def close(self) -> None:
        self._writer.close()


def _wait_for_a_later_name(run_dir: Path) -> None:
    """TensorBoard reads event files by name, which starts with the second of their making.

    A life that follows another within a second could be read before it, and what it wrote taken for overtaken.
    """
    made = [int(path.name.split(".")[3]) for path in run_dir.glob(_EVENT_FILES)]
    while made and int(time.time()) == max(made):
        time.sleep(0.05)


def scalar_tag(name: str) -> str | None:
    """TensorBoard sorts by group: the recalls come first, each with a chart of its own, then what explains them."""
    if re.fullmatch(r"recall_at_\d+", name):
        return name
    if re.fullmatch(r"recall_at_\d+_(low|high)", name):
        return f"recall_interval/{name}"
    if name.startswith("recall_at_"):
        return f"recall_by_direction/{name}"
    if name.startswith("train_recall_at_"):
        return f"train_eval/{name}"
    return f"train/{name}" if name in _TRAINING else None


def _difference(earlier: Row, row: Row) -> str | None:
    for name, value in row.items():
        before = earlier.get(name)
        both_nan = isinstance(value, float) and isinstance(before, float) and math.isnan(value) and math.isnan(before)
        if name not in TIMING and value != before and not both_nan:
            return f"at step {row['step']}, {name} was {before} before the interruption and is {value} now"
    return None


COLUMNS = (
    "step",
    "model",
    "loss_function",
    *(f"recall@{k}_mean" for k in (5, 10)),
    *(f"recall@{k}_{direction}" for k in (5, 10) for direction in DIRECTIONS),
    "num_samples",
    "loss",
    "loss_type",
)


_LOSS_TYPES = {LossFunctionOptions.CONTRASTIVE: "clip_contrastive", LossFunctionOptions.SIGLIP: "siglip_bce"}


def write_training_log(config: ProjectConfig, out_dir: Path, rows: Sequence[Row]) -> Path:
    """Writes ``evaluations/training_log.csv`` below ``out_dir``, a line an evaluation.

    ``loss`` is the mean over the stage before an evaluation, and empty for the zero-shot weights.
    """
    path = out_dir / "evaluations" / "training_log.csv"
    loss_type = _LOSS_TYPES[config.loss_function]
    with atomic_write(path, newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            means = [row[f"recall_at_{k}"] for k in (5, 10)]
            directions = [row[f"recall_at_{k}_{direction}"] for k in (5, 10) for direction in DIRECTIONS]
            about = [row["step"], config.model_name, config.loss_function.value]
            writer.writerow([*about, *means, *directions, row["num_pairs"], row.get("loss", ""), loss_type])
    return path


class DeviceTime:
    """Counts the seconds of its device that a run takes; those of a stage that a kill threw away are lost.

    ``share``: of the device, that the run has: a second counts as so much of one.
    """

    def __init__(self, run_dir: Path, share: float) -> None:
        self.seconds = 0.0
        self._run_dir = run_dir
        self._share = share

    def go_on(self, checkpoint_s: float) -> None:
        """From what earlier lives took, as evaluations and the checkpoint that the run goes on from say."""
        self.seconds = max([checkpoint_s, *(row["device_s"] for row in read_history(self._run_dir))])

    @contextmanager
    def counting(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += self._share * (time.perf_counter() - started)
