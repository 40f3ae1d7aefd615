"""A sweep's trials as its files have them: the ranking, the best, what is told apart. Never touches a live run."""

import csv
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from fashionclip_tune.errors import SCORES_NOTHING, UserError, rung_of
from fashionclip_tune.evaluation.evaluate import gain
from fashionclip_tune.evaluation.metric import Metric, metric_of
from fashionclip_tune.evaluation.protocols import QUERIES_FILE, Retrieval, compare, load_retrieval
from fashionclip_tune.evaluation.statistics import PairedTest
from fashionclip_tune.files import atomic_write
from fashionclip_tune.models.named_model import exported_trial, loading_call
from fashionclip_tune.storage.checkpoint import weights_at


class _Always(TypedDict):
    trial_id: str
    config: dict[str, Any]
    """What the space drew and ``--set`` fixed, by dotted path."""
    start: str
    """The short name of what it starts from; in files of older versions ``start_of`` says it."""
    state: str
    stop_reason: str | None
    message: str | None
    step: int
    examples_seen: int
    recall_at_10: float | None
    recall_at_5: float | None
    samples_per_second: float | None
    duration_s: float
    device_s: float


class TrialRow(_Always, total=False):
    """A trial in ``sweep.json`` and ``trials.csv``. Those below are missing in files of older versions, or None."""

    recall_at_10_low: float | None
    recall_at_10_high: float | None
    untouched_recall_at_10: float | None
    gain: float | None
    relative_gain: float | None
    max_recall_at_10: float | None
    recall_change: float | None
    images_encoded_per_second: float | None
    texts_encoded_per_second: float | None
    protocol: str | None
    num_gallery_images: int | None
    num_gallery_texts: int | None
    metrics: dict[str, Any]
    """While the sweep runs: of the last evaluation."""


_NOT_IN_CSV = ("config", "message", "metrics")  # settings have columns of their own

_SWEEP_NAMES = ("name", "state", "best", "trials")  # of sweep.json, what every version wrote

FREED = ("freed_bytes", "freed_durable_bytes")
"""Of sweep.json: what was removed of ended trials, where the sweep ran, and with a scratch folder in the results."""


PAUSED = "PAUSED"
"""The state of a trial that waits at a rung, to be thawed or to end there."""


def is_open(row: Mapping[str, Any]) -> bool:
    """Whether a trial has no end yet: it runs, was interrupted, or waits at a rung."""
    return row["state"] in ("RUNNING", PAUSED)


def waiting_rungs(sweep: Mapping[str, Any]) -> list[int]:
    """The examples seen at which trials of a sweep wait for one another, rising; none where trials end at rungs, if at all."""
    search = sweep.get("search")
    rungs = search.get("rungs") if isinstance(search, dict) else None
    return [rung for rung in rungs if isinstance(rung, int)] if isinstance(rungs, list) else []


def paused_at(row: TrialRow, sweep: Mapping[str, Any]) -> int | None:
    """The rung at which a trial waits, or waited for the last time until it ended; the lowest is 1. None: at none.

    Nothing is said by that of its settings but that others promised more for their cost.
    """
    rungs = waiting_rungs(sweep)
    if row["state"] == PAUSED:
        return sum(rung <= row["examples_seen"] for rung in rungs) or None
    return rung_of(row["stop_reason"]) if rungs else None


def read_sweep(sweep_dir: Path) -> dict[str, Any]:
    """The contents of a sweep's ``sweep.json``.

    Raises:
        UserError: the folder is no sweep.
    """
    path = sweep_dir / "sweep.json"
    try:
        sweep = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{sweep_dir} is no sweep: {path} cannot be read ({error})") from error
    if not isinstance(sweep, dict) or any(name not in sweep for name in _SWEEP_NAMES) or not isinstance(sweep["trials"], list):
        raise UserError(f"{sweep_dir} is no sweep: {path} is some other file, without {', '.join(_SWEEP_NAMES)} of a sweep")
    return sweep


def start_of(row: Mapping[str, Any]) -> str:
    """The name by which a trial's start is told apart from others of its sweep."""
    return str(row.get("start") or row["config"].get("clip_model", ""))


