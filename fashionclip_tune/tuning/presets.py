"""``--preset``: how many trials, and how much each trains, for a first look, an evening or a night on one T4."""

import math
from dataclasses import dataclass

from fashionclip_tune.errors import UserError
from fashionclip_tune.tuning.forecast import Course, forecast

_DEFAULT_TRIALS = 16
# More passes over a small collection than these teach little that is new.
_MAX_EPOCHS = 10


@dataclass(frozen=True)
class Preset:
    num_trials: int
    first_rung: int
    """Examples; the second rung has three times as many, the budget nine times."""
    hours: float
    """Where the known rates need more, the rungs come closer."""


PRESETS = {
    "quick": Preset(8, 1_800, 0.5),
    "evening": Preset(30, 16_000, 6.0),
    "night": Preset(30, 29_000, 11.0),
}


def preset_trials(name: str | None) -> int:
    """Raises UserError where there is no such preset."""
    if name is None:
        return _DEFAULT_TRIALS
    if name not in PRESETS:
        raise UserError(f"--preset {name!r} is not allowed: {', '.join(PRESETS)}")
    return PRESETS[name].num_trials


def preset_budget(name: str, course: Course, *, batch_sizes: tuple[int, ...], num_train: int) -> tuple[int, int, str]:
    """Examples of a trial and of a stage, where no flag gives them, and what was made of the preset.

    The preset's rungs, but no more than ten passes over the data in all nor, by the rates that are known, than its hours.
    """
    factor = course.reduction_factor
    preset, unit, note = PRESETS[name], math.lcm(*batch_sizes), ""
    wanted = preset.first_rung * 9 / factor**2  # the same budget, whatever the factor
    if wanted * factor**2 > _MAX_EPOCHS * num_train:
        wanted, note = _MAX_EPOCHS * num_train / factor**2, f"rungs brought closer: {_MAX_EPOCHS} passes over the data"
    stage = max(1, int(wanted / unit)) * unit
    hours = forecast(course, stage * factor**2, stage).hours
    if hours is not None and hours > preset.hours:
        stage = max(1, int(stage * preset.hours / hours / unit)) * unit
        note = f"rungs brought closer: {preset.hours:g} hours at the known rates"
    return stage * factor**2, stage, note
