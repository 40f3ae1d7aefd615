"""The figures of a sweep's page, as plotly draws them."""

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from fashionclip_tune.reporting.comparison import Standing
from fashionclip_tune.reporting.sweep_files import TrialRow, is_open, loss_label, paused_at, start_of, waiting_rungs
from fashionclip_tune.reporting.sweep_view import SweepView

# Told apart by the colour-blind (Okabe & Ito 2008); architectures in the order in which they appear.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_INK, FAINT, _GRID = "#1d2733", "#8a97a5", "#e6eaee"
_LABELS = {"clip_model": "model", "loss_function": "loss", "training.learning_rate": "learning rate"}


def learning_curves(view: SweepView) -> go.Figure | None:
    """The metric over examples seen, the zero-shot weights at 0; dashed lines are rungs.

    What a line ends with: a cross is an early end, a ring a trial that waits at a rung or waited there to the end of its sweep.
    """
    figure = go.Figure()
    colour_of = colours(view)
    legend: set[str] = set()
    for row in view.content["trials"]:
        curve = view.curves[row["trial_id"]]
        if not curve:
            continue
        model = start_of(row)
        paused = paused_at(row, view.content) is not None
        sign = "circle-open" if paused else "circle" if row["state"] in ("RUNNING", "COMPLETE") else "x"
        is_best = view.best is not None and row["trial_id"] == view.best["trial_id"]
        figure.add_scatter(
            x=[each["examples_seen"] for each in curve],
            y=[each[view.metric.name] for each in curve],
            mode="lines+markers",
            line={"color": colour_of[model], "width": 3.5 if is_best else 1.4},
            marker={"size": [0] * (len(curve) - 1) + [8], "symbol": sign},
            opacity=1 if is_best else 0.6,
            name=model,
            legendgroup=model,
            showlegend=model not in legend,
            text=described(row),
            hovertemplate="%{text}<br>%{x:,} examples: %{y:.4f}<extra></extra>",
        )
        legend.add(model)
    if not legend:
        return None
    for number, rung in enumerate(view.rungs, start=1):
        figure.add_vline(x=rung, line={"color": FAINT, "dash": "dash", "width": 1}, annotation_text=f"rung {number}")
    return styled(figure, 430, "examples seen", view.metric.label)


def importances(view: SweepView) -> go.Figure | None:
    """A bar a drawn parameter."""
    if view.importance is None or not view.importance.shares:
        return None
    shares = dict(sorted(view.importance.shares.items(), key=lambda item: item[1]))
    figure = go.Figure(
        go.Bar(
            x=list(shares.values()),
            y=list(shares),
            orientation="h",
            marker={"color": _COLOURS[0]},
            text=[f"{share:.0%}" for share in shares.values()],
            textposition="outside",
            cliponaxis=False,
            hoverinfo="skip",
        )
    )
    figure.update_xaxes(tickformat=".0%", range=[0, 1.1 * max(*shares.values(), 0.01)])
    return styled(figure, 90 + 30 * len(shares), "share explained", None)


def parallel_coordinates(view: SweepView) -> go.Figure | None:
    """An axis a setting that varied, and one for the score; "none" where a setting does not apply to a trial."""
    rows = [row for row in view.rows if not is_open(row)]
    settings = list(dict.fromkeys(name for row in rows for name in row["config"]))
    axes = [
        _axis(_LABELS.get(name, name.split(".")[-1]), [_shown(name, row["config"].get(name)) for row in rows])
        for name in settings
        if len({str(row["config"].get(name)) for row in rows}) > 1
    ]
    if len(rows) < 2 or not axes:
        return None
    recalls = [view.metric.of(row) for row in rows]
    score = {"label": view.metric.label, "values": recalls, "tickformat": ".3f"}
    line = {"color": recalls, "colorscale": "Viridis", "reversescale": True, "showscale": False}
    figure = go.Figure(go.Parcoords(dimensions=[*axes, score], line=line, labelfont={"size": 13}, tickfont={"size": 12}))
    styled(figure, 380, None, None)
    figure.update_layout(margin={"l": 90, "r": 70, "t": 60, "b": 30})
    return figure


def _shown(name: str, value: Any) -> Any:
    return loss_label(value) if name == "loss_function" else value