def figure_or_nothing(value: float | None, form: str) -> str:
    """For a cell of a table."""
    return "" if value is None else format(value, form)


def ranked(rows: Sequence[TrialRow], metric: Metric) -> list[TrialRow]:
    """Trials with a score, best first; equal ones in the order in which they started."""
    scored = [row for row in rows if metric.of(row) is not None and row["state"] != "FAIL"]
    return sorted(scored, key=lambda row: (-metric.score(row), row["trial_id"]))


def best_row(rows: Sequence[TrialRow], metric: Metric) -> TrialRow | None:
    """The trial with the highest metric at its last evaluation, among those that have ended with a result or wait."""
    ended = [row for row in ranked(rows, metric) if row["state"] in ("COMPLETE", "PRUNED", PAUSED) and not has_failed(row)]
    return ended[0] if ended else None


def has_failed(row: TrialRow) -> bool:
    """Whether a trial ended without a result: with a mistake, for want of memory or diverged. People are to be told why."""
    return bool(row["state"] == "FAIL" or row["stop_reason"] in SCORES_NOTHING)


def failure_lines(rows: Sequence[TrialRow]) -> list[str]:
    """Of each trial that failed, how and why."""
    failed = (row for row in rows if has_failed(row))
    return [f"failed: trial {row['trial_id']} ({row['stop_reason']}): {row['message']}" for row in failed]


def loss_label(loss: str | None) -> str:
    """Of a ``loss_function``, as the field calls it: tables and figures have no other words."""
    return {"contrastive": "InfoNCE", "siglip": "sigmoid"}.get(loss or "", loss or "")


def end_of(row: TrialRow, sweep: Mapping[str, Any]) -> str:
    """How a trial ended or where it is: it runs only as long as its sweep does."""
    if (rung := paused_at(row, sweep)) is not None:
        return f"paused at rung {rung}"
    now = "paused" if row["state"] == PAUSED else "running" if sweep["state"] == "RUNNING" else "interrupted"
    return str(row["stop_reason"] or now).replace("_", " ")


def write_trials_csv(rows: Sequence[TrialRow], path: Path) -> None:
    """One row a trial, one column a figure, or a setting that any trial has."""
    known = (*TrialRow.__annotations__, *(name for row in rows for name in row))  # those of another metric are behind them
    figures = [name for name in dict.fromkeys(known) if name not in _NOT_IN_CSV]
    settings = list(dict.fromkeys(name for row in rows for name in row["config"]))
    with atomic_write(path, newline="") as file:
        writer = csv.DictWriter(file, [*figures, *settings], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, **row["config"]} for row in rows)


def last_queries(sweep_dir: Path, row: TrialRow) -> tuple[Retrieval, dict[str, Any]] | None:
    """The queries of a trial's last evaluation, and of what they are; None where they were not kept."""
    for folder in sweep_dir.glob(f"trials/{row['trial_id']}-*"):
        return queries_at(folder, row["step"])
    return None


def queries_at(run_dir: Path, step: int) -> tuple[Retrieval, dict[str, Any]] | None:
    """The queries of a run's last evaluation, where that was at this step and they were kept; and of what they are."""
    try:
        retrieval, about = load_retrieval(run_dir / QUERIES_FILE)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return (retrieval, about) if about["step"] == step else None


def compare_trials(first_dir: Path, first: TrialRow, second_dir: Path, second: TrialRow, metric: Metric) -> PairedTest | None:
    """What one trial is better by in the metric; None where they were not evaluated on the same queries."""
    one, other = last_queries(first_dir, first), last_queries(second_dir, second)
    if one is None or other is None or one[1]["data"] != other[1]["data"]:
        return None
    return compare(one[0], other[0], metric.k, metric.directions)


def tests_of_best(sweep_dir: Path, rows: Sequence[TrialRow], metric: Metric) -> dict[str, PairedTest | None]:
    """What the best trial is better by than each other one that has ended; None where their queries were not the same."""
    best = best_row(rows, metric)
    if best is None:
        return {}
    others = [row for row in ranked(rows, metric) if row["trial_id"] != best["trial_id"] and not is_open(row)]
    return {row["trial_id"]: compare_trials(sweep_dir, best, sweep_dir, row, metric) for row in others}


