"""Weights files read as tensors, and put into a network only where they are the network's own; nothing in them is executed."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from safetensors.torch import load_file
from torch import Tensor, nn

from fashionclip_tune.errors import UserError
from fashionclip_tune.models.token_rows import tables_in_rows, whole
from fashionclip_tune.storage.checkpoint import tables_beside
from fashionclip_tune.storage.pickled import load_pickled

# Published runs wrote the first; OpenCLIP's and Lightning's the second.
_WEIGHTS_KEYS = ("model_state_dict", "state_dict")
# Of DataParallel, torch.compile and Lightning, which wrap a network, also one in the other.
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_OF_TRANSFORMERS = ("text_model.", "vision_model.")
_SHOWN_NAMES = 3


def read_pickled_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file: the whole of it, or one of its entries; without the prefixes of wrappers.

    Raises:
        UserError: the file holds code, or no weights.
    """
    try:
        content: Any = load_pickled(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} was not loaded: it is cut short, or holds more than tensors and plain values, which could run code "
            f"({error}). Where you trust it, save its weights alone: torch.save(network.state_dict(), FILE)"
        ) from error
    for key in _WEIGHTS_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        found = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{path} holds no weights: a state dict is expected, or one under {' or '.join(_WEIGHTS_KEYS)}, not {found}"
        )
    return _unwrapped(content)


def _unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((each for each in _WRAPPERS if all(name.startswith(each) for name in weights)), None):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return dict(weights)


# The order in which OpenCLIP looks for weights in a folder.
NAMES_IN_A_FOLDER = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
_OLD_BUFFER = "text.transformer.embeddings.position_ids"  # of text towers that an older transformers saved


def weights_in_folder(folder: Path) -> Path:
    """The weights file of an OpenCLIP folder, as OpenCLIP chooses it.

    Raises:
        UserError: there is none, or several that OpenCLIP has no rule for.
    """
    for name in NAMES_IN_A_FOLDER:
        if (folder / name).is_file():
            return folder / name
    others = sorted(path for suffix in ("safetensors", "bin", "pth") for path in folder.glob(f"*.{suffix}"))
    if len(others) != 1:
        found = f"several weights files ({', '.join(path.name for path in others)})" if others else "no weights"
        raise UserError(f"{folder} has {found}: OpenCLIP's name for them is {NAMES_IN_A_FOLDER[0]}")
    return others[0]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by their names there; of a checkpoint of ours with its whole token table.

    Raises:
        UserError: the file holds code, or no weights, or rows of a table that is not beside it.
    """
    if path.suffix in (".npz", ".npy"):
        raise UserError(f"{path} is a file of big_vision, which is not read: save its weights by OpenCLIP, or name their tag")
    weights: dict[str, Tensor] = _unwrapped(load_file(path)) if path.suffix == ".safetensors" else read_pickled_weights(path)
    if not tables_in_rows(weights):
        return weights
    tables = tables_beside(path)
    try:
        return whole(weights, load_file(tables) if tables.is_file() else {})
    except UserError as error:
        raise UserError(f"{path}: {error}: it belongs in {tables}; bring it, or name an export of this run") from None


def put_weights(network: nn.Module, weights: Mapping[str, Tensor], where: object) -> None:
    """Loads all weights of a network, then compares what is in the host's memory with them, bit by bit.

    Copies to a card are not read back: a trial that resumes would wait for all of them.
    Rows of a token table are put into the one that the network has: of the weights that their run started from.

    Args:
        where: what they are said to come from.

    Raises:
        UserError: they are not the same, or rows of another table.
        RuntimeError: they are of another network.
    """
    if not tables_in_rows(network.state_dict()):
        weights = whole(weights, network.state_dict())
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise RuntimeError(_misfit(network.state_dict(), weights) or str(error)) from error
    state = network.state_dict()
    differing = [name for name, tensor in weights.items() if state[name].is_cpu and not _same_bits(state[name], tensor)]
    if differing:
        raise UserError(
            f"the weights in memory are not those of {where}: {len(differing)} tensors differ, such as {differing[0]}"
        )


def _misfit(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """In what weights are not a network's; empty where they fit."""
    missing, unknown = ([name for name in one if name not in other] for one, other in ((wanted, weights), (weights, wanted)))
    both = ((name, tuple(tensor.shape), tuple(weights[name].shape)) for name, tensor in wanted.items() if name in weights)
    shapes = [f"{name} (wanted {mine}, found {theirs})" for name, mine, theirs in both if mine != theirs]
    problems = []
    for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes)):
        if names:
            problems.append(f"{what} are {len(names)} tensors, such as {', '.join(names[:_SHOWN_NAMES])}")
    if any(name.startswith(_OF_TRANSFORMERS) for name in unknown):
        problems.append("names such as text_model. are those of transformers: name the folder that has its config.json, too")
    return "; ".join(problems)


def _same_bits(loaded: Tensor, stored: Tensor) -> bool:
    """Compared as bytes: a number that is none equals nothing, itself included. A file may have another precision."""
    both = (each.detach().to(loaded).contiguous().view(-1).view(torch.uint8) for each in (loaded, stored))
    return torch.equal(*both)


def in_openclips_form(network: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights that have other names or shapes than the network's, as OpenCLIP's own loading would convert them."""
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    if wanted == {name: tensor.shape for name, tensor in weights.items()}:
        return weights
    converted: dict[str, Tensor] = convert_state_dict(network, dict(weights))
    if "positional_embedding" not in wanted:
        converted = convert_to_custom_text_state_dict(converted)
    for name in ("logit_scale", "logit_bias"):  # with and without a dimension
        if name in converted and name in wanted and converted[name].numel() == 1:
            converted[name] = converted[name].reshape(wanted[name])
    if "logit_bias" in wanted and "logit_scale" in converted:
        converted.setdefault("logit_bias", torch.zeros_like(converted["logit_scale"]))
    if _OLD_BUFFER not in wanted:
        converted.pop(_OLD_BUFFER, None)
    shapes = {name: tensor.shape for name, tensor in converted.items()}
    resize_pos_embed(converted, network)
    resize_text_pos_embed(converted, network)
    resized = [name for name, shape in shapes.items() if converted[name].shape != shape]
    if resized:
        warnings.warn(f"{', '.join(resized)} resized: the weights are of photos or texts of another size", stacklevel=2)
    return converted
