"""Processes end with the one that started them, however that one ended: after SIGKILL nobody is left to tell them."""

import importlib
import multiprocessing
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import DEVNULL
from typing import Any

_LOOKS_EVERY_S = 0.2
# Of a command of ours: as long as both are there, waits; its loop belongs to nobody, so that nobody has to collect it.
_END_WITH = "(while kill -0 $1; do kill -0 $2 || exit; sleep 1; done; kill -9 $2) &"


def end_with_parent() -> None:
    """Called in a process that ``multiprocessing`` started, in any of its ways: ends it when the process that it serves does.

    torch's loader does not notice by itself: it looks at its parent, the fork server, which lives as long as it does.

    A thread waits for the end of a pipe that is open in the process served alone, so no id is compared that another process
    may have by then. It acts while the rest of its process waits for a file that never comes; SIGTERM may be blocked.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, name="end with parent", daemon=True).start()


def call_ending_with_parent(function: str, *arguments: Any) -> None:
    """What such a process begins with where it imports torch, for seconds: those are watched over as well.

    Args:
        function: ``module:name``; given as a function, its module would be imported to unpickle it, before anything is called.
    """
    end_with_parent()
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(*arguments)


@contextmanager
def ending_with_starter() -> Iterator[None]:
    """The same for a child that ``multiprocessing`` does not prepare, within the block; afterwards its thread is gone."""
    starter, over = os.getppid(), threading.Event()

    def end() -> None:
        while not over.wait(_LOOKS_EVERY_S):
            if os.getppid() != starter:
                os._exit(1)

    watcher = threading.Thread(target=end, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def end_with_us(command: int, *, leads_group: bool = False) -> None:
    """Has a command that this process runs killed within seconds of this process' own end, whatever it waits for.

    It would notice by itself when it writes to us; one whose server is silent never does.

    Args:
        leads_group: all that it has started goes with it: a shell's end alone ends none of what it runs.
    """
    if os.name == "posix":
        ids = [str(os.getpid()), f"-{command}" if leads_group else str(command)]
        subprocess.run(["sh", "-c", _END_WITH, "sh", *ids], stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL, check=False)
