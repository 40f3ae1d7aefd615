"""Shares of seeds over time as a small SVG, written by hand: a plotting library would be needed for nothing else here."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

_COLOURS = ("#888888", "#e69f00", "#0072b2", "#56b4e9", "#d55e00", "#009e73")
_COLUMNS, _WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 3, 330, 230, 40, 30, 40
_HEAD = 44


def plot(path: Path, grid: np.ndarray, panels: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """One panel a world. ``grid`` [G] in whole trials; of each arm the share of seeds that have the level by then [G]."""
    parts = []
    arms = list(dict.fromkeys(arm for each in panels.values() for arm in each))
    for number, (label, shares) in enumerate(panels.items()):
        left, top = number % _COLUMNS * _WIDTH + _LEFT, number // _COLUMNS * _HEIGHT + _TOP + _HEAD
        width, height = _WIDTH - _LEFT - 12, _HEIGHT - _TOP - _BOTTOM
        # Logarithmic, as the first trials are where searchers differ.
        x_G = left + width * np.log(grid / grid[0]) / np.log(grid[-1] / grid[0])
        parts.append(f'<text x="{left}" y="{top - 8}" font-weight="bold">{label}</text>')
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
            y = top + height * (1 - tick)
            colour = "#999" if tick == 0.5 else "#ddd"
            parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"/>')
            parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{100 * tick:.0f}</text>')
        for tick in (0.25, 0.5, 1, 2, 4, 8, 16):
            x = float(np.interp(tick, grid, x_G))
            parts.append(f'<text x="{x:.1f}" y="{top + height + 16}" text-anchor="middle">{tick:g}</text>')
        for arm, share_G in shares.items():
            points = " ".join(f"{x:.1f},{top + height * (1 - y):.1f}" for x, y in zip(x_G, share_G, strict=True))
            colour = _COLOURS[arms.index(arm)]
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    head = [
        f'<text x="{_LEFT}" y="18">% of seeds that have the level of 32 random trials, by device time in whole trials</text>'
    ]
    for number, arm in enumerate(arms):
        head.append(f'<text x="{_LEFT + 160 * number}" y="38" fill="{_COLOURS[number]}">{arm}</text>')
    size = f'width="{_COLUMNS * _WIDTH}" height="{-(-len(panels) // _COLUMNS) * _HEIGHT + _HEAD}"'
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    path.write_text("\n".join([frame, '<rect width="100%" height="100%" fill="white"/>', *head, *parts, "</svg>"]) + "\n")
