"""Ending a run when it is asked to: by its caller, or by SIGTERM, as batch systems and notebooks send it before they kill."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any


class StopRequest:
    """Whether SIGTERM has come since ``listening`` began, or the caller says so."""

    def __init__(self, asked_by_caller: Callable[[], bool]) -> None:
        self._signalled = False
        self._asked_by_caller = asked_by_caller
        self._previous: Any = None

    def received(self) -> bool:
        return self._signalled or self._asked_by_caller()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Installs a handler and puts the one before it back: at the end, and at the first signal, so that a second one acts.

        Python allows handlers in the main thread only. In another one (a trial in a Ray worker) nothing is installed: who
        runs it there is to ask.
        """
        self._previous = signal.getsignal(signal.SIGTERM)
        # None: a handler that was not installed by Python, which could not be put back.
        if threading.current_thread() is not threading.main_thread() or self._previous is None:
            yield
            return
        signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        signal.signal(signal.SIGTERM, self._previous)


@contextmanager
def children_without_sigterm() -> Iterator[None]:
    """Processes started within never see SIGTERM: sent to a whole group, it would end a run's loaders before the run.

    In this process it arrives at the end of the block. They end with the process that they serve.
    """
    # Started by multiprocessing when first needed; it would unblock the signal here.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