def ties_with_best(sweep_dir: Path, rows: Sequence[TrialRow], metric: Metric) -> set[str]:
    """Trials whose difference to the best one is inside chance."""
    return {name for name, test in tests_of_best(sweep_dir, rows, metric).items() if test is not None and test.is_tie}


def freed_line(sweep: Mapping[str, Any]) -> str | None:
    """What room was made in the life of a sweep; None where nothing was removed."""
    here, durable = (sweep.get(name, 0) / 1e6 for name in FREED)
    if not here and not durable:
        return None
    where = f"{durable:,.0f} MB in the results, {here:,.0f} MB in the scratch folder" if durable else f"{here:,.0f} MB"
    return f"freed {where}: states of ended trials, and weights of those that are not among the best of their model"


def zero_shot_lines(sweep: Mapping[str, Any], winner: str, metrics: Mapping[str, Any]) -> list[str]:
    """Of a winner that is below the zero-shot figure of one of the sweep's models: that it is, and which weights to use.

    Args:
        winner: what is compared, for the sentence.
        metrics: its evaluation's; figures of another protocol are not compared with it.
    """
    metric, protocol = metric_of(sweep), metrics.get("protocol")
    recall = metric.score(metrics)
    measured = [row for row in sweep["trials"] if row.get("protocol") == protocol or protocol is None]
    known = [(zero_shot, row) for row in measured if (zero_shot := metric.zero_shot(row)) is not None]
    zero_shot, top = max(known, key=lambda each: each[0], default=(0.0, None))
    if top is None or recall >= zero_shot:
        return []
    model = str(top["config"].get("clip_model", "?"))
    pretrained = _pretrained(sweep, top)
    below = f"{winner} is below zero-shot: {metric.name} {recall:.4f}, but {zero_shot:.4f} of the zero-shot weights of "
    below += start_of(top) + (f" (model.pretrained = {pretrained})" if pretrained != "default" else "")
    refit = (sweep.get("refit") or {}).get("metrics", {})
    if refit.get("protocol") == protocol and metric.score(refit) >= zero_shot:
        return [f"{below}. The refit is not: use that"]
    call = loading_call(model, pretrained)
    return [
        f"{below}. Use those: fine-tuning has not made them better",
        *([f"      load them: {call}"] if call else []),
    ]


def _pretrained(sweep: Mapping[str, Any], row: TrialRow) -> str | None:
    """Which weights a trial started from; a checkpoint to load takes the place of ``model.pretrained``."""
    settings = {**sweep.get("base_config", {}), **row["config"]}
    if settings.get("should_load_checkpoint"):
        return str(weights_at(Path(settings["checkpoint_path"])))
    return cast(str | None, settings.get("model.pretrained", "default"))


def load_line(sweep_dir: Path, winner: str) -> str:
    """How to load the winner, where ``best/`` has its weights; else whose it has."""
    place, exported = sweep_dir / "best", exported_trial(sweep_dir / "best")
    if exported == winner:
        return f'      load it: open_clip.create_model_and_transforms("local-dir:{place}")'
    there = f"has trial {exported}" if exported is not None else "does not say whose weights it has" if place.is_dir() else ""
    return f"      it is not in {place} yet{there and ', which ' + there}: that is written when the sweep ends or stops"


def refit_lines(sweep: Mapping[str, Any], sweep_dir: Path) -> list[str]:
    """What training the winner's setting for longer came to, beside the trial; nothing where it was not."""
    refit = sweep.get("refit")
    if refit is None:
        return []
    metric, best = metric_of(sweep), sweep["best"]
    recall, before = metric.score(refit["metrics"]), metric.score(best["metrics"])
    below = zero_shot_lines(sweep, "the refit", refit["metrics"])
    return [
        f"refit: {refit['times']} times the examples ({refit['examples_seen']:,}), {metric.name} {recall:.4f}; "
        f"trial {best['trial_id']} {before:.4f}; {gain(recall, before)}",
        f'      load it: open_clip.create_model_and_transforms("local-dir:{sweep_dir / "refit" / "best"}")',
        *below,
    ]
