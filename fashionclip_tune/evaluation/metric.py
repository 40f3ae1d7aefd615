"""What a sweep maximises: one of the recalls of an evaluation. How each is called, read of a row and tested."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fashionclip_tune.errors import UserError
from fashionclip_tune.evaluation.protocols import DIRECTIONS, KS, Retrieval
from fashionclip_tune.evaluation.statistics import QueryValues, bootstrap_interval


@dataclass(frozen=True)
class Metric:
    """Recall among the first ``k``, the mean over ``directions``.

    It is counted under the protocol of the evaluations, which is the same for all trials of a sweep. Its rows, read below,
    are those of evaluations and of trials.
    """

    k: int
    directions: tuple[str, ...] = DIRECTIONS

    @property
    def name(self) -> str:
        """As evaluations have it."""
        return "_".join([f"recall_at_{self.k}", *self._one_direction])

    @property
    def label(self) -> str:
        """For people."""
        return " ".join([f"Recall@{self.k}", *self._one_direction]).replace("_", " ")

    @property
    def short(self) -> str:
        """For the header of a column."""
        return " ".join(
            [f"R@{self.k}", *({"text_to_image": "t2i", "image_to_text": "i2t"}[name] for name in self._one_direction)]
        )

    @property
    def legend(self) -> str:
        """What ``short`` stands for."""
        return f"{self.short}: {self.name}" + ("" if self._one_direction else ", mean of both directions")

    @property
    def _one_direction(self) -> tuple[str, ...]:
        return self.directions if len(self.directions) == 1 else ()

    def of(self, row: Mapping[str, Any]) -> float | None:
        """None before the first evaluation."""
        value: float | None = row.get(self.name)
        return value

    def score(self, row: Mapping[str, Any]) -> float:
        """What a trial is ranked by: 0 before its first evaluation."""
        return self.of(row) or 0.0

    def zero_shot(self, row: Mapping[str, Any]) -> float | None:
        """Of a trial: what its weights had before training; None where they were not evaluated."""
        value: float | None = row.get(f"untouched_{self.name}")
        return value

    def interval(self, row: Mapping[str, Any]) -> tuple[float, float] | None:
        """95 % interval over products; None where it is not known."""
        low, high = row.get(f"{self.name}_low"), row.get(f"{self.name}_high")
        return None if low is None or high is None else (low, high)

    def hits(self, retrieval: Retrieval) -> tuple[QueryValues, ...]:
        """Query by query: the metric is the mean over directions of their means."""
        return retrieval.hits(self.k, self.directions)

    def computed_interval(self, retrieval: Retrieval) -> dict[str, float]:
        """As a row would have it: evaluations have that of ``DEFAULT_METRIC`` alone."""
        low, high = bootstrap_interval(self.hits(retrieval))
        return {f"{self.name}_low": low, f"{self.name}_high": high}


METRICS = {
    metric.name: metric
    for metric in (Metric(k, directions) for k in KS for directions in (DIRECTIONS, *((name,) for name in DIRECTIONS)))
}
DEFAULT_METRIC = Metric(10)


def metric_named(name: str) -> Metric:
    """Raises UserError where there is none of that name."""
    if name not in METRICS:
        raise UserError(
            f"--metric {name!r} is not allowed: {', '.join(METRICS)}; the protocol by which it is counted is "
            "--set evaluation.protocol=NAME"
        )
    return METRICS[name]


def metric_of(sweep: Mapping[str, Any]) -> Metric:
    """What a sweep maximises, by its ``sweep.json`` or header.

    Raises:
        UserError: a metric that this version does not know.
    """
    name = sweep.get("metric", DEFAULT_METRIC.name)
    if name not in METRICS:
        raise UserError(f"sweep {sweep.get('name')} maximises {name}, which this version does not know: {', '.join(METRICS)}")
    return METRICS[name]
