"""Settings that flags own: the same for all trials of a sweep, whoever tries to set them."""

from collections.abc import Mapping
from typing import Any

from fashionclip_tune.errors import UserError

# Equal budgets are what makes trials comparable, and the slots are planned for one device.
_OWNED_BY_FLAGS = {
    "training.budget_examples": "--budget-examples",
    "training.max_steps": "--budget-examples",
    "training.stage_examples": "--grace-examples",
    "training.checkpoint_interval": "--grace-examples",
    "training.seed": "--seed",
    "device": "--device",
    "hardware.device_share": "--gpus-per-trial",
    "dataset_root": "--data",
    "reading.allow_remote": "--allow-remote",
    "reading.scratch": "--scratch",
    "reading.scratch_gb": "--scratch-gb",
}


def refuse_owned(settings: Mapping[str, Any], where: str) -> None:
    for path, flag in _OWNED_BY_FLAGS.items():
        if path in settings:
            raise UserError(f"{where} sets {path}, which is the same for all trials of a sweep: use {flag}")


def refuse_shared(drawn: Mapping[str, Any], where: str) -> None:
    refuse_owned(drawn, where)
    if "training.epochs" in drawn:
        raise UserError(f"{where} draws training.epochs, the same for all trials of a sweep: use BASE or --budget-examples")
    if "evaluation.protocol" in drawn:
        raise UserError(f"{where} draws evaluation.protocol, the same for all trials of a sweep: use BASE or --set")


def require_positive(flag: str, value: float | None, unit: str) -> None:
    if value is not None and not value > 0:
        raise UserError(f"{flag} {value:g} is not allowed: {unit}, above 0")
