"""Which checkpoint a run goes on from: the newest that is whole and its own."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fashionclip_tune.config.project import ProjectConfig, override_paths
from fashionclip_tune.config.stored import UNSAID, as_begun
from fashionclip_tune.errors import UnavailableError, UserError
from fashionclip_tune.models.token_rows import whole_shapes
from fashionclip_tune.storage.checkpoint import Checkpoint, newest_checkpoint


def checkpoint_to_resume(
    place: Path, config: ProjectConfig, *, data: str, weights: str, network: nn.Module
) -> tuple[Checkpoint | None, ProjectConfig]:
    """The newest checkpoint at ``place`` that is of this run; those passed over on the way are warned about.

    And the configuration to go on with, ``as_begun``.

    Args:
        place: a run's folder, or one checkpoint.
        data, weights: content hashes, as for ``ProjectConfig.fingerprint``.
        network: the run's model, as OpenCLIP has it.

    Raises:
        UserError: all that there is belongs to another run, or the one that was named cannot be used; says what differs.
    """
    of_other_runs: list[UserError] = []

    def check(checkpoint: Checkpoint) -> None:
        try:
            _check_run(checkpoint, as_begun(config, checkpoint.record["config"]), data=data, weights=weights)
        except UserError as error:
            of_other_runs.append(error)
            raise
        _check_model(checkpoint, network)

    found, refused = newest_checkpoint(place, check)
    if found is None and of_other_runs:  # a setting was changed, most likely, and not by mistake
        raise of_other_runs[0]
    if found is not None:
        config = as_begun(config, found.record["config"])
    elif (place / "config.json").is_file():  # killed before its first checkpoint
        before = json.loads((place / "config.json").read_text())
        config = as_begun(config, before)
        check_same(before, config, place)
    for reason in refused:
        warnings.warn(f"passed over: {reason}", stacklevel=4)
    return found, config


def check_same(before: Mapping[str, Any], config: ProjectConfig, where: Path) -> None:
    """Raises UserError with the settings that differ from those of a run, of the ones that change numbers.

    A setting that did not exist when the run began counts as what it is by default, or as ``UNSAID`` has it.
    """
    now, before = config.to_dict(), {**ProjectConfig().to_dict(), **UNSAID, **before}
    counted = override_paths(only_fingerprinted=True)
    changes = [f"{path} was {before[path]!r}, is {now[path]!r}" for path in counted if now[path] != before[path]]
    if changes:
        raise UserError(f"{where} is of another run: {'; '.join(changes)}")


def _check_run(checkpoint: Checkpoint, config: ProjectConfig, *, data: str, weights: str) -> None:
    before = checkpoint.record["config"]
    check_same(before, config, checkpoint.folder)
    if checkpoint.record["fingerprint"] != config.fingerprint(data=data, weights=weights, known=before):
        raise UnavailableError(f"{checkpoint.folder} is of another run: its data or its first weights have changed")


def _check_model(checkpoint: Checkpoint, network: nn.Module) -> None:
    """A right hash says that the weights are those that were listed, not that they are this model's."""
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = whole_shapes(checkpoint.weight_shapes(), wanted)
    differing = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if differing:
        name = differing[0]
        raise UserError(
            f"{checkpoint.folder} cannot be resumed from: its weights are another model's ({len(differing)} tensors differ, "
            f"such as {name}: {found.get(name, 'missing')} there, {wanted.get(name, 'missing')} here)"
        )
