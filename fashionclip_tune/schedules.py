"""Learning-rate schedules as pure functions of the step."""

import math

from fashionclip_tune.config import LearningRateSchedule, ScheduleConfig


def learning_rate_factor(step: int, total_steps: int, schedule: ScheduleConfig) -> float:
    """The factor on the peak learning rate at ``step`` (from 0) of ``total_steps``.

    Linear warm-up over the first ``warmup_ratio`` of the steps, reaching 1 at the first step after it; then constant, or
    a half cosine that reaches 0 after the last step (Loshchilov and Hutter 2017, SGDR, equation 5, a single period).
    """
    warmup_steps = round(total_steps * schedule.warmup_ratio)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule.name is LearningRateSchedule.CONSTANT:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))
