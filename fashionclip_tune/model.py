"""OpenCLIP models: where weights come from, what goes into them, and how a winner is handed on."""

import copy
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import open_clip
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fashionclip_tune.config import ClipModelOptions, ProjectConfig
from fashionclip_tune.errors import UnavailableError, UserError
from fashionclip_tune.files import give_usual_mode
from fashionclip_tune.pickled_weights import PICKLED_SUFFIXES, read_pickled_weights
from fashionclip_tune.preprocessing import Preprocessing
from fashionclip_tune.tiny import TINY_MODELS, TINY_PREPROCESSING, pretrained_tiny_dir, register_tiny_models

# The published tags; each also says how photos are to be prepared where weights come from a file.
DEFAULT_TAGS = {
    ClipModelOptions.ViT_B_32.value: "laion2b_s34b_b79k",
    ClipModelOptions.ViT_B_16.value: "laion2b_s34b_b88k",
    ClipModelOptions.ViT_SigLIP_2_16.value: "webli",
}
_SIGLIP_BIAS = -10.0  # Zhai et al. 2023, section 3.2
_WEIGHTS_NAME, CONFIG_NAME = "open_clip_model.safetensors", "open_clip_config.json"


class Tokenizer(Protocol):
    def __call__(self, texts: Sequence[str]) -> Tensor: ...


@dataclass
class LoadedModel:
    """A model with all that is needed to feed it."""

    name: str
    network: nn.Module
    preprocessing: Preprocessing
    tokenizer: Tokenizer
    model_config: dict[str, Any]
    """OpenCLIP's ``model_cfg``, as an exported folder states it."""
    weights_fingerprint: str
    clamps_logit_scale: bool
    """CLIP models were trained with the scale kept at or below 100; SigLIP models were not."""
    fits_logit_bias: bool = False
    """The sigmoid loss was added to a model without a bias; it is to be fitted to the first batch."""


def load_model(config: ProjectConfig) -> LoadedModel:
    """A fresh copy of the configured model on the CPU; the weights stay in this process's memory for the next call.

    Raises:
        UserError: no such architecture, or weights that cannot be had: says where they were looked for.
    """
    cached = _load_cached(config.model_name, config.model.pretrained, config.model_cache_dir, config.training.seed)
    return _copied(cached, config)


def load_random_model(config: ProjectConfig) -> LoadedModel:
    """With random weights and a stand-in for the tokenizer, to measure with: memory and speed depend on neither.

    Nothing is looked for on the hub, but for a text tower that only the hub describes.

    Raises:
        UserError: no such architecture.
    """
    cached = _load_cached(config.model_name, None, config.model_cache_dir, config.training.seed, with_tokenizer=False)
    return _copied(cached, config)


def _copied(loaded: LoadedModel, config: ProjectConfig) -> LoadedModel:
    """The caller's own, with the logit bias that its loss needs."""
    loaded = LoadedModel(**{**vars(loaded), "network": copy.deepcopy(loaded.network)})
    if config.loss_function.value == "siglip" and _logit_bias(loaded.network) is None:
        given = config.model.init_logit_bias
        bias = _SIGLIP_BIAS if given is None else given
        loaded.network.logit_bias = nn.Parameter(torch.tensor(bias))
        loaded.model_config = {**loaded.model_config, "init_logit_bias": bias}
        loaded.fits_logit_bias = given is None
    return loaded


def _logit_bias(network: nn.Module) -> Tensor | None:
    return getattr(network, "logit_bias", None)


