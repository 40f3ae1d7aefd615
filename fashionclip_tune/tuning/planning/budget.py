"""How many examples a trial and its stages get, from flags or a preset."""

import math

from fashionclip_tune.errors import UserError
from fashionclip_tune.tuning.planning.forecast import Course, forecast
from fashionclip_tune.tuning.planning.settings import PRESETS, SweepSettings

# Stages are multiples of every batch size: where that is more than so many times the largest one, the sizes are ill chosen.
_MOST_LARGEST_BATCHES = 16
# A trial may be so much longer than it was meant to be before that is said.
_ROUNDED = 1.5


def check_batch_sizes(settings: SweepSettings, batch_sizes: tuple[int, ...]) -> None:
    """Raises UserError for sizes of which no stage of sensible length is a multiple, unless flags give one that is."""
    given = settings.budget_examples, settings.grace_examples
    if all(value is not None and value % math.lcm(*batch_sizes) == 0 for value in given):
        return
    unit = 1
    for size in batch_sizes:
        unit = math.lcm(unit, size)
        if unit > _MOST_LARGEST_BATCHES * batch_sizes[-1]:
            raise UserError(
                f"the space draws training.batch_size from {len(batch_sizes)} values of {batch_sizes[0]} to {batch_sizes[-1]}, "
                f"and a stage has to be a multiple of each, {unit} examples or more: draw it with suggest_categorical from a "
                "few that divide each other, such as [64, 128, 256, 512]"
            )


def plan_examples(
    settings: SweepSettings, course: Course, *, batch_sizes: tuple[int, ...], num_train: int, epochs: int, goes_on: bool = False
) -> tuple[int, int, str]:
    """Examples of a trial and of a stage; and what was made of the preset, or of the epochs, where no flag decides.

    Args:
        batch_sizes: all that the space may draw, the largest last.
        epochs: of a trial, about, where neither a flag nor a preset says it.
        goes_on: a sweep that was started before keeps what is recorded of it.

    Raises:
        UserError: flags that do not fit each other or the batch sizes.
    """
    budget, stage, note = settings.budget_examples, settings.grace_examples, ""
    if goes_on and budget is not None and stage is not None:
        return budget, stage, note
    examples = epochs * num_train
    if settings.preset is not None and budget is None:
        examples, own_stage, note = preset_budget(settings.preset, course, batch_sizes=batch_sizes, num_train=num_train)
        if stage is None:
            return examples, own_stage, note
    factor = course.reduction_factor
    found = plan_budget(budget, stage, examples=examples, batch_sizes=batch_sizes, reduction_factor=factor)
    if budget is None and stage is None and found[0] > _ROUNDED * examples:
        note = f"more than the {examples:,} of its epochs: {_no_less(math.lcm(*batch_sizes))}"
    return *found, note


def check_known_size(batch_size: object, stage: int) -> None:
    """Raises UserError for a size that the draws before the sweep did not have, and that its stages cannot be cut into."""
    if isinstance(batch_size, int) and batch_size > 0 and stage % batch_size:
        raise UserError(
            f"the space drew training.batch_size = {batch_size}, which none of the draws before the sweep had, and a stage of "
            f"{stage} examples is no multiple of it: no trial with it is run; a new sweep knows it by a point in POINTS"
        )


def _no_less(unit: int) -> str:
    return f"a stage is a multiple of every batch size, {unit:,} at least"


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
            sizes = ", ".join(map(str, batch_sizes))
            allowed = f"a multiple of {unit} (every batch size in the space: {sizes})"
            raise UserError(f"{flag} {value} is not allowed: {allowed}, say {_nearest(value, unit)}")
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
        allowed = f"a multiple of --grace-examples {stage}"
        raise UserError(f"--budget-examples {budget} is not allowed: {allowed}, say {_nearest(budget, stage)}")
    return budget, stage


def _nearest(value: int, unit: int) -> str:
    """``896 or 1024``: the multiples below and above."""
    return " or ".join(str(number * unit) for number in (value // unit, value // unit + 1) if number > 0)


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
    if stage > _ROUNDED * wanted:
        note = f"{note}; {_no_less(unit)}" if note else _no_less(unit)
    hours = forecast(course, stage * factor**2, stage).hours
    if hours is not None and hours > preset.hours:
        wanted = stage * preset.hours / hours
        stage = max(1, int(wanted / unit)) * unit
        note = f"rungs brought closer: {preset.hours:g} hours at the known rates"
        if stage > _ROUNDED * wanted:
            note = f"{note} are not enough: {_no_less(unit)}"
    return stage * factor**2, stage, note
