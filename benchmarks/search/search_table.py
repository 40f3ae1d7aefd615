"""The table of recorded learning curves, and a surrogate fitted to it. One row a setting; lists are separated by spaces."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

_LISTS = ("examples_seen", "recall_at_10", "recall_at_5", "loss", "device_s")
_DIGITS = {"recall_at_10": 6, "recall_at_5": 6, "loss": 4, "device_s": 2}
COLUMNS = ("setting", "parameters", *_LISTS)


def append_curve(path: Path, number: int, parameters: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds a whole curve: ``rows`` have the values of ``_LISTS``, a row a stage, the zero-shot model first (without a loss)."""
    is_new = not path.exists()
    cells = [" ".join(_cell(name, row[name]) for row in rows) for name in _LISTS]
    with open(path, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS] * is_new + [(number, json.dumps(parameters), *cells)])


def _cell(name: str, value: float | None) -> str:
    return "-" if value is None else str(round(value, _DIGITS[name]) if name in _DIGITS else value)


def num_curves(path: Path) -> int:
    """How many curves are recorded; a line that a kill has torn is cut off."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    path.write_bytes(whole)
    return max(0, len(whole.splitlines()) - 1)


@dataclass(frozen=True)
class Table:
    """N recorded settings with S stages each."""

    parameters: list[dict[str, Any]]
    examples_seen_S: list[int]
    recall_NS: np.ndarray
    device_s_NS: np.ndarray
    """Since the start of the run."""


def read_table(path: Path) -> Table:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return Table(
        parameters=[json.loads(row["parameters"]) for row in rows],
        examples_seen_S=[int(seen) for seen in rows[0]["examples_seen"].split()],
        recall_NS=np.array([[float(value) for value in row["recall_at_10"].split()] for row in rows]),
        device_s_NS=np.array([[float(value) for value in row["device_s"].split()] for row in rows]),
    )


class Surrogate:
    """A Gaussian process from a setting to its whole curve: the mean is what the setting is worth.

    What a sweep sees is the mean plus noise, drawn anew for each trial and stage. Its size is taken from the curves alone: at
    a stage, y[t-1] - 2 y[t] + y[t+1] has six times the variance of an evaluation, beside the curve's bend, which the median
    over all settings takes out.
    """

    def __init__(self, table: Table, distributions: Mapping[str, BaseDistribution]) -> None:
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        self.table = table
        self._distributions = distributions
        features = self.features(table.parameters)
        kernel = ConstantKernel(1.0) * Matern(np.ones(features.shape[1]), (0.1, 100.0), nu=2.5) + WhiteKernel(0.05, (1e-5, 1.0))
        self._process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
        self._process.fit(features, table.recall_NS)
        self.noise_S = _stage_noise(table.recall_NS)

    def features(self, parameters: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """[N, F], each between 0 and 1; a parameter that a setting does not have counts as its lowest value."""
        columns = []
        for name, distribution in self._distributions.items():
            if isinstance(distribution, CategoricalDistribution):
                columns += [[float(point.get(name) == choice) for point in parameters] for choice in distribution.choices[1:]]
            else:
                assert isinstance(distribution, FloatDistribution)
                scale = np.log if distribution.log else np.asarray
                low, high = scale(distribution.low), scale(distribution.high)
                columns.append([(scale(point.get(name, distribution.low)) - low) / (high - low) for point in parameters])
        return np.array(columns).T

    def curves(self, parameters: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """[N, S] recall_at_10 at each stage, without noise."""
        return np.clip(self._process.predict(self.features(parameters)), 0.0, 1.0)


def _stage_noise(recall_NS: np.ndarray) -> np.ndarray:
    bends = recall_NS[:, :-2] - 2 * recall_NS[:, 1:-1] + recall_NS[:, 2:]
    spread = 1.4826 * np.median(np.abs(bends - np.median(bends, axis=0)), axis=0) / np.sqrt(6)
    return np.array([0.0, *spread, spread[-1]])  # the zero-shot model is the same for all
