"""What OpenCLIP knows of an architecture, or a folder says of one; how photos are prepared for it."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
from open_clip.hf_configs import arch_dict

from fashionclip_tune.config.choices import ClipModelOptions
from fashionclip_tune.config.start_names import HUB_PREFIX, LOCAL_PREFIX
from fashionclip_tune.data.preprocessing import Preprocessing
from fashionclip_tune.errors import UnavailableError, UserError
from fashionclip_tune.models.foreign_code import refuse_code
from fashionclip_tune.models.tiny import TINY_MODELS, TINY_PREPROCESSING, register_tiny_models

# The published tags.
DEFAULT_TAGS = {
    ClipModelOptions.ViT_B_32.value: "laion2b_s34b_b79k",
    ClipModelOptions.ViT_B_16.value: "laion2b_s34b_b88k",
    ClipModelOptions.ViT_SigLIP_2_16.value: "webli",
}
CONFIG_NAME = "open_clip_config.json"
_RECORD_OF_WEIGHTS = ("checkpoint.json", "model.safetensors")  # a checkpoint of ours
_PARTS = ("embed_dim", "vision_cfg", "text_cfg")
_SAYS_NOTHING = ("timm_model_pretrained", "hf_model_pretrained")  # of where other weights come from, which are not loaded
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True)
class Description:
    """What ``open_clip_config.json`` says; ``preprocessing`` is empty where it does not."""

    model_config: dict[str, Any]
    preprocessing: dict[str, Any]


def registered(name: str, said: str = "") -> dict[str, Any]:
    """OpenCLIP's configuration of an architecture that it lists, or of a tiny tower.

    Args:
        said: a longer name that begins with it.

    Raises:
        UserError: there is none; names the likely ones.
    """
    register_tiny_models()
    model_config: dict[str, Any] | None = open_clip.get_model_config(name)
    if model_config is None:
        no_place = f"{said!r}: there is no such folder, and {name!r}" if said != name and said else repr(name)
        here = f" (a folder is ./{said or name})" if Path(said or name).is_dir() else ""
        raise UserError(
            f"clip_model = {no_place} is no OpenCLIP architecture{here}: {', '.join([*DEFAULT_TAGS, *TINY_MODELS])}, another "
            f"name from open_clip.list_models(), ARCHITECTURE/TAG, ARCHITECTURE=FILE, {HUB_PREFIX}OWNER/NAME, or "
            f"{LOCAL_PREFIX}FOLDER (an OpenCLIP folder, a run, a checkpoint or a sweep)"
        )
    return model_config


def describe_folder(folder: Path, what: str) -> Description:
    """Of an OpenCLIP folder; ``what``: the setting that names it, for messages.

    Raises:
        UserError: its description cannot be read, or asks for Python files of its own to be run.
    """
    path = folder / CONFIG_NAME
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        model_config, preprocessing = dict(described["model_cfg"]), dict(described.get("preprocess_cfg") or {})
        lacking = [part for part in _PARTS if part not in model_config]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        kind = UnavailableError if isinstance(error, OSError) else UserError
        raise kind(f"{what} is no OpenCLIP folder: {path} cannot be read ({error})") from error
    if lacking or not all(isinstance(model_config[part], dict) for part in _PARTS[1:]):
        raise UserError(
            f"{what} is no OpenCLIP folder: model_cfg of {path} lacks {', '.join(lacking) or 'vision_cfg or text_cfg'}"
        )
    refuse_code(described, path)
    _refuse_towers_of_others(model_config, f"{what}: {path} names")
    return Description(model_config, {key: preprocessing[key] for key in _PREPROCESSING if preprocessing.get(key) is not None})


def _refuse_towers_of_others(model_config: Mapping[str, Any], what: str) -> None:
    """A file does not decide what is looked for on the hub: only towers that timm or OpenCLIP itself names are."""
    for part in _PARTS[1:]:
        image, text = (str(model_config[part].get(key) or "") for key in ("timm_model_name", "hf_model_name"))
        source, _, place = image.partition(":")  # timm's hf-hub:, hf_hub: and local-dir:, in any case
        if place and not (source.lower() == "local-dir" and Path(place).is_dir()):
            raise UserError(
                f"{what} the tower {image!r}, which is described elsewhere and not followed: name an architecture of timm"
            )
        if text and Path(text).is_dir():
            _refuse_towers_within(Path(text) / "config.json")
        elif text and text not in _openclips_text_towers():
            raise UserError(
                f"{what} the tower {text!r}, which is described elsewhere and not followed: name a folder, or one of "
                f"{', '.join(sorted(_openclips_text_towers()))}"
            )


def _refuse_towers_within(path: Path) -> None:
    """A text tower of transformers may itself name networks and kernels on the hub, but for the kinds that OpenCLIP has."""
    described = _read(path)
    kind = str(described.get("model_type"))
    if kind not in arch_dict:
        raise UserError(f"{path} describes a text tower of model_type = {kind!r}: allowed are {', '.join(sorted(arch_dict))}")
    for name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        if described.get(name) not in (None, "eager", "sdpa"):
            raise UserError(f"{path} wants {name} = {described[name]!r}: allowed are eager and sdpa; take it out")


@cache
def _openclips_text_towers() -> set[str]:
    towers = (open_clip.get_model_config(name)["text_cfg"].get("hf_model_name") for name in open_clip.list_models())
    return {str(tower) for tower in towers if tower}


def known_name(model_config: Mapping[str, Any]) -> str | None:
    """Which of OpenCLIP's architectures a ``model_cfg`` is, but for a bias of the logits; None: it is none of them."""
    register_tiny_models()
    described = _without_what_is_set(model_config)
    for name in dict.fromkeys([*DEFAULT_TAGS, *TINY_MODELS, *open_clip.list_models()]):
        if described == _without_what_is_set(open_clip.get_model_config(name) or {}):
            return str(name)
    return None


