"""What the commands have in common: how they parse, what they answer to mistakes, how shards are reached."""

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from fashionclip_tune.errors import BadDataError, DivergedError, LoaderError, OutOfMemoryError, StoppedError, UserError

_SIGTERM_STATUS = 143  # as a shell reports a process that SIGTERM ended


def finite(text: str) -> float:
    """The value of a flag: no NaN, which every comparison lets pass, and nothing infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: a number expected")
    return value


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an argument."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """A subcommand refuses what it lacks itself: argparse leaves it to the parser above, which names its own help."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help lists what is allowed)\n")


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a mistake of the user into one line on stderr and exit status 2; a run that failed into status 1."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (BadDataError, DivergedError, LoaderError, OutOfMemoryError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(1)
    except StoppedError as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(_SIGTERM_STATUS)
    except KeyboardInterrupt as error:
        print("; ".join(["interrupted", *map(str, error.args)]), file=sys.stderr)
        sys.exit(130)


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """How shards are reached; the same for one run and for a sweep."""
    parser.add_argument(
        "--allow-remote",
        action="store_true",
        default=None,
        help="read https://, s3://, gs:// and pipe: (runs commands); to be given again with --resume and --refit",
    )
    parser.add_argument(
        "--scratch",
        metavar="DIR",
        help="a folder on a fast local disk: shards are copied there ahead of use; a sweep runs there too, and keeps in "
        "--results, which may be a slow drive or s3://..., what another machine needs to go on",
    )
    parser.add_argument(
        "--scratch-gb",
        type=finite,
        metavar="G",
        help="for all copies together; decoded photos take up to half as much beside them (default: 20)",
    )


def reading_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    flags = {name: getattr(parsed, name) for name in ("allow_remote", "scratch", "scratch_gb")}
    return {f"reading.{name}": value for name, value in flags.items() if value is not None}
