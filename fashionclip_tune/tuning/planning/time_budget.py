"""``--time-budget``: this run of the program ends in time, with everything kept."""

import time
from collections.abc import Callable

_MARGIN_S = 600.0
_LARGEST_MARGIN = 1 / 6  # of the budget: of less than an hour, ten minutes would be too much


class TimeBudget:
    """When trials must have stopped, and which may still be started.

    Trials are stopped ten minutes before the budget's end, or a sixth of it where that is less: the rest is for their
    checkpoints, the winner and the durable folder.
    """

    def __init__(
        self,
        minutes: float,
        seconds_of: Callable[[str, int], float | None],
        first_rung: int,
        models: tuple[str, ...],
        *,
        started: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            seconds_of: what a model takes for so many examples, with the start of its process; as far as is known by now.
            first_rung: examples after which a trial is first held against others.
            started: when the program was, by ``clock``.
        """
        budget_s = 60 * minutes
        self._clock = clock
        self._ends = (clock() if started is None else started) + budget_s - min(_MARGIN_S, _LARGEST_MARGIN * budget_s)
        self._seconds_of = seconds_of
        self._first_rung = first_rung
        self._models = models
        self.is_over = False
        """Whether trials were stopped, or not started, for want of time."""
        self.refusal: str | None = None
        """What to say where a trial was not started."""

    def left_s(self) -> float:
        """Until trials are stopped."""
        return max(0.0, self._ends - self._clock())

    def may_start(self, model: str | None = None) -> bool:
        """Whether a trial of this model, or of any where none is named, reaches its first rung in what is left."""
        models = [model] if model is not None else self._models
        if any(self.reaches(name, self._first_rung) for name in models) or not models:
            return True
        least = min(self._seconds_of(name, self._first_rung) or 0.0 for name in models)
        self.refuse(f"no more trials were started: the first rung takes {_said(least)}, {_said(self.left_s())} were left")
        return False

    def reaches(self, model: str, examples: int) -> bool:
        """Whether a trial of the model trains so many examples, with its start, in what is left; so if that is not known."""
        return (self._seconds_of(model, examples) or 0.0) <= self.left_s()

    def refuse(self, why: str) -> None:
        """For want of time nothing more is started."""
        self.is_over, self.refusal = True, why


def _said(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
