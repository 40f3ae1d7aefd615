"""Imported first by the server that loader processes are forked from: imports what they need, once for all of them.

That takes seconds, in which the server does not look whether the process that it serves is still there. It has no thread of
its own when it forks.
"""

import atexit
import os
import sys
from contextlib import nullcontext

from fashionclip_tune.machine.child_processes import ending_with_starter

_IS_SERVER = any("multiprocessing.forkserver" in argument for argument in sys.orig_argv)  # and not who looks at this module

with ending_with_starter() if _IS_SERVER else nullcontext():
    import fashionclip_tune.data.loader  # noqa: F401

if _IS_SERVER:
    # When nobody is left to be served: to take down torch in good order took five seconds on a busy machine.
    atexit.register(os._exit, 0)
