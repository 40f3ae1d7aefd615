"""Several sweeps beside one another: what each is called, and whose figures may be compared at all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fashionclip_tune.evaluation.evaluate import counted_as
from fashionclip_tune.reporting.sweep_files import (
    TrialRow,
    best_row,
    compare_trials,
    figure_or_nothing,
    read_sweep,
    recall_of,
    start_of,
)

NOT_COMPARABLE = "counted on other photos or in another way, recalls are not comparable: best first within each only"


STANDING_HEADERS = ("sweep", "trial", "model", "R@10", "gain", "%", "behind", "counted as")


@dataclass(frozen=True)
class Standing:
    """The best trial of a sweep. ``behind``: its distance to the first one of its group; of that one nothing."""

    sweep: str
    row: TrialRow
    counted: str
    behind: str

    def cells(self) -> list[str]:
        """Below ``STANDING_HEADERS``."""
        row = self.row
        gains = figure_or_nothing(row.get("gain"), "+.4f"), figure_or_nothing(row.get("relative_gain"), "+.0%").rstrip("%")
        recall = figure_or_nothing(row["recall_at_10"], ".4f")
        return [self.sweep, row["trial_id"], start_of(row), recall, *gains, self.behind, self.counted]


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


def counting_of(sweep: Mapping[str, Any], row: TrialRow) -> tuple[str, str]:
    """What a recall is to be compared within: the photos that were searched (their fingerprint), and how it was counted."""
    photos = str(sweep.get("data_fingerprint", "")).rpartition(":")[2]
    return photos, counted_as(row) if row.get("protocol") else ""


def counted_in_words(countings: Sequence[tuple[str, str]]) -> list[str]:
    """How each was counted, and on which photos where words alone do not tell them apart."""
    distinct = set(countings)
    alike = [counted for counted in {how for _, how in distinct} if sum(how == counted for _, how in distinct) > 1]
    return [f"{counted} (photos {photos[:6] or 'unknown'})" if counted in alike else counted for photos, counted in countings]


def standings(sweep_dirs: Sequence[Path]) -> list[list[Standing]]:
    """The best trial of each sweep, best first among those that were counted in the same way on the same photos."""
    sweeps = [(name, folder, read_sweep(folder)) for name, folder in zip(names_of(sweep_dirs), sweep_dirs, strict=True)]
    known = [(name, folder, sweep, row) for name, folder, sweep in sweeps if (row := best_row(sweep["trials"])) is not None]
    countings = [counting_of(sweep, row) for _, _, sweep, row in known]
    words = dict(zip(countings, counted_in_words(countings), strict=True))
    groups = []
    for counting in dict.fromkeys(countings):
        group = [each for each, own in zip(known, countings, strict=True) if own == counting]
        group.sort(key=lambda each: -recall_of(each[3]))
        _, first_dir, _, first = group[0]
        behind = ["", *(_behind(first_dir, first, folder, row) for _, folder, _, row in group[1:])]
        groups.append([Standing(each[0], each[3], words[counting], by) for each, by in zip(group, behind, strict=True)])
    return groups


def _behind(first_dir: Path, first: TrialRow, folder: Path, row: TrialRow) -> str:
    test = compare_trials(first_dir, first, folder, row)
    return "other queries" if test is None else f"{test.difference:.4f}, {'tie' if test.is_tie else 'real'}"
