"""A CLIPModel or SiglipModel in a folder of transformers, as a start: what its files say, in OpenCLIP's terms.

Only JSON is read; no Python file of the folder is run, whatever it asks for.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip.tokenizer import SimpleTokenizer

from fashionclip_tune.errors import UserError
from fashionclip_tune.models.description import CONFIG_NAME as OPENCLIP_CONFIG_NAME
from fashionclip_tune.models.foreign_code import refuse_code
from fashionclip_tune.models.transformers_shapes import CLIP, SIGLIP, activation_notes, find_architecture
from fashionclip_tune.models.transformers_weights import INDEX_SUFFIX

CONFIG_NAME, WEIGHTS_NAME, PREPROCESSOR_NAME = "config.json", "model.safetensors", "preprocessor_config.json"
_PROCESSOR_NAME = "processor_config.json"  # since transformers 5, with all in one
_WEIGHTS_NAMES = (WEIGHTS_NAME, WEIGHTS_NAME + INDEX_SUFFIX, "pytorch_model.bin", "pytorch_model.bin" + INDEX_SUFFIX)
_TOKENIZER_NAMES = ("tokenizer.json", "spiece.model", "tokenizer.model")
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
"""Pillow's codes of what OpenCLIP has."""
SPECIAL_TOKENS = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
"""OpenCLIP's names, and those of transformers, of the same two tokens of CLIP."""
_BEFORE_2023 = 2  # an end token in configs that transformers reads as "the token with the highest number"


@dataclass(frozen=True)
class TransformersStart:
    """What a folder says of a model before it is trained."""

    architecture: str
    """OpenCLIP's name for the shape. Activations may differ: ``model_config`` says them."""
    model_config: dict[str, Any]
    """OpenCLIP's ``model_cfg``; a network is built of it, not of the name alone, and ``set_activation`` completes it."""
    preprocessing: dict[str, Any]
    """Of OpenCLIP's ``preprocess_cfg``: mean, std, resize mode, interpolation. The size is the architecture's."""
    tokenizer_folder: Path | None
    """None: OpenCLIP's own tokenizer of CLIP."""
    weights_file: Path
    """Or an index of several."""
    notes: tuple[str, ...] = ()
    """What a user should know: settings that OpenCLIP reads past. Sentences without a full stop."""


def is_transformers_folder(folder: Path) -> bool:
    """Whether a folder says that it holds a model of transformers, of whatever kind, and no OpenCLIP model."""
    path = folder / CONFIG_NAME
    if not path.is_file() or (folder / OPENCLIP_CONFIG_NAME).exists():
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and isinstance(content.get("model_type"), str)


def describe_transformers(folder: Path) -> TransformersStart:
    """What is said of the model in ``folder``; of its weights, only which file they are in.

    Raises:
        UserError: it is no CLIPModel or SiglipModel, no architecture of OpenCLIP computes the same, its photos are prepared
            in a way that OpenCLIP has not, or a file is missing.
    """
    config = _config(folder / CONFIG_NAME)
    architecture, model_config = find_architecture(config, folder / CONFIG_NAME)
    notes = [
        f"{part}.attention_dropout = {config[part]['attention_dropout']} is left out: OpenCLIP has none"
        for part in ("text_config", "vision_config")
        if config[part].get("attention_dropout")
    ]
    return TransformersStart(
        architecture,
        model_config,
        _preprocessing(folder, config),
        _tokenizer_folder(folder, config),
        _weights_file(folder),
        (*notes, *activation_notes(model_config)),
    )


def _config(path: Path) -> dict[str, Any]:
    """All of its fields, those that are left out with their defaults."""
    from transformers import CLIPConfig, SiglipConfig

    said = _read(path)
    if said.get("model_type") not in (CLIP, SIGLIP):
        raise UserError(f"{path}: model_type = {said.get('model_type')!r} is not supported, only {CLIP} and {SIGLIP}")
    try:
        if said["model_type"] == CLIP:
            config = CLIPConfig.from_dict(said).to_dict()
        else:  # its default tokens are CLIP's, which transformers warns of; the model uses none of them
            no_tokens = {"bos_token_id": None, "eos_token_id": None}
            config = SiglipConfig.from_dict({**said, "text_config": {**no_tokens, **(said.get("text_config") or {})}}).to_dict()
    except Exception as error:  # transformers' own checks of types raise many
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    text = config["text_config"]
    if said["model_type"] == CLIP and text["eos_token_id"] not in (_BEFORE_2023, text["vocab_size"] - 1):
        raise UserError(
            f"{path}: text_config.eos_token_id = {text['eos_token_id']} is not supported: OpenCLIP ends a text at the token "
            f"with the highest number, {text['vocab_size'] - 1}"
        )
    return config


