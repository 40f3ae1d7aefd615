"""What a user is meant to read: exceptions, commands to copy, the words for how a trial ended."""

import shlex
import sys
from enum import Enum
from pathlib import Path

_SWEEPS = Path(__file__).parents[1] / "sweeps"
_SCRIPTS = {"sweep": "run_sweep.py", "compare": "compare.py"}


def command(name: object, *words: object) -> str:
    """A line that runs as it is, where this process was started: its Python, quoted paths.

    In a checkout, sweeps are started and compared by the scripts of ``sweeps/``.
    """
    script = _SWEEPS / _SCRIPTS.get(str(name), "")
    if script.is_file():
        start = [str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)]
    else:
        start = ["-m", "fashionclip_tune", str(name)]
    return shlex.join([sys.executable, *start, *map(str, words)])


def module_command(module: str, *words: object) -> str:
    """A line that runs a module of this Python, such as pip, whatever environment a shell has."""
    return shlex.join([sys.executable, "-m", module, *map(str, words)])


class UserError(ValueError):
    """The user's input is wrong: the message says what, where, what is allowed and what to do.

    Command-line entry points print the message alone, without a traceback, and exit with status 2.
    """


class UnavailableError(UserError):
    """What a run needs is not there at the moment: data, weights, a device, room. The run is not to blame, and can go on."""


class StorageError(UnavailableError):
    """What is to be kept cannot be written: no room, or the place is gone. What was written before stays valid."""


class DivergedError(RuntimeError):
    """The loss is no longer a finite number; the run cannot go on."""


class BadDataError(RuntimeError):
    """More samples are unreadable than the configuration allows; the message lists them by file and key."""


class OutOfMemoryError(RuntimeError):
    """The device's memory is too small for the run even where the run can make do with less."""


class StoppedError(RuntimeError):
    """The process was asked to end; what was trained is in a checkpoint, from which the run can go on."""


class LoaderError(RuntimeError):
    """A loader process is stuck or gone; the message names what it was reading."""


class StopReason(str, Enum):
    """Why a trial is at an end, as journal, ``sweep.json`` and TensorBoard say it; at rung N it is ``rung_N``."""

    BUDGET = "budget"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out_of_memory"
    BAD_DATA = "bad_data"
    ERROR = "error"
    STORAGE = "storage"
    """Of no trial that has ended: it goes on when there is room, and so is not recorded."""
    INTERRUPTED = "interrupted"
    """Likewise: its driver was told to end."""

    __str__ = str.__str__  # else a journal has the name of the class, too


SCORES_NOTHING = (StopReason.DIVERGED, StopReason.OUT_OF_MEMORY)
"""Ends that are the settings' fault, whatever had been reached before."""
_RUNG = "rung_"


def stop_at_rung(rung: int) -> str:
    """The reason of a trial that was stopped at a rung; the lowest one is 1."""
    return f"{_RUNG}{rung}"


def rung_of(stop_reason: str | None) -> int | None:
    """At which rung a trial was stopped; None: for another reason, or not at all."""
    number = stop_reason.removeprefix(_RUNG) if stop_reason is not None and stop_reason.startswith(_RUNG) else ""
    return int(number) if number.isdecimal() else None
