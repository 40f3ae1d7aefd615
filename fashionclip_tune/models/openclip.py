"""OpenCLIP models: where weights come from, what goes into them, and how a winner is handed on."""

import copy
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.config.start_names import LOCAL_PREFIX
from fashionclip_tune.data.preprocessing import Preprocessing, Tokenizer
from fashionclip_tune.errors import UnavailableError, UserError
from fashionclip_tune.files import give_usual_mode
from fashionclip_tune.models.description import CONFIG_NAME, describe_folder, known_name, preprocessing_of, registered
from fashionclip_tune.models.foreign_code import drop_code_names, no_foreign_code
from fashionclip_tune.models.hub import CARD_NAME, text_tower_here, tokenizer_folder
from fashionclip_tune.models.start import Start
from fashionclip_tune.models.start_facts import start_card, tokenizer_on_the_hub
from fashionclip_tune.models.starts import find_start, folder_of
from fashionclip_tune.models.token_rows import plain_state
from fashionclip_tune.models.transformers_shapes import set_activation
from fashionclip_tune.models.transformers_weights import read_transformers_weights, to_openclip
from fashionclip_tune.models.weights import in_openclips_form, put_weights, read_weights

_log = logging.getLogger(__name__)

_SIGLIP_BIAS = -10.0  # Zhai et al. 2023, section 3.2
_WEIGHTS_NAME = "open_clip_model.safetensors"


@dataclass
class LoadedModel:
    """A model with all that is needed to feed it."""

    name: str
    """Of the architecture, where OpenCLIP lists it; else of the start."""
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
    card: dict[str, Any] = field(default_factory=dict)
    """Licence and source of the weights, as far as they are known, by the names of the hub's model cards."""


def load_model(config: ProjectConfig) -> LoadedModel:
    """A fresh copy of the configured model on the CPU; the weights stay in this process's memory for the next call.

    Raises:
        UserError: no such architecture, or weights that cannot be had: says where they were looked for.
    """
    return _copied(_cached(config), config)


def load_random_model(config: ProjectConfig) -> LoadedModel:
    """With random weights and a stand-in for the tokenizer, to measure with: memory and speed depend on neither.

    Nothing is looked for on the hub, but for a text tower that only the hub describes.

    Raises:
        UserError: no such architecture.
    """
    start = find_start(config.model_name, None)
    cached = _load_cached(start, config.model_name, config.model_cache_dir, config.training.seed, with_tokenizer=False)
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


def _cached(config: ProjectConfig) -> LoadedModel:
    """The one copy that this process keeps, not to be changed."""
    start = find_start(config.model_name, config.model.pretrained)
    return _load_cached(start, config.model_name, config.model_cache_dir, config.training.seed)


@lru_cache(maxsize=3)
def _load_cached(start: Start, name: str, cache_dir: Path, seed: int, with_tokenizer: bool = True) -> LoadedModel:
    for note in start.notes:
        _log.info(f"note: {note}")
    weights, model_config, card = None, start.model_config, dict[str, Any]()
    folder = folder_of(start.openclip_name)
    described = registered(start.openclip_name) if folder is None else describe_folder(folder, name).model_config
    own = {key: value for key, value in model_config.items() if value != described.get(key)}
    arguments = {key: value for key, value in own.items() if key not in ("quick_gelu", "custom_text")}
    arguments |= text_tower_here(model_config)
    if start.has_weights:
        weights, card = _read_start(start, cache_dir)
        if "logit_bias" in weights and "init_logit_bias" not in model_config:  # of a CLIP model trained with the sigmoid loss
            arguments["init_logit_bias"] = 0.0
            model_config = {**model_config, "init_logit_bias": 0.0}
    torch.manual_seed(seed)  # random weights are part of the run's definition
    try:
        with openclip_is_quiet(), no_foreign_code(start.openclip_name):
            # OpenCLIP would ignore weights beside a folder, read pickles less carefully, and ask the hub for those of a tag.
            network = open_clip.create_model(
                start.openclip_name,
                load_weights=False,
                pretrained_text=False,
                cache_dir=str(cache_dir),
                force_preprocess_cfg=start.preprocessing,
                force_quick_gelu=bool(model_config.get("quick_gelu")),
                **arguments,
            )
            set_activation(network, model_config)
            if weights is not None:
                where = start.file or start.tag or start.repository
                is_theirs = start.is_of_transformers
                converted = to_openclip(weights, network, where) if is_theirs else in_openclips_form(network, weights)
                put_weights(network, converted, where)
    except UserError:
        raise
    except Exception as error:  # open_clip, the hub's client and safetensors raise many types
        raise _weights_error(start, error) from error
    tokenizer = _tokenizer(start, cache_dir) if with_tokenizer else _same_tokens(network.context_length)
    preprocessing = preprocessing_of(name, network.visual.preprocess_cfg)
    return LoadedModel(
        name=known_name(model_config) or (name if folder is not None else start.openclip_name),
        network=network,
        preprocessing=preprocessing,
        tokenizer=tokenizer,
        model_config=model_config,
        weights_fingerprint=_fingerprint(network),
        card=card,
        clamps_logit_scale="init_logit_bias" not in _first_config(start),
    )


