"""Exceptions that a user is meant to read."""


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