def _axis(label: str, values: Sequence[Any]) -> dict[str, Any]:
    """Numbers over more than a decade on a logarithmic axis, words as steps, a place below all others for "none"."""
    known = [value for value in values if value is not None]
    if any(isinstance(value, str | bool) for value in known):
        words = sorted({str(value) for value in known}) + ["none"] * (len(known) < len(values))
        places = [words.index("none" if value is None else str(value)) for value in values]
        return {"label": label, "values": places, "tickvals": list(range(len(words))), "ticktext": words}
    logarithmic = min(known) > 0 and max(known) > 10 * min(known)
    numbers = [math.log10(value) if logarithmic else float(value) for value in known]
    low, high = min(numbers), max(numbers)
    below = low - 0.2 * (high - low or 1)
    ticks = {low + share * (high - low): "" for share in (0, 0.25, 0.5, 0.75, 1)}
    labels = {tick: f"{10**tick:.1e}".replace("e-0", "e-") if logarithmic else f"{tick:.3g}" for tick in ticks}
    if len(known) < len(values):
        labels = {below: "none", **labels}
    shown = iter(numbers)
    places_of = [below if value is None else next(shown) for value in values]
    return {"label": label, "values": places_of, "tickvals": list(labels), "ticktext": list(labels.values())}


def budget(view: SweepView) -> go.Figure | None:
    """Photos that each trial trained on, and those that its pause or an early end saved; best trial on top."""
    rows = [row for row in view.rows if not is_open(row)]
    if not rows:
        return None
    names = [row["trial_id"] for row in reversed(rows)]
    spent = [row["examples_seen"] for row in reversed(rows)]
    figure = go.Figure()
    figure.add_bar(x=spent, y=names, orientation="h", name="trained on", marker={"color": _COLOURS[0]})
    saved = [max(0, view.budget_examples - seen) for seen in spent]
    figure.add_bar(
        x=saved,
        y=names,
        orientation="h",
        name="saved by pauses" if waiting_rungs(view.content) else "saved by stopping early",
        marker={"color": "#cfd8e0"},
    )
    figure.update_layout(barmode="stack", bargap=0.25)
    figure.update_yaxes(type="category")
    return styled(figure, 110 + max(8, min(22, 900 // len(rows))) * len(rows), "examples", "trial")


def best_of_each(groups: Sequence[Sequence[Standing]]) -> go.Figure | None:
    """The best trial of each sweep with its interval; how it was counted where that differs."""
    found = [(each.sweep + f"<br>{each.counted}" * (len(groups) > 1), each) for group in groups for each in group]
    if not found:
        return None
    recalls = [each.metric.score(each.row) for _, each in found]
    ends = [each.metric.interval(each.row) or (recall, recall) for (_, each), recall in zip(found, recalls, strict=True)]
    above = [high - recall for (_, high), recall in zip(ends, recalls, strict=True)]
    below = [recall - low for (low, _), recall in zip(ends, recalls, strict=True)]
    labels = " or ".join(dict.fromkeys(each.metric.label for _, each in found))
    figure = go.Figure(
        go.Scatter(
            x=recalls,
            y=[name for name, _ in found],
            mode="markers",
            marker={"size": 12, "color": _COLOURS[0]},
            error_x={"type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": _COLOURS[0]},
            text=[described(each.row) for _, each in found],
            hovertemplate="%{text}<br>%{x:.4f}<extra></extra>",
        )
    )
    figure.update_yaxes(type="category", autorange="reversed")
    return styled(figure, 130 + 40 * len(found), f"{labels} of the best trial, 95 % interval", None)


def described(row: TrialRow) -> str:
    config = row["config"]
    rate = f", lr {config['training.learning_rate']:.1e}" if "training.learning_rate" in config else ""
    return f"trial {row['trial_id']}: {start_of(row)}, {loss_label(config.get('loss_function'))}{rate}"


def colours(view: SweepView) -> dict[str, str]:
    """A colour an architecture, the same in all figures of a sweep."""
    models = sorted({start_of(row) for row in view.content["trials"] if row["config"]})
    return {model: _COLOURS[number % len(_COLOURS)] for number, model in enumerate(models)}


def styled(figure: go.Figure, height: int, x_title: str | None, y_title: str | None) -> go.Figure:
    figure.update_layout(
        height=height,
        template="none",
        font={"family": "Inter, 'Segoe UI', system-ui, sans-serif", "size": 13, "color": _INK},
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        paper_bgcolor="white",
        plot_bgcolor="white",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"bgcolor": "white"},
    )
    figure.update_xaxes(gridcolor=_GRID, zeroline=False, automargin=True, title=x_title)
    figure.update_yaxes(gridcolor=_GRID, zeroline=False, automargin=True, title=y_title)
    return figure
