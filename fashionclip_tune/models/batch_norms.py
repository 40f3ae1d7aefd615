"""Batch norms in fine-tuning: whose statistics move, what that forbids, and evaluation between steps."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fashionclip_tune.config.choices import BatchNorms
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)  # timm's are subclasses


def batch_norms(network: nn.Module) -> dict[str, nn.Module]:
    """All of a network, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, _KINDS)}


def moving_batch_norms(network: nn.Module, config: ProjectConfig) -> dict[str, nn.Module]:
    """Those whose statistics training moves, by name; ``network``: what is to be frozen, is."""
    found = batch_norms(network)
    if config.model.batch_norm is BatchNorms.LEGACY:
        return found
    if config.model.batch_norm is BatchNorms.FIXED:
        return {}
    return {name: module for name, module in found.items() if not _is_frozen(network, name)}


def _is_frozen(network: nn.Module, name: str) -> bool:
    """Of itself or, where it has no parameters, of the nearest module around it that has some."""
    while not (parameters := list(network.get_submodule(name).parameters())):
        name = name.rpartition(".")[0]
    return not any(parameter.requires_grad for parameter in parameters)


def keep_statistics(network: nn.Module, config: ProjectConfig) -> None:
    """Batch norms that do not move compute as in evaluation; ``network`` is in training mode, frozen as configured.

    ``network.train()`` would undo it: ``evaluating`` does without.
    """
    moving = moving_batch_norms(network, config)
    for name, module in batch_norms(network).items():
        if name not in moving:
            module.eval()


def moving_statistics(network: nn.Module, config: ProjectConfig) -> dict[str, Tensor]:
    """What the moving average of the weights averages too: floating-point buffers, by name, where batch norms are updated."""
    if config.model.batch_norm is not BatchNorms.UPDATE:
        return {}
    return {
        f"{name}.{key}": buffer
        for name, module in moving_batch_norms(network, config).items()
        for key, buffer in module.named_buffers()
        if buffer.is_floating_point()
    }


def needs_one_pass(network: nn.Module, config: ProjectConfig) -> bool:
    """Whether a step has to be one forward pass of the whole batch: each pass would move the statistics once more."""
    return config.model.batch_norm is BatchNorms.UPDATE and bool(moving_batch_norms(network, config))


def check_one_pass(network: nn.Module, config: ProjectConfig) -> None:
    """Raises UserError where ``model.batch_norm = update`` would move statistics more than once a step."""
    training, hardware = config.training, config.hardware
    is_cut = training.micro_batch_size is not None and training.micro_batch_size < training.batch_size
    if not (is_cut or hardware.gradient_checkpointing) or not needs_one_pass(network, config):
        return
    what = f"training.micro_batch_size = {training.micro_batch_size}" if is_cut else "hardware.gradient_checkpointing = True"
    allowed = f"{training.batch_size} or more, or none" if is_cut else "false"
    raise UserError(
        f"model.batch_norm = update is not possible with {what}: {config.model_name} has batch norms, whose statistics would "
        f"move more than once a step; allowed there is {allowed}, or set model.batch_norm=fixed"
    )


def warn_of_statistics(network: nn.Module, config: ProjectConfig) -> None:
    """Of statistics that move as they should not, or that nobody has ever measured."""
    there, model, said = len(batch_norms(network)), config.model, None
    is_random = model.pretrained is None and not config.should_load_checkpoint
    if model.batch_norm is BatchNorms.LEGACY:
        said = (
            f"the statistics of the {there} batch norms of {config.model_name} move as they did when this run began: with each "
            "micro-batch, frozen ones too, and the average of the weights leaves them out; a new run keeps them as they are"
        )
    elif model.batch_norm is BatchNorms.FIXED and is_random:
        said = (
            f"{config.model_name} starts from random weights, and the statistics of its {there} batch norms are nobody's: set "
            "model.batch_norm=update"
        )
    if there and said is not None:
        warnings.warn(said, stacklevel=3)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Within the block the network is in evaluation mode; after it each module is in the mode that it had."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training
