"""Prints how a sweep ended: the ranking, the winner, how to go on, the report."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from fashionclip_tune.errors import StorageError, command, module_command
from fashionclip_tune.evaluation.metric import metric_of
from fashionclip_tune.files import is_full
from fashionclip_tune.progress import progress_bar
from fashionclip_tune.reporting.page import write_report
from fashionclip_tune.reporting.sweep_files import failure_lines, ranked, ties_with_best
from fashionclip_tune.reporting.terminal import bad_sample_lines, print_lines, trials_table, winner_lines
from fashionclip_tune.tuning.persistence.location import SweepLocation
from fashionclip_tune.tuning.planning.settings import SweepSettings

_log = logging.getLogger(__name__)


def how_to_go_on(location: SweepLocation, settings: SweepSettings, *how: str) -> str:
    """The command, to be copied: it goes on with these settings.

    Args:
        settings: in effect, as ``plan_sweep`` returns them.
        how: ``--refit N``; none: ``--resume``.
    """
    results, _, name = location.shown.rpartition("/")
    flags = [*(how or ("--resume",)), *settings.flags_to_go_on()]
    return f"go on with: {command('sweep', '--results', results, '--name', name, *flags)}"


@contextmanager
def with_resume_hint(go_on: str) -> Iterator[None]:
    """Within: a signal, or what cannot be kept here or on the durable side, ends the sweep with the command to go on with.

    Raises:
        StorageError: instead of any error that says that a disk is full.
        KeyboardInterrupt: with the command, for Ctrl-C and for SIGTERM.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(go_on) from error
    except Exception as error:
        if not isinstance(error, StorageError) and not is_full(error):
            raise
        said = error if isinstance(error, StorageError) else f"the disk is full ({error}): make room"
        raise StorageError(f"the sweep has stopped, nothing is lost: {said}\n{go_on}") from error
    finally:
        signal.signal(signal.SIGTERM, before)


def print_result(result: dict[str, Any], location: SweepLocation, settings: SweepSettings, console: Console) -> None:
    sweep_dir = location.readable
    metric = metric_of(result)
    rows = ranked(result["trials"], metric)
    ties = ties_with_best(sweep_dir, rows, metric)
    console.print(trials_table(rows, f"{result['name']}, best first", result, ties))
    print_lines(console, winner_lines(result, sweep_dir, ties))
    print_lines(console, failure_lines(result["trials"]))
    print_lines(console, bad_sample_lines(sweep_dir))
    if result["state"] == "INTERRUPTED":
        why = "the time of this run is up" if result.get("time_is_up") else "interrupted"
        console.print(f"{why}; {how_to_go_on(location, settings)}", highlight=False, soft_wrap=True, markup=False)
    curves = module_command("tensorboard.main", "--logdir", sweep_dir / "trials")
    console.print(f"curves: {curves}", highlight=False, soft_wrap=True, markup=False)


def write_sweep_report(location: SweepLocation, settings: SweepSettings, *, finished: bool) -> None:
    """With the winner's photos where the sweep has ended; who pressed Ctrl-C is not to wait for them."""
    make_it = f"{command('compare', location.readable)} makes it"
    try:
        with progress_bar("encoding photos for the report's gallery") as on_progress:
            allow_remote = bool(settings.allow_remote)
            path = write_report([location.run_dir], gallery=finished, allow_remote=allow_remote, on_progress=on_progress)
        if location.mirror is not None:
            location.mirror.publish()
    except (OSError, StorageError) as error:  # a full disk: the sweep's own files are there
        _log.warning(f"no report ({error}); {make_it}")
    except KeyboardInterrupt:
        _log.warning(f"no report yet; {make_it}")
        raise
    else:
        _log.info(f"report: {location.readable / path.name}")
