"""Shows how far work has come, as a bar or as lines, and prints the package's messages."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

OnProgress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""
OnPhase = Callable[[str, int, int], None]
"""Likewise, with what is being done before them."""

# A line comes after so long, and the next ones so much later, and further, at least.
_FIRST_LINE_S, _NEXT_LINE_S, _NEXT_SHARE = 5.0, 20.0, 0.1


def no_progress(done: int, total: int) -> None:
    """For whoever is not interested."""


def no_phases(what: str, done: int, total: int) -> None:
    """For whoever is not interested."""


@contextmanager
def progress_bar(what: str, console: Console | None = None) -> Iterator[OnProgress]:
    """Of one thing."""
    with phase_bars(console) as on_phase:
        yield partial(on_phase, what)


@contextmanager
def phase_bars(console: Console | None = None) -> Iterator[OnPhase]:
    """Of several things one after the other, which may take turns: one bar at a time."""
    console = console or Console()
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task, shown = progress.add_task("", total=None, visible=False), ""

        def on_phase(what: str, done: int, total: int) -> None:
            nonlocal shown
            if what != shown:
                progress.reset(task, total=total, completed=done, description=what, visible=True)
                shown = what
            progress.update(task, completed=done, total=total)

        yield on_phase


@contextmanager
def messages_on(console: Console) -> Iterator[None]:
    """Within, what the package logs (``INFO`` and above) is printed, a line a message; without, logging decides."""
    logger, handler = logging.getLogger("fashionclip_tune"), _ConsoleHandler(console)
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # any library may have given the root logger a handler, which would print it again
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagates
        logger.removeHandler(handler)


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), highlight=False, soft_wrap=True, markup=False)


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._next: dict[str, tuple[float, float]] = {}  # of each thing: when the next line is due, and from where on
        self._done: dict[str, int] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done < self._done.get(what, total + 1):  # begun, or begun anew
            self._next[what] = (now + _FIRST_LINE_S, 0)
        self._done[what] = done
        due_at, due_from = self._next[what]
        if now >= due_at and due_from <= done < total:
            self._console.print(f"{what}: {done:,} of {total:,}", highlight=False, soft_wrap=True, markup=False)
            self._next[what] = (now + _NEXT_LINE_S, done + _NEXT_SHARE * total)
