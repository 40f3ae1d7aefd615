"""What a search has decided: one record of the journal each, from which all that follows is read off again.

A trial that has reported at a rung goes on, or waits there: its end is open, its state stays on disk. In its place a trial that
waits is thawed, or one with new settings is drawn.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """What could run next, and what was expected of it: its value at the end of its budget, and the score of running it.

    ``trial``: None for new settings; ``predicted`` and the others are None where the space's own points came first.
    """

    trial: int | None
    params: Mapping[str, Any]
    predicted: float | None = None
    deviation: float | None = None
    score: float | None = None


@dataclass(frozen=True)
class Decision:
    """Of one moment: a trial stands at a rung, or a slot is free.

    Attributes:
        reporter: the trial at the rung, after ``examples_seen``; None: a slot was free.
        chosen: what runs; None: the reporter waits, and one of the space's points comes, or nothing.
        variance: of the value that the reporter reported, by its bootstrap interval; None: not known.
        given_up: trials that waited and end now, each with its stop reason.
    """

    reporter: int | None
    examples_seen: int
    chosen: Candidate | None
    runner_up: Candidate | None = None
    given_up: Mapping[int, str] | None = None
    variance: float | None = None

    def to_record(self) -> dict[str, Any]:
        """For JSON, whose keys are words."""
        return {**asdict(self), "given_up": [list(each) for each in (self.given_up or {}).items()]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Decision":
        chosen, runner_up = (record[name] and Candidate(**record[name]) for name in ("chosen", "runner_up"))
        given_up = {int(number): str(reason) for number, reason in record["given_up"]}
        return cls(record["reporter"], record["examples_seen"], chosen, runner_up, given_up, record["variance"])


class Decisions:
    """All of a sweep, and what follows from them."""

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self.all: list[Decision] = []
        self.waiting: dict[int, int] = {}
        """Trials that wait at a rung, and the examples that they had seen there."""
        self._judged: dict[int, dict[int, float | None]] = {}
        for record in records:
            self.add(Decision.from_record(record))

    def add(self, decision: Decision) -> None:
        self.all.append(decision)
        if decision.reporter is not None:
            self.waiting[decision.reporter] = decision.examples_seen
            self._judged.setdefault(decision.reporter, {})[decision.examples_seen] = decision.variance
        gone = [*(decision.given_up or {}), *([decision.chosen.trial] if decision.chosen is not None else [])]
        for number in gone:
            self.waiting.pop(number, None)  # type: ignore[arg-type]  # new settings are no trial yet

    def judged_at(self, number: int) -> Mapping[int, float | None]:
        """Examples seen at which the trial has been decided on, and its value's variance: a thawed one reports them again."""
        return self._judged.get(number, {})