def _preprocessing(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    path, said = folder / _PROCESSOR_NAME, dict[str, Any]()
    if path.is_file():  # wins in transformers, too
        said = _read(path).get("image_processor") or {}
    if not said:
        path = folder / PREPROCESSOR_NAME
        if not path.is_file():
            raise UserError(
                f"how photos are prepared is not said: {path} is missing, a file that transformers saves by a processor"
            )
        said = _read(path)
    default = CLIPImageProcessor() if config["model_type"] == CLIP else SiglipImageProcessor()
    settings = {**json.loads(default.to_json_string()), **said}
    side = config["vision_config"]["image_size"]
    size, crop = (_sides(settings.get(name)) for name in ("size", "crop_size"))
    is_cropped, is_scaled = settings.get("do_center_crop"), abs(settings["rescale_factor"] * 255 - 1) < 1e-6
    odd = [f"{name} = {settings[name]}" for name in ("do_resize", "do_rescale", "do_normalize") if not settings[name]]
    odd += [] if is_scaled else [f"rescale_factor = {settings['rescale_factor']}"]
    odd += [f"do_pad = {settings['do_pad']}"] if settings.get("do_pad") else []
    if settings["resample"] not in INTERPOLATIONS:
        odd.append(f"resample = {settings['resample']!r}")
    if size == (side,) and is_cropped and crop in ((side,), (side, side)):
        resize_mode = "shortest"
    elif size == (side, side) and (not is_cropped or crop in ((side,), (side, side))):
        resize_mode = "squash"
    else:
        odd.append(", ".join(f"{name} = {settings.get(name)!r}" for name in ("size", "do_center_crop", "crop_size")))
    if odd:
        raise UserError(
            f"{path}: OpenCLIP cannot prepare photos so: {'; '.join(odd)}. Supported are resample 2 or 3, values between 0 and "
            f"1 that are normalised, and a size of {side}, as image_size: the short side with a centre crop, or both sides"
        )
    return {
        "mean": list(settings["image_mean"]),
        "std": list(settings["image_std"]),
        "interpolation": INTERPOLATIONS[settings["resample"]],
        "resize_mode": resize_mode,
    }


def _sides(size: object) -> tuple[int, ...]:
    """One number: of the short side; two: height and width; none: another rule, or nothing is said."""
    if isinstance(size, int):
        return (size,)
    said = {key: value for key, value in size.items() if value is not None} if isinstance(size, Mapping) else {}
    for names in (("shortest_edge",), ("height", "width")):
        if set(said) == set(names):
            return tuple(said[name] for name in names)
    return ()


def _tokenizer_folder(folder: Path, config: Mapping[str, Any]) -> Path | None:
    if config["model_type"] == SIGLIP:
        if not any((folder / name).is_file() for name in _TOKENIZER_NAMES):
            raise UserError(f"{folder} has no tokenizer: one of {', '.join(_TOKENIZER_NAMES)} is expected")
        return folder
    vocabulary = _clip_vocabulary(folder)
    if vocabulary is not None:
        own = {SPECIAL_TOKENS.get(token, token): number for token, number in SimpleTokenizer().encoder.items()}
        differing = [token for token in own.keys() | vocabulary.keys() if own.get(token) != vocabulary.get(token)]
        if differing:
            raise UserError(
                f"the tokenizer in {folder} is not that of OpenCLIP's CLIP architectures: {len(differing)} tokens differ, such "
                f"as {min(differing)!r}, {vocabulary.get(min(differing))} and not {own.get(min(differing))}"
            )
    return None


def _clip_vocabulary(folder: Path) -> dict[str, int] | None:
    """Each token's number; None: the folder has no tokenizer, and its vocabulary's size alone speaks for CLIP's."""
    if (path := folder / "tokenizer.json").is_file():
        said = _read(path)
        added = {token["content"]: token["id"] for token in said.get("added_tokens") or []}
        return {**(said.get("model", {}).get("vocab") or {}), **added}
    return _read(path) if (path := folder / "vocab.json").is_file() else None


def _weights_file(folder: Path) -> Path:
    for name in _WEIGHTS_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has no weights: one of {', '.join(_WEIGHTS_NAMES)} is expected")


def _read(path: Path) -> dict[str, Any]:
    """A JSON object that names no Python files to be run."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be read: an object is expected, not {type(content).__name__}")
    refuse_code(content, path)
    if "auto_map" in content:
        raise UserError(
            f"{path} names Python files of its own (auto_map = {content['auto_map']!r}), which are never run: only what "
            "transformers itself has is converted"
        )
    return content