def _first_config(start: Start) -> dict[str, Any]:
    """Of the architecture, to which a sigmoid loss may have added a bias since."""
    known = known_name(start.model_config)
    return start.model_config if known is None else registered(known)


def _read_start(start: Start, cache_dir: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and what is to stand on the card of a model that is trained from them."""
    try:
        file = start.fetch(cache_dir)
        weights = read_transformers_weights(file) if start.is_of_transformers else read_weights(file)
        return weights, start_card(start, file)
    except UserError:
        raise
    except Exception as error:
        raise _weights_error(start, error) from error


@contextmanager
def openclip_is_quiet() -> Iterator[None]:
    """It warns on the root logger that random weights are random, which was asked for, and logs errors that it raises."""
    logger, no_record = logging.getLogger(), lambda record: False
    logger.addFilter(no_record)
    try:
        yield
    finally:
        logger.removeFilter(no_record)


def fetch_weights(config: ProjectConfig) -> None:
    """Downloads weights, tokenizer and text tower's description into the caches, or checks that a path is there; loads nothing.

    Raises:
        UserError: says which tag, where it was looked for, and how to bring it.
    """
    start, cache_dir = find_start(config.model_name, config.model.pretrained), config.model_cache_dir
    try:
        if start.has_weights:
            start.fetch(cache_dir)
    except UserError:
        raise
    except Exception as error:
        raise _weights_error(start, error) from error
    text_tower_here(start.model_config)
    _tokenizer(start, cache_dir)


def _tokenizer(start: Start, cache_dir: Path) -> Tokenizer:
    """That of the folder, else of OpenCLIP's own list, else the one on the hub that the description names."""
    text, folder = start.model_config["text_cfg"], folder_of(start.openclip_name)
    on_the_hub = text.get("hf_tokenizer_name")
    if (repository := tokenizer_on_the_hub(start)) is not None:
        source, folder = f"of {repository}", tokenizer_folder(repository, None if start.is_on_the_hub else cache_dir)
    else:
        folder = start.tokenizer_folder or folder
        source = f"in {folder}" if folder is not None else "of OpenCLIP"
    try:
        with openclip_is_quiet(), no_foreign_code(start.openclip_name):
            tokenizer: Tokenizer
            if not on_the_hub:
                tokenizer = open_clip.get_tokenizer(start.openclip_name)
            else:
                tokenizer = open_clip.tokenizer.HFTokenizer(
                    str(folder),
                    context_length=text.get("context_length", open_clip.CLIPTextCfg.context_length),
                    tokenizer_mode=text.get("tokenizer_mode"),
                    **text.get("tokenizer_kwargs", {}),
                )
    except UserError:
        raise
    except Exception as error:  # transformers raises many types
        raise UserError(
            f"the tokenizer of {start.openclip_name} ({source}) could not be loaded ({reason_of(error)}): give an OpenCLIP "
            f"folder with tokenizer files of its own: --set clip_model={LOCAL_PREFIX}FOLDER"
        ) from error
    drop_code_names(tokenizer, start.openclip_name)
    return tokenizer


def _same_tokens(context_length: int) -> Tokenizer:
    """Captions as long as they can be: no tower's end token comes before the last place."""
    tokens_L = torch.full((context_length,), 3)
    tokens_L[-1] = 4
    return lambda texts: tokens_L.repeat(len(texts), 1)


def reason_of(error: Exception) -> str:
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if first.endswith(":") and more else first


def _weights_error(start: Start, error: Exception) -> UserError:
    """A file that cannot be read, or is of another network."""
    kind = UnavailableError if isinstance(error, OSError) else UserError
    where = f" in {start.file}" if start.file is not None else f", tag {start.tag}," if start.tag is not None else ""
    return kind(f"the weights of {start.openclip_name}{where} cannot be loaded: {reason_of(error)}")


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
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in plain_state(loaded.network).items()}
    save_file(weights, folder / _WEIGHTS_NAME)
    give_usual_mode(folder / _WEIGHTS_NAME)
    preprocess = {key: value for key, value in asdict(loaded.preprocessing).items() if key != "size"}
    described = {"model_cfg": loaded.model_config, "preprocess_cfg": preprocess}
    (folder / CONFIG_NAME).write_text(json.dumps(described, indent=2) + "\n")
    if loaded.card:
        head = ModelCardData(library_name="open_clip", **loaded.card).to_yaml()
        ModelCard(f"---\n{head}\n---\n").save(folder / CARD_NAME)
    if isinstance(loaded.tokenizer, open_clip.tokenizer.HFTokenizer):
        loaded.tokenizer.save_pretrained(folder)


def base_weights(config: ProjectConfig) -> tuple[dict[str, Tensor], str]:
    """The tensors that a configured run starts from, not to be changed, and their fingerprint."""
    loaded = _cached(config)
    return loaded.network.state_dict(), loaded.weights_fingerprint


def load_weights(network: nn.Module, file: Path) -> None:
    """Loads a safetensors file into a network of the same architecture; raises as ``put_weights`` does."""
    put_weights(network, load_file(file), file)