@lru_cache(maxsize=3)
def _load_cached(name: str, pretrained: str | None, cache_dir: Path, seed: int, with_tokenizer: bool = True) -> LoadedModel:
    model_config = check_architecture(name)
    source = _weights_source(name, pretrained)
    weights = read_pickled_weights(source) if isinstance(source, Path) and source.suffix in PICKLED_SUFFIXES else None
    # A folder without weights would silently give random ones.
    arguments: dict[str, Any] = {
        "pretrained_text": False,
        "cache_dir": str(cache_dir),
        "require_pretrained": source is not None and weights is None,
    }
    if isinstance(source, Path) and source.is_dir():
        arguments["model_name"] = f"local-dir:{source}"
        model_config = _local_model_config(source, name)
    else:
        arguments |= {"model_name": name, "pretrained": str(source) if source and weights is None else None}
        arguments["force_preprocess_cfg"] = _preprocessing_of(name, source)
        has_logit_bias = "logit_bias" in weights if weights is not None else _has_logit_bias(source)
        if "init_logit_bias" not in model_config and has_logit_bias:  # of a CLIP model trained with the sigmoid loss
            arguments["init_logit_bias"] = 0.0
            model_config = {**model_config, "init_logit_bias": 0.0}
    torch.manual_seed(seed)  # random weights are part of the run's definition
    try:
        with openclip_is_quiet():
            network = open_clip.create_model(**arguments)
            if weights is not None:
                network.load_state_dict(weights)
            tokenizer = _tokenizer(name, cache_dir, source) if with_tokenizer else _same_tokens(network.context_length)
    except Exception as error:  # open_clip, the hub's client and safetensors raise many types
        raise _weights_error(name, pretrained, source, cache_dir, error) from error
    preprocess = network.visual.preprocess_cfg
    if preprocess["resize_mode"] not in ("shortest", "squash"):
        raise UserError(f"{name}: photos resized by {preprocess['resize_mode']!r} are not supported, only shortest and squash")
    size = preprocess["size"]
    preprocessing = Preprocessing(
        size=size if isinstance(size, int) else size[0],
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        resize_mode=preprocess["resize_mode"],
        interpolation=preprocess["interpolation"],
    )
    return LoadedModel(
        name=name,
        network=network,
        preprocessing=preprocessing,
        tokenizer=tokenizer,
        model_config=model_config,
        weights_fingerprint=_fingerprint(network),
        clamps_logit_scale="init_logit_bias" not in check_architecture(name),
    )


@contextmanager
def openclip_is_quiet() -> Iterator[None]:
    """It warns on the root logger that random weights are random, which was asked for, and logs errors that it raises."""
    logger, no_record = logging.getLogger(), lambda record: False
    logger.addFilter(no_record)
    try:
        yield
    finally:
        logger.removeFilter(no_record)


def _has_logit_bias(source: str | Path | None) -> bool:
    if not isinstance(source, Path) or source.suffix != ".safetensors":
        return False
    try:
        with safe_open(source, "pt") as file:
            return "logit_bias" in file.keys()  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError):
        return False  # OpenCLIP says why it cannot be loaded


def check_architecture(name: str) -> dict[str, Any]:
    """OpenCLIP's configuration of an architecture; a UserError names the likely ones if there is none."""
    register_tiny_models()
    model_config: dict[str, Any] | None = open_clip.get_model_config(name)
    _refuse_code(model_config, name)
    if model_config is None:
        raise UserError(
            f"clip_model = {name!r} is no OpenCLIP architecture: {', '.join([*DEFAULT_TAGS, *TINY_MODELS])}, "
            "or another name from open_clip.list_models()"
        )
    return model_config


def _refuse_code(model_config: Any, where: object) -> None:
    """A description may ask for a tokenizer that comes with code of its own, which OpenCLIP would run."""
    text = model_config.get("text_cfg") if isinstance(model_config, dict) else None
    options = text.get("tokenizer_kwargs") if isinstance(text, dict) else None
    if isinstance(options, dict) and options.get("trust_remote_code"):
        raise UserError(f"{where}: its {CONFIG_NAME} has trust_remote_code, which runs code of the model's own: not supported")


def fetch_weights(config: ProjectConfig) -> None:
    """Downloads a tag's weights and tokenizer into the cache, or checks that a path is there; loads nothing.

    Raises:
        UserError: says which tag, where it was looked for, and how to bring it.
    """
    name, cache_dir = config.model_name, config.model_cache_dir
    check_architecture(name)
    source = _weights_source(name, config.model.pretrained)
    if isinstance(source, Path) and source.is_dir():
        _local_model_config(source, name)  # before its tokenizer is made, which could run code
    try:
        if isinstance(source, str):
            open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, source), cache_dir=str(cache_dir))
        _tokenizer(name, cache_dir, source)
    except Exception as error:
        raise _weights_error(name, config.model.pretrained, source, cache_dir, error) from error


def _weights_source(name: str, pretrained: str | None) -> str | Path | None:
    """A tag, an existing file or folder, or None for random weights."""
    if pretrained is None:
        return None
    if pretrained == "default" and name in TINY_MODELS:
        folder = pretrained_tiny_dir(name)
        if not folder.is_dir():
            raise UnavailableError(
                f"the pretrained weights of {name} are not made yet: `python -m fashionclip_tune pretrain` makes them in "
                "about a minute (model.pretrained=none starts from random weights)"
            )
        return folder
    if pretrained == "default":
        if name not in DEFAULT_TAGS:
            raise UserError(f"model.pretrained must be given for {name}: {_allowed_weights(name)}")
        return DEFAULT_TAGS[name]
    if open_clip.get_pretrained_cfg(name, pretrained):
        return pretrained
    path = Path(pretrained).expanduser().absolute()
    if not path.exists():
        kind = UserError if path.name == pretrained else UnavailableError  # a tag that is none, or a place with nothing there
        raise kind(f"model.pretrained = {pretrained!r} is neither a file, a folder nor a tag: {_allowed_weights(name)}")
    return path


