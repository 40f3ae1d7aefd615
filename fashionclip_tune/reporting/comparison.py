"""Several sweeps beside one another: what each is called, and whose figures may be compared at all."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fashionclip_tune.evaluation.evaluate import counted_as
from fashionclip_tune.evaluation.metric import Metric, metric_of
from fashionclip_tune.reporting.sweep_files import (
    TrialRow,
    best_row,
    compare_trials,
    figure_or_nothing,
    read_sweep,
    start_of,
)

NOT_COMPARABLE = "counted on other photos or in another way, recalls are not comparable: best first within each only"


@dataclass(frozen=True)
class Standing:
    """The best trial of a sweep. ``behind``: its distance to the first one of its group; of that one nothing."""

    sweep: str
    row: TrialRow
    metric: Metric
    counted: str
    behind: str

    def cells(self) -> list[str]:
        """Below ``standing_headers``."""
        row = self.row
        gains = figure_or_nothing(row.get("gain"), "+.4f"), figure_or_nothing(row.get("relative_gain"), "+.0%").rstrip("%")
        recall = figure_or_nothing(self.metric.of(row), ".4f")
        return [self.sweep, row["trial_id"], start_of(row), recall, *gains, self.behind, self.counted]


def standing_headers(groups: Sequence[Sequence[Standing]]) -> tuple[str, ...]:
    """Where they maximised different metrics, the last column says which."""
    (first, *others) = dict.fromkeys(each.metric.short for group in groups for each in group) or ("",)
    return ("sweep", "trial", "model", "recall" if others else first, "gain", "%", "behind", "counted as")


def names_of(sweep_dirs: Sequence[Path]) -> list[str]:
    """What each sweep is called; the shortest end of its path that tells it apart where another one is called the same.

    Raises:
        UserError: a folder is no sweep.
    """
    names = [str(read_sweep(folder)["name"]) for folder in sweep_dirs]
    paths = [folder.absolute().parts for folder in sweep_dirs]
    places = list(zip(names, paths, strict=True))
    return [_told_apart(name, path, [other for same, other in places if same == name]) for name, path in places]


def _told_apart(name: str, path: Sequence[str], of_that_name: Sequence[Sequence[str]]) -> str:
    others = [other for other in of_that_name if other != path]
    if not others:
        return name
    length = 1
    while any(other[-length:] == path[-length:] for other in others):
        length += 1
    return str(Path(*path[-length:]))


class Counting(NamedTuple):
    """What a recall is to be compared within: which recall, how it was counted, the photos searched (their fingerprint)."""

    metric: Metric
    how: str
    photos: str


def counting_of(sweep: Mapping[str, Any], row: TrialRow) -> Counting:
    photos = str(sweep.get("data_fingerprint", "")).rpartition(":")[2]
    return Counting(metric_of(sweep), counted_as(row) if row.get("protocol") else "", photos)


def counted_in_words(countings: Sequence[Counting]) -> list[str]:
    """How each was counted; which recall, where that differs; and on which photos, where words alone do not tell them apart."""
    is_one = len({each.metric for each in countings}) <= 1
    how = {each: each.how if is_one else ", ".join(filter(None, [each.metric.name, each.how])) for each in countings}
    words = Counter(how.values())
    return [f"{how[each]} (photos {each.photos[:6] or 'unknown'})" if words[how[each]] > 1 else how[each] for each in countings]


def standings(sweep_dirs: Sequence[Path]) -> list[list[Standing]]:
    """The best trial of each sweep, best first among those that were counted in the same way on the same photos."""
    sweeps = [(name, folder, read_sweep(folder)) for name, folder in zip(names_of(sweep_dirs), sweep_dirs, strict=True)]
    best = ((name, folder, sweep, best_row(sweep["trials"], metric_of(sweep))) for name, folder, sweep in sweeps)
    known = [(name, folder, sweep, row) for name, folder, sweep, row in best if row is not None]
    countings = [counting_of(sweep, row) for _, _, sweep, row in known]
    words = dict(zip(countings, counted_in_words(countings), strict=True))
    groups = []
    for counting in dict.fromkeys(countings):
        metric = counting.metric
        group = [each for each, own in zip(known, countings, strict=True) if own == counting]
        group.sort(key=lambda each: -metric.score(each[3]))
        _, first_dir, _, first = group[0]
        behind = ["", *(_behind(first_dir, first, folder, row, metric) for _, folder, _, row in group[1:])]
        groups.append([Standing(each[0], each[3], metric, words[counting], by) for each, by in zip(group, behind, strict=True)])
    return groups


def _behind(first_dir: Path, first: TrialRow, folder: Path, row: TrialRow, metric: Metric) -> str:
    test = compare_trials(first_dir, first, folder, row, metric)
    return "other queries" if test is None else f"{test.difference:.4f}, {'tie' if test.is_tie else 'real'}"
