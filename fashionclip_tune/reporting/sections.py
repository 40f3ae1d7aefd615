"""The sections of a sweep's page: figures in words and tables, with the plots where they belong. HTML, piece by piece."""

from collections.abc import Iterator, Sequence

from fashionclip_tune.errors import rung_of
from fashionclip_tune.evaluation.evaluate import counted_as, coverage_line
from fashionclip_tune.evaluation.metric import DEFAULT_METRIC
from fashionclip_tune.reporting import figures as plots
from fashionclip_tune.reporting.html import Markup, plot, table, text, wide
from fashionclip_tune.reporting.sweep_files import (
    PAUSED,
    TrialRow,
    end_of,
    figure_or_nothing,
    freed_line,
    is_open,
    load_line,
    loss_label,
    paused_at,
    refit_lines,
    start_of,
    waiting_rungs,
    zero_shot_lines,
)
from fashionclip_tune.reporting.sweep_view import SweepView

_KS = (1, 5, 10)
_SHOWN_TORN = 5


def about(view: SweepView) -> str:
    content, rows = view.content, view.content["trials"]
    ended, paused = sum(not is_open(row) for row in rows), sum(row["state"] == PAUSED for row in rows)
    of = f" of {planned}" if (planned := content.get("settings", {}).get("num_trials")) else ""
    parts = [
        f"{content['state'].lower()}: {ended}{of} trials ended" + f", {paused} paused" * (paused > 0),
        f"space {content.get('space', '?')}",
    ]
    parts += [f"maximises {view.metric.name}"] if view.metric != DEFAULT_METRIC else []
    parts += [f"seed {content['seed']}"] if "seed" in content else []
    parts += [f"started {content['created'][:16].replace('T', ' ')} UTC"] if "created" in content else []
    parts += [f"{name} {version}" for name, version in content.get("versions", {}).items() if name in ("torch", "optuna")]
    return text(" · ".join(parts))


def winner(view: SweepView) -> Iterator[str]:
    """What a reader wants to know first: how good, how much better than before, and whether that is real."""
    best = view.best
    if best is None:
        yield "<p>No trial has ended with a result yet.</p>"
        return
    metric, (low, high) = view.metric, view.metric.interval(best) or (None, None)
    interval = "" if low is None else f"95 % interval {low:.4f} to {high:.4f}"
    cards = [(f"{metric.label} of the winner", f"{metric.score(best):.4f}", interval, "")]
    if (base := metric.zero_shot(best)) is not None:
        apart = (
            "no interval known"
            if low is None
            else "its interval lies above that"
            if low > base
            else "zero-shot is inside its interval"
        )
        relative = "" if best["relative_gain"] is None else f" ({best['relative_gain']:+.1%})"
        good = "good" if low is not None and low > base else "bad" if (best["gain"] or 0) < 0 else ""
        cards.append(("Gain over zero-shot", f"{best['gain']:+.4f}", f"from {base:.4f}{relative}; {apart}", good))
    compared = sum(test is not None for test in view.tests.values())
    figure = f"{len(view.ties)} ties" if len(view.ties) > 1 else "1 tie" if view.ties else "yes" if compared else "unknown"
    said = f"of {compared} other trials, compared query by query" if compared else "no other trial was asked the same queries"
    cards.append(("Is it ahead of the others?", figure, said, ""))
    yield (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><div class="label">{label}</div><div class="figure {kind}">{text(value)}</div>'
            f'<div class="small">{text(small)}</div></div>'
            for label, value, small, kind in cards
        )
        + "</div>"
    )
    settings = ", ".join(f"{name}={_short(value)}" for name, value in best["config"].items())
    below = zero_shot_lines(view.content, f"The winner, trial {best['trial_id']},", best)
    if below:
        yield f'<p class="bad">{" ".join(text(line.strip()) for line in below)}</p>'
    counted = f" Counted as {text(counted_as(best))}." if best.get("protocol") else ""
    if (asked := coverage_line((view.content["best"] or {}).get("metrics", {}))) is not None:
        counted += f" {text(asked)}."
    yield f"<p>Trial {text(best['trial_id'])}: <code>{text(settings)}</code>.{counted}</p>"
    for line in (load_line(view.folder, best["trial_id"]), *refit_lines(view.content, view.folder)):
        yield f"<p>{text(line)}</p>"


