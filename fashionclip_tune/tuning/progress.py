"""What a person sees while a sweep runs: a live table on a terminal, one line an event elsewhere."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

_SHOWN_ROWS = 24
_LOSSES = {"contrastive": "InfoNCE", "siglip": "sigmoid"}


class Progress:
    """Shows a sweep's rows; a context manager, so that the terminal is left whole whatever happens.

    ``budget_examples`` and ``stage_examples`` are what a trial may train on, and what lies between its evaluations.
    """

    def __init__(
        self, console: Console, *, num_trials: int, side_by_side: int, budget_examples: int, stage_examples: int
    ) -> None:
        self._console = console
        self._num_trials = num_trials
        self._side_by_side = side_by_side
        self._stage_examples = stage_examples
        self._num_stages = -(-budget_examples // stage_examples)
        self._said: dict[str, tuple[Any, ...]] = {}
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def show(self, sweep: Mapping[str, Any]) -> None:
        rows = sweep["trials"]
        ended = sum(row["state"] != "RUNNING" for row in rows)
        left = time_left(seconds_left(rows, self._num_trials, self._side_by_side))
        if self._live:
            self._live.update(
                self._table(rows, f"{sweep['name']}: {ended} of {self._num_trials} trials ended{left}"), refresh=True
            )
            return
        for row in rows:
            now = (row["examples_seen"], row["state"])
            if self._said.get(row["trial_id"]) != now:
                self._said[row["trial_id"]] = now
                end = f"  ({ended} of {self._num_trials} ended{left})" if row["state"] != "RUNNING" else ""
                self._console.print(_line(row) + end, highlight=False, soft_wrap=True)

    def _table(self, rows: Sequence[Mapping[str, Any]], title: str) -> Table:
        table = Table(title=title, box=None, padding=(0, 1, 0, 0), pad_edge=False)
        for header in ("trial", "model", "loss"):
            table.add_column(header, no_wrap=True)
        for header in ("lr", "stage", "R@10", "change", "photos/s"):
            table.add_column(header, justify="right", no_wrap=True)
        table.add_column("state")
        for row in rows[-_SHOWN_ROWS:]:  # the newest: a long table would push them out of the window
            config = row["config"]
            rate = config.get("training.learning_rate")
            table.add_row(
                row["trial_id"],
                config.get("clip_model", ""),
                _LOSSES.get(config.get("loss_function", ""), ""),
                "" if rate is None else f"{rate:.1e}".replace("e-0", "e-"),
                f"{row['examples_seen'] // self._stage_examples}/{self._num_stages}",
                _figure(row["recall_at_10"], ".4f"),
                _figure(row.get("recall_change"), "+.4f"),
                _figure(row.get("samples_per_second"), ",.0f"),
                _state(row),
            )
        return table


def seconds_left(rows: Sequence[Mapping[str, Any]], num_trials: int, side_by_side: int) -> float | None:
    """Until the last trial ends, if the others take as long as the ended ones did, early stops included; None before one has.

    Trials that failed at once say nothing of how long one takes.
    """
    ended: list[float] = [row["duration_s"] for row in rows if row["state"] in ("COMPLETE", "PRUNED")]
    if not ended:
        return None
    usual = sum(ended) / len(ended)
    running: float = sum(max(0.0, usual - row["duration_s"]) for row in rows if row["state"] == "RUNNING")
    return (running + usual * max(0, num_trials - len(rows))) / side_by_side


def time_left(seconds: float | None) -> str:
    """``, about 3 min left``; nothing where it is not known, or over."""
    if not seconds:
        return ""
    if seconds < 90:
        return f", about {seconds:.0f} s left"
    return f", about {seconds / 60:.0f} min left" if seconds < 5400 else f", about {seconds / 3600:.1f} h left"


def _line(row: Mapping[str, Any]) -> str:
    config = row["config"]
    what = f"trial {row['trial_id']}  {config.get('clip_model', '')} {config.get('loss_function', '')}"
    if row["recall_at_10"] is None:
        return f"{what:<36}  {row['examples_seen']:>9,} examples  " + ("started" if row["state"] == "RUNNING" else _state(row))
    change = "" if row.get("recall_change") is None else f" ({row['recall_change']:+.4f})"
    speed = "" if row.get("samples_per_second") is None else f"  {row['samples_per_second']:,.0f} photos/s"
    state = "" if row["state"] == "RUNNING" else f"  {_state(row)}"
    return f"{what:<36}  {row['examples_seen']:>9,} examples  recall_at_10 {row['recall_at_10']:.4f}{change}{speed}{state}"


def _state(row: Mapping[str, Any]) -> str:
    """What a trial is at, or how it ended: at which rung and why, where it was stopped."""
    reason = row["stop_reason"] or ""
    if row["state"] == "RUNNING":
        return "running"
    if reason == "budget":
        return "COMPLETE: whole budget"
    if reason.startswith("rung_"):
        rung = reason.removeprefix("rung_")
        return f"stopped at rung {rung}: others of its model were ahead after {row['examples_seen']:,} photos"
    return f"{row['state']} {reason}" + (f": {row['message']}" if row["message"] else "")


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
