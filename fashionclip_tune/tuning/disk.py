"""Disk of a sweep, planned before it starts and watched while it runs (``--disk-budget-gb``)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from fashionclip_tune.config import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.model_check import without_numbers
from fashionclip_tune.towers import prepare_towers
from fashionclip_tune.tuning.shares import GB, is_described_here, weights_bytes

KEPT_PER_MODEL = 3
"""Ended trials of an architecture, the best ones, that keep their weights."""
_TRIAL_BYTES = 10**6  # evaluations, queries, TensorBoard's events with their pictures
# Where a sweep runs, the last two checkpoints and the one that is being written; on the durable side the last and the next.
_LOCAL_STATES, _DURABLE_STATES = 3, 2


@dataclass(frozen=True)
class ModelBytes:
    """Of one architecture in fp32: all weights, and those that are trained."""

    weights: int
    trained: int

    @property
    def state(self) -> int:
        """Of a checkpoint: weights and Adam's two moments."""
        return self.weights + 2 * self.trained

    @property
    def durable_state(self) -> int:
        """Without what the base model's own files hold."""
        return 3 * self.trained

    @property
    def durable_weights(self) -> int:
        """In half precision."""
        return self.trained // 2


@dataclass(frozen=True)
class DiskPlan:
    """Bytes at the most, of a sweep with these architectures.

    ``at_a_time``: how many trials of each run side by side. Each has its part of the machine, so that no mix of architectures
    takes more than as many as fit of the one whose trials take most together.
    """

    models: dict[str, ModelBytes]
    num_trials: int

    def local_bytes(self, at_a_time: Mapping[str, int]) -> int:
        """Where the sweep runs: whole states of running trials, weights of the best, the winner twice while it is written."""
        kept = sum(KEPT_PER_MODEL * each.weights for each in self.models.values())
        running = max(at_a_time[name] * _LOCAL_STATES * each.state for name, each in self.models.items())
        return running + kept + 2 * self._winner + self.num_trials * _TRIAL_BYTES

    def durable_bytes(self, at_a_time: Mapping[str, int]) -> int:
        """What is kept to survive: states and weights of running trials, weights of the best, the winner.

        The winner is written when no trial runs, so that there is one state of each at most.
        """
        kept = sum(KEPT_PER_MODEL * each.durable_weights for each in self.models.values())
        models = self.models.items()
        running = max(at_a_time[name] * (each.durable_state + each.durable_weights) for name, each in models)
        return kept + max(_DURABLE_STATES * running, running + self._winner) + self.num_trials * _TRIAL_BYTES

    @property
    def one_at_a_time(self) -> dict[str, int]:
        return dict.fromkeys(self.models, 1)

    @property
    def _winner(self) -> int:
        return max(each.weights for each in self.models.values())


def plan_disk(configs: Iterable[ProjectConfig], num_trials: int) -> DiskPlan:
    """Of each architecture the configuration that trains most counts."""
    models: dict[str, ModelBytes] = {}
    for config in configs:
        found = _model_bytes(config)
        if config.model_name not in models or found.trained > models[config.model_name].trained:
            models[config.model_name] = found
    return DiskPlan(models, num_trials)


def _model_bytes(config: ProjectConfig) -> ModelBytes:
    if not is_described_here(config):
        return ModelBytes(weights_bytes(config), weights_bytes(config))
    return _counted(config)


@lru_cache(maxsize=64)
def _counted(config: ProjectConfig) -> ModelBytes:
    network = without_numbers(config.model_name)
    prepare_towers(network, config)
    trained = sum(each.numel() * each.element_size() for each in network.parameters() if each.requires_grad)
    return ModelBytes(weights_bytes(config), trained)


class DiskBudget:
    """Lets no trial start that would take a sweep over its budget."""

    def __init__(self, budget_bytes: int, plan: DiskPlan, *, is_durable: bool, used: Callable[[Sequence[int]], int]) -> None:
        """
        Args:
            is_durable: the budget is that of the durable side.
            used: bytes in the sweep's folder, but for those of the trials of these numbers.

        Raises:
            UserError: not even one trial at a time fits.
        """
        self._budget_bytes = budget_bytes
        self._plan = plan
        self._is_durable = is_durable
        self._used = used
        needed = (plan.durable_bytes if is_durable else plan.local_bytes)(plan.one_at_a_time)
        if needed > budget_bytes:
            raise UserError(
                f"--disk-budget-gb {budget_bytes / GB:g} is too little: one trial at a time takes up to {needed / GB:.1f} GB; "
                "raise it, or choose smaller models or frozen towers (--set clip_model=..., --set freeze.text_tower=true)"
            )

    def has_room(self, model: str, running: Sequence[tuple[int, str]]) -> bool:
        """Whether a trial of a model may start beside running ones, given as number and model."""
        grown = sum(self._most(each) for _, each in running)
        return self._used([number for number, _ in running]) + grown + self._most(model) <= self._budget_bytes

    @property
    def refusal(self) -> str:
        return (
            f"the disk budget of {self._budget_bytes / GB:g} GB is used up: what has ended is stripped to the best "
            f"{KEPT_PER_MODEL} of each model already; go on with a larger --disk-budget-gb"
        )

    def _most(self, model: str) -> int:
        each = self._plan.models[model]
        if self._is_durable:
            return _DURABLE_STATES * (each.durable_state + each.durable_weights)
        return _LOCAL_STATES * each.state
