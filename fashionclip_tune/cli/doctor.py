"""``python -m fashionclip_tune doctor``: looks at the machine before a sweep has to find out."""

import argparse
import sys
from typing import Any

from fashionclip_tune.errors import UserError, command


def add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what this machine has, and what is wrong with it",
        description="GPU, driver, cores, memory, disks and versions, each with what to do where it is wrong. Exit status 2 "
        "where a sweep would not run.",
    )
    parser.add_argument("--results", default="results", metavar="DIR", help="of the sweep: looked at (default: %(default)s)")
    parser.add_argument("--scratch", metavar="DIR", help="of the sweep: looked at, with what sweeps that died have left there")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the sweep (default: %(default)s)")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> None:
    said, wrong = look(parsed.results, parsed.scratch, parsed.device)
    print(*said, sep="\n")
    if wrong:
        sys.exit(2)


def look(results: str, scratch: str | None, device: str | None) -> tuple[list[str], list[str]]:
    """What is found, line by line, and what of it a sweep cannot run with."""
    from fashionclip_tune.machine.doctor import judge, judge_object_store, lines, problems
    from fashionclip_tune.machine.facts import folders_of, gather

    findings = judge(gather(folders_of(results, scratch)), device=device or "auto")
    if "://" in results:
        findings.append(judge_object_store(results))
    return list(lines(findings)), [finding.text for finding in problems(findings)]


def refuse_problems(results: str, scratch: str | None, device: str | None) -> None:
    """Before a sweep: what is well is not worth a line, what will be worse than it could is.

    Raises:
        UserError: what is wrong, and what to do about it.
    """
    said, wrong = look(results, scratch, device)
    for line in said:
        if line.startswith("warning"):
            print(line)
    if wrong:
        raise UserError(f"{'; '.join(wrong)} ({command('doctor')} says more)")
