"""What ``prepare`` tells its caller: what was written, what was not, and what the data report warns of."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fashionclip_tune.prepare.columns import ColumnChoice
from fashionclip_tune.prepare.data_report import DataReport

_NUM_EXAMPLES = 20  # of each reason, in report.json


@dataclass(frozen=True)
class SplitCounts:
    """What was written for one split."""

    samples: int
    products: int
    shards: int


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What was written, and what was not; ``str(report)`` is for people, ``as_json()`` is report.json."""

    out: Path
    notes: tuple[str, ...]
    """What was guessed of the tables and done to their rows, a line each."""
    num_rows: int
    num_photos: int  # those dropped included
    splits: Mapping[str, SplitCounts]
    columns: Mapping[str, ColumnChoice]  # by purpose: image, caption, id, category, split, group
    dropped: Mapping[str, tuple[tuple[int, str], ...]]  # by reason: row number (the header is row 1), file
    splits_from: str | None  # a column, or the files' names; None: drawn
    leaking_products: int  # how many products, or products of a group, the given splits put into several splits
    data: DataReport

    def lines(self) -> list[str]:
        lines = [f"data set written to {self.out}"]
        for split, counts in self.splits.items():
            numbers = f"{counts.samples:,} samples, {counts.products:,} products, {counts.shards:,} shards"
            lines.append(f"  {split:5}  {numbers if counts.samples else 'none'}")
        lines.append("columns: " + ", ".join(f"{purpose}: {choice}" for purpose, choice in self.columns.items()))
        if guessed := [purpose for purpose, choice in self.columns.items() if choice.guessed]:
            flags = ", ".join(f"--{purpose}-column" for purpose in guessed)
            lines.append(f"  guessed columns are changed by {flags}; none stands for no column")
        lines += self.notes
        if self.columns["id"].name is None:
            lines.append("no product ids: photos with the same caption count as one product")
        lines.append("splits: " + (f"from {self.splits_from}" if self.splits_from else "drawn"))
        what = "photos" if self.num_photos == self.num_rows else f"photos in {self.num_rows:,} rows"
        lines.append(f"dropped: {sum(map(len, self.dropped.values())):,} of {self.num_photos:,} {what}")
        for reason, rows in self.dropped.items():
            examples = ", ".join(f"row {number}: {file!r}" for number, file in rows[:3])
            lines.append(f"  {reason}: {len(rows):,} ({examples}{', ...' if len(rows) > 3 else ''})")
        if self.leaking_products:
            lines.append(f"warning: {self.leaking_products:,} products are in several splits: scores will flatter")
        return lines + self.data.lines()

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def as_json(self) -> dict[str, Any]:
        return {
            "rows": self.num_rows,
            "photos": self.num_photos,
            "splits": {split: vars(counts) for split, counts in self.splits.items()},
            "columns": {purpose: list(choice.names) for purpose, choice in self.columns.items()},
            "notes": list(self.notes),
            "splits_from": self.splits_from or "drawn",
            "dropped": {
                reason: {"count": len(rows), "examples": [{"row": row, "file": file} for row, file in rows[:_NUM_EXAMPLES]]}
                for reason, rows in self.dropped.items()
            },
            "leaking_products": self.leaking_products,
            "data": self.data.as_json(),
        }