def ranking(view: SweepView) -> Iterator[str]:
    if not view.rows:
        yield "<p>No trial has a score yet.</p>"
        return
    yield (
        '<p class="note">By the last evaluation. A difference is called real where a paired test over products gives p below '
        "0.05, else a tie; the interval of each figure alone is wider than that of a difference. lr: learning rate."
        + " A trial that paused stands where it was then, which is no verdict on its settings." * _waits(view)
        + "</p>"
    )
    headers = (
        "",
        "trial",
        "model",
        "loss",
        "lr",
        view.metric.label,
        "95 % interval",
        "behind the best",
        "",
        "gain",
        "examples",
        "end",
    )
    rows = []
    for place, row in enumerate(view.rows, start=1):
        is_best = view.best is not None and row["trial_id"] == view.best["trial_id"]
        low, high = view.metric.interval(row) or (None, None)
        test = view.tests.get(row["trial_id"])
        verdict = Markup('<span class="tag best">best</span>' if is_best else "")
        if test is not None and (test.is_tie or paused_at(row, view.content) is None):
            kind = "tie" if test.is_tie else "real"
            verdict = Markup(f'<span class="tag {kind}">{kind}</span>')
        rate = row["config"].get("training.learning_rate")
        cells = [
            str(place),
            row["trial_id"],
            start_of(row),
            loss_label(row["config"].get("loss_function")),
            "" if rate is None else f"{rate:.1e}",
            f"{view.metric.score(row):.4f}",
            "" if low is None else f"{low:.4f} to {high:.4f}",
            "" if test is None else f"{test.difference:.4f} ({_p(test.p_value)})",
            verdict,
            "" if row.get("gain") is None else f"{row['gain']:+.4f}",
            f"{row['examples_seen']:,}",
            end_of(row, view.content),
        ]
        rows.append((cells, "best" if is_best else ""))
    yield table(headers, rows, numbers=(4, 5, 6, 7, 9, 10))
    yield f"<details><summary>Every recall, with its protocol and gallery</summary>{_all_recalls(view)}</details>"


def _all_recalls(view: SweepView) -> str:
    headers = ["trial", "protocol", "direction", *(f"R@{k}" for k in _KS), "median rank", "queries", "gallery"]
    rows = []
    for row in view.rows:
        last = next((stage for stage in view.curves[row["trial_id"]] if stage["step"] == row["step"]), {})
        for title, name, queries, gallery in (
            ("text to image", "text_to_image", "text", "photos"),
            ("image to text", "image_to_text", "image", "texts"),
        ):
            recalls = [last.get(f"recall_at_{k}_{name}") for k in _KS]
            size = last.get(f"num_gallery_{'images' if gallery == 'photos' else 'texts'}")
            cells = [
                row["trial_id"],
                str(last.get("protocol", "")),
                title,
                *("" if recall is None else f"{recall:.4f}" for recall in recalls),
                figure_or_nothing(last.get(f"median_rank_{name}"), "g"),
                figure_or_nothing(last.get(f"num_{queries}_queries"), ","),
                "" if size is None else f"{size:,} {gallery}",
            ]
            rows.append((cells, ""))
    return '<p class="note">R@k: Recall@k, the share of queries whose right answer is among the first k.</p>' + table(
        headers, rows, numbers=range(3, 9)
    )


def gains(view: SweepView) -> Iterator[str]:
    """As the published table: a row a model and loss, each with its best trial."""
    best_of: dict[tuple[str, str], TrialRow] = {}
    for row in view.rows:
        if view.metric.zero_shot(row) is not None:
            best_of.setdefault((start_of(row), row["config"].get("loss_function", "")), row)
    if not best_of:
        yield "<p>The zero-shot weights have not been evaluated.</p>"
        return
    metric, rows = view.metric, []
    for (model, loss), row in best_of.items():
        relative = "" if row["relative_gain"] is None else f"{row['relative_gain']:+.2%}"
        figures = [f"{metric.zero_shot(row):.4f}", f"{metric.score(row):.4f}", f"{row['step']:,}", relative]
        rows.append(([f"{model} ({loss_label(loss)})", *figures, row["trial_id"]], ""))
    yield f'<p class="note">{metric.legend}.</p>'
    headers = ("model (loss)", f"zero-shot {metric.short}", f"best {metric.short}", "at step", "gain", "trial")
    yield table(headers, rows, numbers=range(1, 5))


