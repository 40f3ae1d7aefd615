"""Medians with quartiles as a small SVG, written by hand: a plotting library would be needed for nothing else here."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

_COLOURS = ("#888888", "#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 520, 360, 60, 36, 48


def plot(path: Path, grid: np.ndarray, panels: Mapping[str, Mapping[str, np.ndarray]], *, title: str) -> None:
    """One panel a cost. ``grid`` [P] in whole trials; of each arm the lower quartile, median and upper quartile [3, P]."""
    shown = [values for arms in panels.values() for values in arms.values()]
    top = max(float(values.max()) for values in shown)
    bottom = min(float(values[0, len(grid) // 16]) for values in shown)
    parts = []
    for number, (label, arms) in enumerate(panels.items()):
        left, width = number * _WIDTH + _LEFT, _WIDTH - _LEFT - 10
        # Logarithmic, as the first trials are where searchers differ.
        x_P = left + width * np.log(grid / grid[0]) / np.log(grid[-1] / grid[0])

        def y(value: np.ndarray | float) -> np.ndarray:
            return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (np.maximum(value, bottom) - bottom) / (top - bottom))

        for tick in np.linspace(bottom, top, 6):
            parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.3f}</text>')
        for tick in (0.5, 1, 2, 4, 8, 16, 32):
            x = float(np.interp(tick, grid, x_P))
            parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 28}" text-anchor="middle">{tick:g}</text>')
        middle = left + width / 2
        parts.append(f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">{label} spent, in whole trials</text>')
        for line, (arm, (low_P, median_P, high_P)) in enumerate(arms.items()):
            colour = _COLOURS[line]
            band = [*zip(x_P, y(low_P), strict=True), *reversed(list(zip(x_P, y(high_P), strict=True)))]
            parts.append(f'<polygon points="{_points(band)}" fill="{colour}" opacity="0.15"/>')
            median = _points(list(zip(x_P, y(median_P), strict=True)))
            parts.append(f'<polyline points="{median}" fill="none" stroke="{colour}" stroke-width="2"/>')
            low_right = _HEIGHT - _BOTTOM - 12 - 16 * (len(arms) - 1 - line)
            parts.append(f'<text x="{left + width - 8}" y="{low_right}" text-anchor="end" fill="{colour}">{arm}</text>')
    head = f'<text x="{_LEFT}" y="20">{title}: Recall@10 in hand, median and quartiles of the seeds</text>'
    width = _WIDTH * len(panels)
    frame = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT}" font-family="sans-serif" font-size="12">'
    )
    path.write_text("\n".join([frame, '<rect width="100%" height="100%" fill="white"/>', head, *parts, "</svg>"]) + "\n")


def _points(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
