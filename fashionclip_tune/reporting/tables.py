"""The ranking of a sweep as a table for a paper or a spreadsheet."""

import csv
import io
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from fashionclip_tune.evaluation.metric import DEFAULT_METRIC, METRICS, Metric, metric_of
from fashionclip_tune.reporting.comparison import NOT_COMPARABLE, Counting, counted_in_words, counting_of, names_of
from fashionclip_tune.reporting.sweep_files import TrialRow, loss_label, ranked, read_sweep, start_of, ties_with_best

_SETTINGS = ("trial", "model", "loss", "learning rate")


def ranking_text(sweep_dirs: Sequence[Path], form: str) -> str:
    """The trials of each sweep, best first, in a form of ``FORMS``.

    Interval, zero-shot figure, gain and tie are of what each sweep maximises. Of several sweeps with columns for their names
    and for how recalls were counted; csv, without a note, always has the latter.

    Raises:
        UserError: a folder is no sweep.
    """
    rows, countings = list[list[str]](), list[Counting]()
    sweeps = [read_sweep(folder) for folder in sweep_dirs]
    maximised = list(dict.fromkeys(metric_of(sweep) for sweep in sweeps))
    shown = list(dict.fromkeys([METRICS["recall_at_5"], DEFAULT_METRIC, *maximised]))
    of_metric = f" {maximised[0].short}" if len(maximised) == 1 else ""
    figures = (*(each.short for each in shown), "low", "high", f"zero-shot{of_metric}", "gain", "gain %", "tie")
    headers = [*_SETTINGS, *figures]
    for folder, name, sweep in zip(sweep_dirs, names_of(sweep_dirs), sweeps, strict=True):
        metric = metric_of(sweep)
        trials = ranked(sweep["trials"], metric)
        ties = ties_with_best(folder, trials, metric)
        countings += [counting_of(sweep, row) for row in trials]
        rows += [[name] * (len(sweep_dirs) > 1) + _cells(row, ties, metric, shown) for row in trials]
    words = counted_in_words(countings)
    if len(sweep_dirs) > 1:
        headers.insert(0, "sweep")
    if len(sweep_dirs) > 1 or form == "csv":
        headers.append("counted as")
        rows = [[*row, counted] for row, counted in zip(rows, words, strict=True)]
    distinct = [counted for counted in dict.fromkeys(words) if counted]
    counted = f"{maximised[0].name}: {', '.join(distinct)}" if len(maximised) == 1 else "; ".join(distinct)
    legend = "; ".join(each.legend for each in shown)
    note = f"{counted}; {legend}; low, high: 95 % interval over products; gain, gain %: over zero-shot"
    return FORMS[form](headers, rows, note + f"; {NOT_COMPARABLE}" * (len(distinct) > 1))


def _cells(row: TrialRow, ties: Collection[str], metric: Metric, shown: Sequence[Metric]) -> list[str]:
    config = row["config"]
    figures = [*(each.of(row) for each in shown), *(metric.interval(row) or (None, None)), metric.zero_shot(row)]
    relative = row.get("relative_gain")
    return [
        row["trial_id"],
        start_of(row),
        loss_label(config.get("loss_function")),
        f"{config['training.learning_rate']:.1e}" if "training.learning_rate" in config else "",
        *("" if figure is None else f"{figure:.4f}" for figure in figures),
        "" if row.get("gain") is None else f"{row['gain']:+.4f}",
        "" if relative is None else f"{relative:+.2%}",
        "tie" if row["trial_id"] in ties else "",
    ]


def _markdown(headers: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    lines = [headers, ["---"] * len(headers), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{note}\n"


def _latex(headers: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    special = str.maketrans({sign: f"\\{sign}" for sign in "&%_#$"})
    lines = [" & ".join(cell.translate(special) for cell in line) + r" \\" for line in [headers, *rows]]
    body = "\n".join([r"\hline", lines[0], r"\hline", *lines[1:], r"\hline"])
    return f"% {note}\n\\begin{{tabular}}{{{'l' * len(headers)}}}\n{body}\n\\end{{tabular}}\n"


def _csv(headers: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows([headers, *rows])
    return written.getvalue()


FORMS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]], str], str]]
FORMS = {"markdown": _markdown, "latex": _latex, "csv": _csv}