def _without_what_is_set(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """A bias of the logits may have been added; a way to compute GELU is set in the network that the name stands for."""
    described = {key: value for key, value in model_config.items() if key != "init_logit_bias"}
    towers = {part: described[part] for part in _PARTS[1:] if isinstance(described.get(part), Mapping)}
    return described | {part: {**said, "act_kwargs": None} for part, said in towers.items()}


def preprocessing_beside(file: Path) -> dict[str, Any]:
    """How photos are prepared for the weights in a file, as is said beside it; empty where nothing is."""
    record, weights_name = _RECORD_OF_WEIGHTS
    if file.name == weights_name and (file.parent / record).is_file():
        stored = _read(file.parent / record).get("preprocessing", {})
        if is_said(stored):
            return {key: stored[key] for key in _PREPROCESSING if key in stored}
    beside = file.parent / CONFIG_NAME
    stored = _read(beside).get("preprocess_cfg") or {} if beside.is_file() else {}
    if is_said(stored):
        return {key: stored[key] for key in _PREPROCESSING if key in stored}
    return {}


def preprocessing_of(name: str, described: Mapping[str, Any]) -> Preprocessing:
    """Of OpenCLIP's ``preprocess_cfg``, which may come from anyone's file.

    Raises:
        UserError: it is none that photos can be prepared by here; says which part, and what is allowed.
    """
    size, mean, std = described["size"], described["mean"], described["std"]
    sides = [size] if isinstance(size, int) else list(size)
    if len(set(sides)) != 1:
        raise UserError(f"{name}: photos of {sides[0]} x {sides[1]} pixels are not supported, only square ones")
    for what, allowed in (("resize_mode", ("shortest", "squash")), ("interpolation", ("bicubic", "bilinear"))):
        if described[what] not in allowed:
            among = " and ".join(allowed)
            raise UserError(f"{name}: {what} = {described[what]!r} in its preprocess_cfg is not supported, only {among}")
    for what, numbers in (("mean", mean), ("std", std)):
        is_list = isinstance(numbers, list | tuple) and len(numbers) == 3
        if not is_list or not all(isinstance(each, int | float) and math.isfinite(each) for each in numbers):
            raise UserError(f"{name}: {what} = {numbers!r} in its preprocess_cfg is not allowed: three numbers")
    if min(std) <= 0:
        raise UserError(f"{name}: std = {std!r} in its preprocess_cfg is not allowed: above 0")
    return Preprocessing(sides[0], tuple(mean), tuple(std), described["resize_mode"], described["interpolation"])


def architecture_of_file(name: str, file: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """The named architecture, with QuickGELU where the description or our own record beside the file says so.

    Raises:
        UserError: that is of another architecture, of photos or texts of another size, or of another tokenizer. Shapes alone
            would not tell: heads, activations and tokens have none, and positions are resized.
    """
    record, weights_name = _RECORD_OF_WEIGHTS
    beside, key = file.parent / CONFIG_NAME, "model_cfg"
    if file.name == weights_name and (file.parent / record).is_file():
        beside, key = file.parent / record, "model_config"
    found = _read(beside).get(key) if beside.is_file() else None
    if not isinstance(found, Mapping):
        return expected
    differing = _differences(found, expected)
    if expected.get("quick_gelu") and not found.get("quick_gelu"):
        differing.append("quick_gelu = False, not True")
    if differing:
        raise UserError(
            f"the weights file {file} is not of {name}, by {beside} beside it ({'; '.join(differing)}): name their folder, "
            f"--set clip_model={LOCAL_PREFIX}{file.parent}, or move the file out of it if they are not what it describes"
        )
    return {**expected, "quick_gelu": True} if found.get("quick_gelu") else expected


def architecture_of_tag(name: str, tag: str) -> dict[str, Any]:
    """The named architecture, with QuickGELU where the tag's weights were trained with it: ``openai`` of ViT-B-32."""
    is_quick = (open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu")
    return {**registered(name), "quick_gelu": True} if is_quick else registered(name)


def refuse_another_network(what: str, name: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises UserError where a folder's ``model_cfg`` is not the named one, but for a bias and the text's settings."""
    for key in ("embed_dim", "vision_cfg"):
        if found.get(key) != expected.get(key):
            raise UserError(f"{what} are not of {name}: {key} is {found.get(key)}, not {expected.get(key)}")


def tags_with_quick_gelu(name: str) -> list[str]:
    """Published weights of an architecture that were trained with QuickGELU, where its name stands for GELU."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    return [tag for tag in tags if (open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu")]


def differences_of_starts(found: object, expected: Mapping[str, Any]) -> list[str]:
    """Where a trained network's ``model_cfg`` is not that of what it started from; training may add what is set."""
    if not isinstance(found, Mapping):
        return [f"model_config = {found!r}"]
    ours, theirs = _without_what_is_set(expected), _without_what_is_set(found)
    names = sorted((ours.keys() | theirs.keys()) - {"quick_gelu"})
    return [f"{name} = {theirs.get(name)}, not {ours.get(name)}" for name in names if theirs.get(name) != ours.get(name)]


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Where two ``model_cfg`` describe different networks or tokens, by what OpenCLIP takes where one of them is silent."""
    flat = [_network_settings(model_config) for model_config in (found, expected)]
    names = sorted(flat[0].keys() | flat[1].keys())
    return [
        f"{name} = {flat[0].get(name)}, not {flat[1].get(name)}" for name in names if flat[0].get(name) != flat[1].get(name)
    ]


def _network_settings(model_config: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {"embed_dim": model_config.get("embed_dim")}
    for part, defaults in (("vision_cfg", open_clip.CLIPVisionCfg()), ("text_cfg", open_clip.CLIPTextCfg())):
        said = model_config.get(part)
        described = {**asdict(defaults), **(said if isinstance(said, Mapping) else {})}
        settings |= {f"{part}.{key}": value for key, value in described.items() if key not in _SAYS_NOTHING}
    return settings


def files_beside(file: Path) -> Iterator[Path]:
    """A weights file, and those that ``preprocessing_beside`` reads."""
    beside = (file.parent / name for name in (_RECORD_OF_WEIGHTS[0], CONFIG_NAME))
    yield from (path for path in (file, *beside) if path.is_file())


def published_preprocessing(name: str, model_config: Mapping[str, Any], what: str, beside: Path) -> dict[str, Any]:
    """As all published weights of an architecture want it; ``beside``: where it can be said.

    Raises:
        UserError: they differ, or there are none. OpenCLIP would take OpenAI's, wrong for every third architecture.
    """
    published = name if name in open_clip.list_models() else known_name(model_config)
    if published in TINY_MODELS:
        return TINY_PREPROCESSING
    wanted = _published(published) if published is not None else {}
    if len(wanted) == 1:
        return json.loads(next(iter(wanted)))  # type: ignore[no-any-return]
    choices = "; ".join(f"{', '.join(tags)}: {said}" for said, tags in wanted.items())
    found = f"its published weights differ ({choices})" if wanted else "it has no published weights"
    one_of = f"Name one of them, as clip_model={published}/{next(iter(wanted.values()))[0]}=FILE, or s" if wanted else "S"
    example = '{"preprocess_cfg": {"mean": [...], "std": [...], "interpolation": "bicubic", "resize_mode": "shortest"}}'
    raise UserError(
        f"how photos are prepared for {what} of {published or name} is not known: {found}. {one_of}ay it in {beside}, as in an "
        f"OpenCLIP folder: {example} (interpolation: bicubic or bilinear; resize_mode: shortest or squash)"
    )


def random_preprocessing(name: str) -> dict[str, Any]:
    """For random weights, which would learn with any: that of the published ones, where they agree."""
    if name in TINY_MODELS:
        return TINY_PREPROCESSING
    wanted = _published(name)
    return json.loads(next(iter(wanted))) if len(wanted) == 1 else {}


def preprocessing_of_tag(name: str, tag: str) -> dict[str, Any]:
    """As the weights of one of OpenCLIP's tags want it; empty without a tag.

    Raises:
        UserError: there is no such tag.
    """
    known = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    if tag and not known:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise UserError(f"{name} has no tag {tag!r}: {', '.join(tags) or 'it has none'}")
    return {key: known[key] for key in _PREPROCESSING if key in known}


def _published(name: str) -> dict[str, list[str]]:
    """The ways in which an architecture's published weights want photos prepared, as JSON, and whose it is."""
    tags_of: dict[str, list[str]] = {}
    for tag in open_clip.list_pretrained_tags_by_model(name):
        known = open_clip.get_pretrained_cfg(name, tag)
        said = json.dumps({key: known[key] for key in _PREPROCESSING if key in known})
        tags_of.setdefault(said, []).append(tag)
    return tags_of


def is_said(preprocessing: object) -> bool:
    """Older OpenCLIP folders state no more than mean and std; the rest has one meaning then."""
    return isinstance(preprocessing, Mapping) and all(preprocessing.get(key) is not None for key in ("mean", "std"))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}, beside weights, cannot be read ({error})") from error
    return content if isinstance(content, dict) else {}