def _allowed_weights(name: str) -> str:
    tags = open_clip.list_pretrained_tags_by_model(name)
    return f"a tag of {name} ({', '.join(tags) or 'it has none'}), a weights file, an OpenCLIP folder, or none"


def _preprocessing_of(name: str, source: str | Path | None) -> dict[str, Any]:
    """OpenCLIP knows the preprocessing of a tag; for a file or random weights it would guess OpenAI's."""
    if name in TINY_MODELS:
        return TINY_PREPROCESSING
    if isinstance(source, str):
        return {}
    known = open_clip.get_pretrained_cfg(name, DEFAULT_TAGS.get(name, "")) or {}
    return {key: known[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in known}


def _tokenizer(name: str, cache_dir: Path, source: str | Path | None) -> Tokenizer:
    if isinstance(source, Path) and source.is_dir():
        name = f"local-dir:{source}"
    tokenizer: Tokenizer = open_clip.get_tokenizer(name, cache_dir=str(cache_dir))
    return tokenizer


def _same_tokens(context_length: int) -> Tokenizer:
    return lambda texts: torch.ones(len(texts), context_length, dtype=torch.long)


def _local_model_config(folder: Path, name: str) -> dict[str, Any]:
    """The ``model_cfg`` of an OpenCLIP folder, which must be of the named architecture but for a logit bias."""
    path = folder / CONFIG_NAME
    try:
        local: dict[str, Any] = dict(json.loads(path.read_text())["model_cfg"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        kind = UnavailableError if isinstance(error, OSError) else UserError
        raise kind(f"model.pretrained = {folder} is no OpenCLIP folder: {path.name} cannot be read ({error})") from error
    _refuse_code(local, folder)
    expected = open_clip.get_model_config(name)
    for key in ("embed_dim", "vision_cfg"):
        if local.get(key) != expected.get(key):
            raise UserError(f"the weights in {folder} are not of {name}: {key} is {local.get(key)}, not {expected.get(key)}")
    return local


def _weights_error(name: str, pretrained: str | None, source: object, cache_dir: Path, error: Exception) -> UserError:
    """A tag's weights, or a file, that cannot be reached; or a file of other weights."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(source, Path):
        kind = UnavailableError if isinstance(error, OSError) else UserError
        return kind(f"the weights of {name} in {source} cannot be loaded: {reason}")
    hub = (open_clip.get_pretrained_cfg(name, str(source)) or {}).get("hf_hub") or "its download address"
    return UnavailableError(
        f"the weights of {name}, tag {source} (model.pretrained = {pretrained}), could not be fetched: looked in {cache_dir} "
        f"and on the hub at {hub} ({reason}). Copy a cache that has them to {cache_dir}, or give a file or an OpenCLIP "
        f"folder: --set model.pretrained=/path/to/{_WEIGHTS_NAME}"
    )


def tokenizer_name(loaded: LoadedModel) -> str:
    """Where a model's tokenizer comes from, and how long its texts are at most: ``openai/clip, 77 tokens``."""
    text = loaded.model_config.get("text_cfg", {})
    return f"{text.get('hf_tokenizer_name', 'openai/clip')}, {text.get('context_length', 77)} tokens"


def _fingerprint(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, tensor in network.state_dict().items():
        digest.update(f"{key}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def export_openclip(loaded: LoadedModel, folder: Path) -> None:
    """Writes a folder that ``open_clip.create_model_and_transforms("local-dir:FOLDER")`` loads, preprocessing included."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in loaded.network.state_dict().items()}
    save_file(weights, folder / _WEIGHTS_NAME)
    give_usual_mode(folder / _WEIGHTS_NAME)
    preprocess = {key: value for key, value in asdict(loaded.preprocessing).items() if key != "size"}
    described = {"model_cfg": loaded.model_config, "preprocess_cfg": preprocess}
    (folder / CONFIG_NAME).write_text(json.dumps(described, indent=2) + "\n")
    if isinstance(loaded.tokenizer, open_clip.tokenizer.HFTokenizer):
        loaded.tokenizer.save_pretrained(folder)


def base_weights(config: ProjectConfig) -> tuple[dict[str, Tensor], str]:
    """The tensors that a configured run starts from, not to be changed, and their fingerprint."""
    loaded = _load_cached(config.model_name, config.model.pretrained, config.model_cache_dir, config.training.seed)
    return loaded.network.state_dict(), loaded.weights_fingerprint


def load_weights(network: nn.Module, file: Path) -> None:
    """Loads a safetensors file into a network of the same architecture."""
    network.load_state_dict(load_file(file))
