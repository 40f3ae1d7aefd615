"""Shows a running sweep: a live table on a terminal, one line an event elsewhere."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from fashionclip_tune.errors import StopReason, rung_of
from fashionclip_tune.evaluation.metric import Metric, metric_of
from fashionclip_tune.reporting.sweep_files import (
    PAUSED,
    TrialRow,
    figure_or_nothing,
    has_failed,
    is_open,
    loss_label,
    paused_at,
    ranked,
    start_of,
    waiting_rungs,
)

_WORDS = ("trial", "model", "loss")
_NUMBERS = ("lr", "stage", "{metric}", "change", "ex/s")
_NARROW, _NARROW_MODEL = 100, 14
# Around the trials: a title of up to two lines, up to three below them, headers, the line that the cursor stands in.
_OTHER_LINES = 7
# Free at the right: a terminal shows ^C where the cursor is, and a line that is full would be broken by it.
_FREE_COLUMNS = 3


@dataclass
class Progress:
    """Shows a sweep's rows; a context manager, so that the terminal is left whole whatever happens."""

    console: Console
    _: KW_ONLY
    num_trials: int
    side_by_side: int
    budget_examples: int
    """What a trial may train on."""
    stage_examples: int
    """What lies between its evaluations."""
    expected_examples: float
    """What a trial of such a sweep trains on in the mean, early stops included."""

    def __post_init__(self) -> None:
        self._said: dict[str, tuple[Any, ...]] = {}
        self._sweep: Mapping[str, Any] = {"name": "", "elapsed_s": 0.0, "trials": []}
        self._shown_at = time.monotonic()
        # Drawn again between events, too, so that the time goes on.
        self._live = (
            Live(console=self.console, get_renderable=self._table, refresh_per_second=2) if self.console.is_terminal else None
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def show(self, sweep: Mapping[str, Any]) -> None:
        self._sweep, self._shown_at = sweep, time.monotonic()
        for row in sweep["trials"]:
            now, before = (row["examples_seen"], row["state"]), self._said.get(row["trial_id"])
            is_news = before != now
            self._said[row["trial_id"]] = now
            if is_news and (self._live is None or has_failed(row)):  # a message has no room in the table
                end = "" if is_open(row) else f"  ({self._counted()}{self._left()})"
                thawed = "  thawed" * (row["state"] == "RUNNING" and before is not None and before[1] == PAUSED)
                self.console.print(_line(row, sweep) + thawed + end, highlight=False, soft_wrap=True, markup=False)
        if self._live:
            self._live.start(refresh=True)

    def _counted(self, what: str = "") -> str:
        rows: Sequence[TrialRow] = self._sweep["trials"]
        ended, paused = sum(not is_open(row) for row in rows), sum(row["state"] == PAUSED for row in rows)
        return f"{ended} of {self.num_trials}{what} ended" + f", {paused} paused" * (paused > 0)

    def _left(self) -> str:
        seconds = self.seconds_left(self._sweep["trials"])
        return time_left(None if seconds is None else seconds - (time.monotonic() - self._shown_at))

    def seconds_left(self, rows: Sequence[TrialRow]) -> float | None:
        """Until the last trial ends, at the pace of the trials so far; None before one has come to its first evaluation.

        A trial that has not begun takes what is usual, one that has gone beyond that is taken to go to its budget. Where trials
        wait for one another, what all of them are expected to take is what counts.
        """
        examples: int = sum(row["examples_seen"] for row in rows)
        if not examples:
            return None
        running = [row["examples_seen"] for row in rows if row["state"] == "RUNNING"]
        expected = self.expected_examples
        to_come = sum((expected if seen <= expected else self.budget_examples) - seen for seen in running)
        not_begun = max(0, self.num_trials - len(rows))
        at_a_time = max(1, min(self.side_by_side, len(running) + not_begun))
        to_come += expected * not_begun
        if waiting_rungs(self._sweep):
            to_come, at_a_time = max(0.0, expected * self.num_trials - examples), self.side_by_side
        spent_s: float = sum(row["duration_s"] for row in rows if row["examples_seen"])
        return float(to_come * spent_s / examples / at_a_time)

    def _table(self) -> Table | str:
        sweep, rows = self._sweep, self._sweep["trials"]
        took_s = sweep["elapsed_s"] + time.monotonic() - self._shown_at
        so_far = f"{took_s / 60:.0f} min" if took_s >= 90 else f"{took_s:.0f} s"
        if not rows:
            return escape(f"{sweep['name']}: starting, {so_far}")
        shown = _newest(rows, max(3, self.console.height - _OTHER_LINES))
        metric = metric_of(sweep)
        names = _shortened(
            {start_of(row) for row in rows}, _NARROW_MODEL if self.console.width < _NARROW else self.console.width
        )
        cells = [self._cells(row, metric, names[start_of(row)]) for row in shown]
        headers = [header.format(metric=metric.short) for header in (*_WORDS, *_NUMBERS)]
        widths = [max(len(text) for text in (header, *column)) for header, *column in zip(headers, *cells, strict=True)]
        room = self.console.width - _FREE_COLUMNS - sum(width + 1 for width in widths)
        best = ranked([row for row in rows if row["examples_seen"] > 0 and not has_failed(row)], metric)[:1]
        below = [f"best so far: trial {row['trial_id']}, {start_of(row)}, {metric.score(row):.4f}" for row in best]
        if hidden := [row for row in rows if row not in shown]:
            below += [f"{len(hidden)} more have ended" + " or are paused" * any(map(is_open, hidden))]
        table = Table(
            title=escape(f"{sweep['name']}: {self._counted(' trials')}, {so_far} so far{self._left()}"),
            caption=escape("; ".join([*below, f"lr: learning rate, ex/s: examples a second, {metric.legend}"])),
            title_justify="left",
            caption_justify="left",
            box=None,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for header in headers:
            table.add_column(header, justify="left" if header in _WORDS else "right", no_wrap=True)
        table.add_column("state", no_wrap=True)
        for row, texts in zip(shown, cells, strict=True):
            style = "bold" if row in best else "red" if has_failed(row) else "" if row["state"] == "RUNNING" else "dim"
            table.add_row(*map(escape, (*texts, _fitting(row, sweep, room))), style=style)
        return table

    def _cells(self, row: TrialRow, metric: Metric, model: str) -> list[str]:
        config = row["config"]
        rate = config.get("training.learning_rate")
        return [
            row["trial_id"],
            model,
            loss_label(config.get("loss_function")),
            "" if rate is None else f"{rate:.1e}".replace("e-0", "e-"),
            f"{row['examples_seen'] // self.stage_examples}/{-(-self.budget_examples // self.stage_examples)}",
            figure_or_nothing(metric.of(row), ".4f"),
            figure_or_nothing(row.get("recall_change"), "+.4f"),
            figure_or_nothing(row.get("samples_per_second"), ",.0f"),
        ]


def _shortened(names: Collection[str], most: int) -> dict[str, str]:
    """Each in so many characters at most: without its end, or its beginning where two would look alike, or whole."""
    found = {name: name for name in names}
    for cut in (lambda name: f"{name[: most - 1]}…", lambda name: f"…{name[1 - most :]}"):
        short = {name: name if len(name) <= most else cut(name) for name in names}
        if len(set(short.values())) == len(names):
            return short
    return found


def time_left(seconds: float | None) -> str:
    """``, about 3 min left``; nothing where it is not known, or over."""
    if seconds is None or seconds <= 0:
        return ""
    if seconds < 90:
        return f", about {seconds:.0f} s left"
    return f", about {seconds / 60:.0f} min left" if seconds < 5400 else f", about {seconds / 3600:.1f} h left"


def _newest(rows: Sequence[TrialRow], count: int) -> list[TrialRow]:
    """What runs, then what was started last, in the order of their numbers."""
    last_first = sorted(rows, key=lambda row: (row["state"] == "RUNNING", row["trial_id"]), reverse=True)
    return sorted(last_first[:count], key=lambda row: str(row["trial_id"]))


def _line(row: TrialRow, sweep: Mapping[str, Any]) -> str:
    config, metric = row["config"], metric_of(sweep)
    what = f"trial {row['trial_id']}  {start_of(row)} {loss_label(config.get('loss_function'))}"
    if (recall := metric.of(row)) is None:
        return f"{what:<36}  {row['examples_seen']:>9,} examples  " + (
            "started" if row["state"] == "RUNNING" else _state(row, sweep)
        )
    change = "" if row.get("recall_change") is None else f" ({row['recall_change']:+.4f})"
    speed = "" if row.get("samples_per_second") is None else f"  {row['samples_per_second']:,.0f} examples/s"
    state = "" if row["state"] == "RUNNING" else f"  {_state(row, sweep)}"
    return f"{what:<36}  {row['examples_seen']:>9,} examples  {metric.name} {recall:.4f}{change}{speed}{state}"


def _fitting(row: TrialRow, sweep: Mapping[str, Any], room: int) -> str:
    """A trial's state in one line of the table."""
    long = short = _state(row, sweep)
    reason = row["stop_reason"] or ""
    if (rung := paused_at(row, sweep)) is not None:
        long, short = f"paused at rung {rung}", f"rung {rung}, paused"
    elif (rung := rung_of(reason)) is not None:
        long, short = f"rung {rung}: others were ahead", f"rung {rung}, behind"
    elif reason:
        short = "whole budget" if reason == StopReason.BUDGET else reason.replace("_", " ")
    text = long if len(long) <= room else short
    return text if len(text) <= room else text[: max(0, room - 1)] + "…"


def _state(row: TrialRow, sweep: Mapping[str, Any]) -> str:
    """What a trial is at, or how it ended: at which rung and why, where it was stopped or waited."""
    reason = row["stop_reason"] or ""
    if row["state"] == "RUNNING":
        return "running"
    if (rung := paused_at(row, sweep)) is not None:
        return f"paused at rung {rung} after {row['examples_seen']:,} examples"
    if reason == StopReason.BUDGET:
        return "COMPLETE: whole budget"
    if (rung := rung_of(reason)) is not None:
        return f"stopped at rung {rung}: others were ahead after {row['examples_seen']:,} examples"
    return f"{row['state']} {reason}" + (f": {row['message']}" if row["message"] else "")
