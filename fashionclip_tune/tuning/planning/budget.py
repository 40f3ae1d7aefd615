"""How many examples a trial and its stages get, from flags or a preset."""

import math

from fashionclip_tune.errors import UserError
from fashionclip_tune.tuning.planning.forecast import Course, forecast
from fashionclip_tune.tuning.planning.settings import PRESETS


def plan_budget(
    budget: int | None, stage: int | None, *, examples: int, batch_sizes: tuple[int, ...], reduction_factor: int
) -> tuple[int, int]:
    """Examples of a trial and of a stage, which is also the first rung: multiples of every batch size in the space.

    Args:
        budget, stage: as given by flags, or None.
        examples: of a trial, about, where no flag says it.

    Raises:
        UserError: they do not fit each other or the batch sizes; says what would.
    """
    unit = math.lcm(*batch_sizes)
    given_stage = stage
    stages = reduction_factor**2  # by default: rungs after 1 / eta**2 and 1 / eta of the budget
    for flag, value in (("--budget-examples", budget), ("--grace-examples", stage)):
        if value is not None and (value < unit or value % unit):
            nearest = max(1, round(value / unit)) * unit
            raise UserError(
                f"{flag} {value} is not allowed: a multiple of {unit} (every batch size in the space), say {nearest}"
            )
    if stage is None:
        wanted = budget if budget is not None else examples
        stage = max(1, round(wanted / stages / unit)) * unit
        if budget is not None:
            stage = _divisor_near(budget // unit, stage // unit) * unit
    if budget is None and given_stage is None:
        budget = stages * stage
    elif budget is None:
        budget = max(1, round(examples / stage)) * stage
    if budget % stage:
        nearest = max(1, round(budget / stage)) * stage
        raise UserError(f"--budget-examples {budget} is not allowed: a multiple of --grace-examples {stage}, say {nearest}")
    return budget, stage


def _divisor_near(number: int, wanted: int) -> int:
    """The divisor of ``number`` that is nearest to ``wanted`` by ratio."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / wanted)))


# More passes over a small collection than these teach little that is new.
_MAX_EPOCHS = 10


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
