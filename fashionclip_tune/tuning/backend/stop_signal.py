"""Ctrl-C and SIGTERM at the driver of a sweep, passed on to its trials, which stop at their next step with a checkpoint.

Ray stops a trial when it reports, at the end of a stage, and preemption does not wait that long. The word goes through an
actor that all trials of the driver know by name, so that it reaches every node of a cluster.
"""

import asyncio
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayError
from ray.tune import Callback
from ray.tune.experiment import Trial

from fashionclip_tune.errors import StorageError
from fashionclip_tune.files import is_full

_ASKED_EVERY_S = 0.5


class StopSignal(Callback):
    """Whether the driver was asked to end; a callback of Tune, whose loop passes it on."""

    def __init__(self) -> None:
        self.received = False
        self.reason: str | None = None
        self.cannot_record = False
        """What happens from here on is not in the journal, so it must not take effect."""
        self._passed_on = False
        self._flag: Any = None
        self._previous: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray snapshots its callbacks

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In the main thread. A second signal acts as it would without this: Ctrl-C ends at once."""
        self._previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self._previous:
            signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            self._restore()

    @contextmanager
    def connected(self) -> Iterator[None]:
        """While Ray is: trials can be told."""
        self._flag = ray.remote(_Flag).options(name=_name(), num_cpus=0).remote()
        try:
            yield
        finally:
            with suppress(RayError):  # where Ray is gone, so is the flag, and another error says so
                ray.kill(self._flag)  # another sweep of this process has its own

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def ask(self, reason: str) -> None:
        """Ends the sweep as a signal does, and says why."""
        self.received = True
        self.reason = self.reason or reason

    @contextmanager
    def on_storage_error(self) -> Iterator[None]:
        """Within: where something cannot be recorded, the sweep is asked to end."""
        try:
            yield
        except (StorageError, OSError) as error:
            if isinstance(error, OSError) and not is_full(error):
                raise
            self.cannot_record = True
            self.ask(str(error) if isinstance(error, StorageError) else f"the disk is full ({error}): make room")

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        # Several times a second, and not within the handler, which may have interrupted Ray anywhere.
        if self.received and not self._passed_on:
            self._passed_on = True
            self._flag.set.remote()
            print("stopping: each trial saves a checkpoint at its next step (Ctrl-C once more: at once)", file=sys.stderr)


class _Flag:
    """An actor: whether the driver was told to end."""

    def __init__(self) -> None:
        self._is_set = asyncio.Event()

    async def set(self) -> None:
        self._is_set.set()

    async def wait(self) -> None:
        """Answers once it is set."""
        await self._is_set.wait()


class StopPoll:
    """Asked by a trial before each step, in its worker: has the driver been told to end? Looks now and then only."""

    def __init__(self) -> None:
        self._next_time = 0.0
        self._answer: Any = None

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self._next_time:
            return False
        self._next_time = now + _ASKED_EVERY_S
        try:
            self._answer = self._answer or ray.get_actor(_name()).wait.remote()
            is_set, _ = ray.wait([self._answer], timeout=0)
            if is_set:
                ray.get(self._answer)
            return bool(is_set)
        except (RayError, ValueError):  # the driver is gone or out of reach: if for good, Ray ends this process
            self._answer = None
            return False


def _name() -> str:
    """A driver's own: others may use the same Ray."""
    return f"fashionclip-tune-stop-{ray.get_runtime_context().get_job_id()}"
