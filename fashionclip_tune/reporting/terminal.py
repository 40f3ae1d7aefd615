"""What a terminal shows of sweeps: tables of trials, the winner, what failed or could not be read."""

import csv
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from fashionclip_tune.evaluation.evaluate import counted_as, coverage_line, gain
from fashionclip_tune.evaluation.metric import metric_of
from fashionclip_tune.reporting.comparison import NOT_COMPARABLE, Standing, names_of, standing_headers, standings
from fashionclip_tune.reporting.equal_cost import equal_cost_table
from fashionclip_tune.reporting.sweep_files import (
    TrialRow,
    end_of,
    failure_lines,
    figure_or_nothing,
    load_line,
    loss_label,
    paused_at,
    ranked,
    read_sweep,
    refit_lines,
    start_of,
    ties_with_best,
    zero_shot_lines,
)

_SHOWN_BAD, _INDENT = 10, 10
_PAUSED = " rung N: paused there, as others promised more."


@dataclass(frozen=True)
class _Either:
    """A cell in as many words as there is room for."""

    long: str
    short: str

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(max(map(len, self.short.split())), len(self.long))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield escape(self.long if options.max_width >= len(self.long) else self.short)


def trials_table(rows: Sequence[TrialRow], title: str, sweep: Mapping[str, Any], ties: Collection[str] = ()) -> Table:
    """Trials in the given order, with half the width of their interval and the gain over their zero-shot weights.

    ``ties``: those that are not told apart from the best one.
    """
    metric = metric_of(sweep)
    if counted := dict.fromkeys(counted_as(row) for row in rows if row.get("protocol")):
        title += f"\n{metric.name}: {', '.join(counted)}"
    # On a narrow terminal words go on in a second line; figures stay whole.
    legend = f"lr: learning rate. seen: examples. {metric.legend}. ±: half of its 95 % interval. gain, %: over zero-shot."
    legend += " augment: the first caption (1st cap), any (any cap) or a weighted choice (mix cap); strength of image changes;"
    legend += " RA: RandAugment, E: erasing."
    legend += _PAUSED * any(paused_at(row, sweep) is not None for row in rows)
    table = Table(title=escape(title), caption=legend, caption_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for header in ("trial", "model", "loss", "lr", "augment"):
        table.add_column(header, no_wrap=header != "augment")
    for header in ("seen", metric.short, "±", "gain", "%"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("end")
    for row in rows:
        config = row["config"]
        tie = ", tie" if row["trial_id"] in ties else ""
        end, rung = end_of(row, sweep) + tie, paused_at(row, sweep)
        table.add_row(
            row["trial_id"],
            escape(start_of(row)),
            loss_label(config.get("loss_function")),
            f"{config['training.learning_rate']:.1e}".replace("e-0", "e-") if "training.learning_rate" in config else "",
            _augmentation(config),
            _thousands(row["examples_seen"]),
            figure_or_nothing(metric.of(row), ".4f"),
            _half_width(metric.interval(row)),
            figure_or_nothing(row.get("gain"), "+.4f"),
            figure_or_nothing(row.get("relative_gain"), "+.0%").rstrip("%"),
            escape(end) if rung is None else _Either(end, f"rung {rung}{tie}"),
        )
    return table


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """On a terminal without breaking words; elsewhere as they are. Commands to be copied are not for this."""
    for line in lines:
        text = line
        if console.is_terminal:
            indent = " " * _INDENT
            text = fill(line, console.width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        console.print(text, highlight=False, soft_wrap=True, markup=False)


def bad_sample_lines(sweep_dir: Path) -> list[str]:
    """What could not be read by any trial, each photo once."""
    found: dict[tuple[str, ...], str] = {}
    for path in sorted(sweep_dir.glob("trials/*/bad_samples.csv")):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault((row["shard"], row["key"]), f"{row['shard']}: {row['key']}: {row['reason']}")
    if not found:
        return []
    more = f"; all are in {sweep_dir}/trials/*/bad_samples.csv" if len(found) > _SHOWN_BAD else ""
    return [f"{len(found)} samples could not be read{more}:", *(f"  {text}" for text in list(found.values())[:_SHOWN_BAD])]


def winner_lines(sweep: Mapping[str, Any], sweep_dir: Path, ties: Collection[str] = ()) -> list[str]:
    """The best trial, its gain over its own zero-shot model, and how to load it."""
    best = sweep["best"]
    if best is None:
        return ["no trial has ended with a result"]
    config, metrics, metric = best["config"], best["metrics"], metric_of(sweep)
    model, recall = start_of(best), metric.score(metrics)
    (row,) = (each for each in sweep["trials"] if each["trial_id"] == best["trial_id"])
    recalls = [f"{name} {metrics[name]:.4f}" for name in dict.fromkeys([metric.name, "recall_at_10", "recall_at_5"])]
    lines = [f"best: trial {best['trial_id']}, {model}, {', '.join(recalls)}"]
    if ranked(sweep["trials"], metric)[0]["trial_id"] != best["trial_id"]:
        lines[0] += ", of those that have ended or wait"
    if (interval := metric.interval({**row, **metrics})) is not None:
        low, high = interval
        lines.append(f"      95 % interval {low:.4f} to {high:.4f} over products; protocol {counted_as(metrics)}")
    if (asked := coverage_line(metrics)) is not None:
        lines.append(f"      {asked}")
    if (base := metric.zero_shot(row)) is not None:
        lines.append(f"      zero-shot {model}: {metric.name} {base:.4f}; {gain(recall, base)}")
    lines += zero_shot_lines(sweep, f"the winner, trial {best['trial_id']},", metrics)
    if ties:
        lines.append(f"      not told apart from it (paired test over products, p at least 0.05): {', '.join(sorted(ties))}")
    lines.append(f"      settings: {', '.join(f'{name}={value}' for name, value in config.items())}")
    lines.append(load_line(sweep_dir, best["trial_id"]))
    return lines + refit_lines(sweep, sweep_dir)


def _augmentation(config: Mapping[str, Any]) -> str:
    captions = {"uniform": "any cap", "weighted": "mix cap"}.get(config.get("augmentation.caption", ""), "1st cap")
    strength = config.get("augmentation.image_strength", 0.0)
    if not strength:
        return captions
    switched_on = "+RA" * config.get("augmentation.rand_augment", False) + "+E" * config.get("augmentation.erasing", False)
    return f"{captions} {strength:.2f}{switched_on}"


def _thousands(count: int) -> str:
    return f"{count / 1000:,.1f}k" if count >= 1000 else f"{count}"


def _half_width(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{(interval[1] - interval[0]) / 2:.3f}"


def comparison(sweep_dirs: Sequence[Path]) -> list[Table | str]:
    """The ranking and the winner of each sweep; for several sweeps, which winner is ahead."""
    parts: list[Table | str] = []
    for folder, name in zip(sweep_dirs, names_of(sweep_dirs), strict=True):
        sweep = read_sweep(folder)
        metric = metric_of(sweep)
        rows = ranked(sweep["trials"], metric)
        ties = ties_with_best(folder, rows, metric)
        parts.append(trials_table(rows, f"{name} ({sweep['state'].lower()}), best first", sweep, ties))
        parts += winner_lines(sweep, folder, ties)
        if (at_equal_cost := equal_cost_table(folder, sweep["trials"], metric)) is not None:
            parts.append(at_equal_cost)
        parts += failure_lines(sweep["trials"])
    if len(sweep_dirs) > 1:
        parts.append(_best_of_each(standings(sweep_dirs)))
    return parts


def _best_of_each(groups: Sequence[Sequence[Standing]]) -> Table:
    title = "best of each sweep" + f"\n{NOT_COMPARABLE}" * (len(groups) > 1)
    legends = dict.fromkeys(each.metric.legend for group in groups for each in group)
    legend = ". ".join([*legends, "gain, %: over zero-shot. behind: the first one, by its test."])
    table = Table(title=title, caption=legend, caption_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column, header in enumerate(standing_headers(groups)):
        table.add_column(header, justify="right" if 3 <= column <= 6 else "left", no_wrap=header != "counted as")
    for number, group in enumerate(groups):
        if number:
            table.add_row()
        for each in group:
            table.add_row(*map(escape, each.cells()))
    return table
