"""What a sweep's plan had said, beside what came; for people, from the sweep's files alone."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fashionclip_tune.training.history import read_whole_rows


class Compared(NamedTuple):
    """A figure of the plan, in words."""

    what: str
    planned: str
    found: str
    difference: str
    """In percent of the plan."""


def plan_against_fact(sweep: Mapping[str, Any], sweep_dir: Path) -> list[Compared]:
    """Nothing where there was no plan."""
    plan = sweep.get("plan")
    if not plan:
        return []
    lines = []
    if plan["hours"] is not None and sweep.get("elapsed_s"):
        lines.append(_line("time", 60 * plan["hours"], sweep["elapsed_s"] / 60, "min", ".1f"))
    rows = sweep["trials"]
    lines.append(_line("samples", plan["examples"], sum(row["examples_seen"] for row in rows), "", ",.0f"))
    to_budget = sum(row["stop_reason"] == "budget" for row in rows)
    lines.append(_line("to budget", plan["trials_to_budget"], to_budget, "trials", ".1f"))
    for model, rate in plan["samples_per_second"].items():
        found = _rate(sweep, sweep_dir, model)
        if found is not None:
            lines.append(_line(model, rate, found, "samples/s", ",.0f"))
    return lines


def fact_lines(compared: Sequence[Compared]) -> list[str]:
    """For a terminal."""
    if not compared:
        return []
    lines = [f"  {each.what:<22} planned {each.planned}, was {each.found} ({each.difference})" for each in compared]
    return ["plan against fact:", *lines]


def _line(what: str, planned: float, found: float, unit: str, form: str) -> Compared:
    difference = f"{found / planned - 1:+.0%}" if planned else ""
    return Compared(what, f"{planned:{form}}", f"{found:{form}} {unit}".rstrip(), difference)


def _rate(sweep: Mapping[str, Any], sweep_dir: Path, model: str) -> float | None:
    """The median over all stages of a model's trials."""
    numbers = [row["trial_id"] for row in sweep["trials"] if row["config"].get("clip_model") == model]
    folders = [folder for number in numbers for folder in sweep_dir.glob(f"trials/{number}-*")]
    rates = [
        row["samples_per_second"] for folder in folders for row in read_whole_rows(folder)[0] if "samples_per_second" in row
    ]
    return statistics.median(rates) if rates else None
