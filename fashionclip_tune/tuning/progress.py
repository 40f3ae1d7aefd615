"""What a person sees while a sweep runs: a live table on a terminal, one line an event elsewhere."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live

from fashionclip_tune.report import trials_table

_SHOWN_ROWS = 24


class Progress:
    """Shows a sweep's rows; a context manager, so that the terminal is left whole whatever happens."""

    def __init__(self, console: Console, num_trials: int) -> None:
        self._console = console
        self._num_trials = num_trials
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
        if self._live:
            ended = sum(row["state"] != "RUNNING" for row in rows)
            title = f"{sweep['name']}: {ended} of {self._num_trials} trials ended"
            # The newest rows: a long table would push them out of the window.
            self._live.update(trials_table(rows[-_SHOWN_ROWS:], title), refresh=True)
            return
        for row in rows:
            now = (row["examples_seen"], row["state"])
            if self._said.get(row["trial_id"]) != now:
                self._said[row["trial_id"]] = now
                self._console.print(_line(row), highlight=False, soft_wrap=True)


def _line(row: Mapping[str, Any]) -> str:
    config = row["config"]
    what = f"trial {row['trial_id']}  {config.get('clip_model', '')} {config.get('loss_function', '')}"
    recall = "  started" if row["recall_at_10"] is None else f"  recall_at_10 {row['recall_at_10']:.4f}"
    state = "" if row["state"] == "RUNNING" else f"  {row['state']} {row['stop_reason']}"
    said = f" ({row['message']})" if row["message"] else ""
    return f"{what:<36}  {row['examples_seen']:>9,} examples{recall}{state}{said}"