def curves(view: SweepView) -> Iterator[str]:
    if (left_out := torn_line(view)) is not None:
        yield f"<p>{text(left_out)}</p>"
    end = "A cross: stopped before its budget, at a rung (dashed) if others were ahead there."
    if _waits(view):
        end = "A ring: paused at a rung (dashed), as others promised more. A cross: stopped for another reason."
    yield f'<p class="note">A line a trial from the zero-shot weights on, the best one thick. {end}</p>'
    elsewhere = "Of each line the last point is in the ranking; those before it are in <code>trials/*/evaluations/</code> only."
    yield plot(plots.learning_curves(view), "no evaluation yet", elsewhere)


def torn_line(view: SweepView) -> str | None:
    """Which evaluations could not be read."""
    if not view.torn:
        return None
    names = ", ".join(str(path.relative_to(view.folder)) for path in view.torn[:_SHOWN_TORN])
    more = f" and {len(view.torn) - _SHOWN_TORN} more" if len(view.torn) > _SHOWN_TORN else ""
    return f"{view.name}: left out, as torn files: {names}{more}"


def what_mattered(view: SweepView) -> Iterator[str]:
    found = view.importance
    if found is not None:
        yield (
            f'<p class="note">PED-ANOVA over {found.num_trials} trials, by {view.metric.label} after '
            f"{found.examples_seen:,} examples, which all of them saw. Of few trials it is a hint, no proof.</p>"
        )
    shares = found.shares.items() if found is not None else ()
    figures = ", ".join(f"{text(name)} {share:.0%}" for name, share in sorted(shares, key=lambda item: -item[1]))
    yield plot(plots.importances(view), "too few trials to tell (or no study.journal)", f"Its figures: {figures}.")
    darker = f"A line a trial; the darker, the higher its {view.metric.label}."
    yield f'<h3>Settings of all trials</h3><p class="note">{darker}</p>'
    elsewhere = "Model, loss and learning rate are in the ranking, all settings in <code>trials.csv</code>."
    yield wide(plot(plots.parallel_coordinates(view), "at least two trials that differ are needed", elsewhere))


def budget(view: SweepView) -> Iterator[str]:
    ended = [row for row in view.content["trials"] if row["state"] in ("COMPLETE", "PRUNED") and row["examples_seen"]]
    if not ended:
        yield "<p>No trial has ended yet.</p>"
        return
    spent, whole = sum(row["examples_seen"] for row in ended), len(ended) * view.budget_examples
    hours = sum(row["duration_s"] for row in ended) / 3600
    stopped = sum(rung_of(row["stop_reason"]) is not None for row in ended)
    how = "paused" if _waits(view) else "stopped"
    yield (
        f"<p>Trials that have ended: {len(ended)}, {how} at a rung: {stopped}. They trained on {spent:,} examples of {whole:,} "
        f"that they might have: {1 - spent / whole:.0%} was saved. Time of all trials together: {hours:.2f} h.</p>"
    )
    elsewhere = f"What each trial trained on is in the ranking; it might have been {view.budget_examples:,} examples."
    yield plot(plots.budget(view), "", elsewhere)
    if (freed := freed_line(view.content)) is not None:
        yield f"<p>Disk: {text(freed)}.</p>"


def starts(view: SweepView) -> Iterator[str]:
    """What trials started from; nothing of a sweep that an older version ran."""
    known = list(view.content.get("starts", {}).values())
    rows = [
        [each["label"], each["architecture"], f"{each['image_size']} px, {each['context_length']} tokens",
         each["weights"], each["licence"] or "not said beside the weights", each.get("source") or ""]
        for each in known
    ]  # fmt: skip
    if rows:
        yield "<h3>What trials started from</h3>"
        headers = ("start", "architecture", "input", "weights", "licence", "trained from")
        yield table(headers, [(row, "") for row in rows], numbers=())


def failures(rows: Sequence[TrialRow]) -> Iterator[str]:
    cells = [
        [row["trial_id"], start_of(row), (row["stop_reason"] or "").replace("_", " "),
         f"{row['examples_seen']:,}", row.get("message") or ""]
        for row in rows
    ]  # fmt: skip
    yield table(("trial", "model", "reason", "examples", "message"), [(each, "") for each in cells], numbers=(3,))


def _waits(view: SweepView) -> bool:
    return bool(waiting_rungs(view.content))


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p {value:.3f}"
