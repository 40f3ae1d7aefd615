"""What is to be known of a start before it is trained: architecture, input, tokenizer, where its weights are, licence."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from huggingface_hub import metadata_load
from open_clip.transform import PreprocessCfg

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.config.start_names import HUB_PREFIX, start_labels
from fashionclip_tune.models.description import known_name
from fashionclip_tune.models.hub import CARD_NAME, cached_file, cached_tokenizer, has_tokenizer
from fashionclip_tune.models.start import Start
from fashionclip_tune.models.starts import architecture_start, find_start, folder_of
from fashionclip_tune.models.tiny import TINY_MODELS, pretrained_tiny_dir
from fashionclip_tune.storage.checkpoint import RECORD_NAME, file_hash, read_record


@dataclass(frozen=True)
class StartFacts:
    """Of one start, as a plan and a report say them."""

    label: str
    architecture: str
    image_size: int
    resizing: str
    """How photos are brought to that size: OpenCLIP's ``resize_mode`` and ``interpolation``."""
    context_length: int
    tokenizer: str
    weights: str
    is_at_hand: bool
    """Else the weights are fetched when the sweep begins, which needs a network."""
    notes: tuple[str, ...]
    """What is taken for granted of it."""
    weights_hash: str | None
    """Of a file that somebody may write anew: no tag's, no repository's, not of a tiny tower's own."""
    licence: str | None
    """As the card beside the weights says it; None: none does, or they are not fetched yet."""
    source: str | None = None
    """What they were trained from, likewise."""
    lacks: tuple[str, ...] = ()
    """What else of the hub's is fetched when the sweep begins; of a folder, what it has not."""

    def line(self) -> str:
        named = self.label if self.label == self.architecture else f"{self.label}: {self.architecture}"
        text = f"{named}, {self.image_size} px, {self.context_length} tokens of {self.tokenizer}; {self.weights}"
        text += "" if self.is_at_hand else ", not on this machine: fetched when it begins"
        text += f"; lacks {' and '.join(self.lacks)}" if self.lacks else ""
        text += f"; licence {self.licence}" if self.licence else ""
        return f"{text}; trained from {self.source}" if self.source else text


_RESIZING = {"resize_mode": PreprocessCfg.resize_mode, "interpolation": PreprocessCfg.interpolation}


def start_facts(config: ProjectConfig, label: str) -> StartFacts:
    """Raises UserError for a start that there is not; of one that is to be fetched what is known beforehand."""
    start = _planned(config)
    vision, text = start.model_config["vision_cfg"], start.model_config["text_cfg"]
    size = vision.get("image_size", open_clip.CLIPVisionCfg.image_size)
    file = start.at_hand(config.model_cache_dir)
    card = _card(file) if file is not None else {}
    return StartFacts(
        label,
        _architecture(start),
        size if isinstance(size, int) else size[0],
        " ".join(str(start.preprocessing.get(name, default)) for name, default in _RESIZING.items()),
        text.get("context_length", open_clip.CLIPTextCfg.context_length),
        text.get("hf_tokenizer_name") or "openai/clip",
        "weights that are made here first, in about a minute" if _is_to_be_made(config) else _weights(start),
        file is not None or not start.has_weights,
        start.notes,
        file_hash(start.file) if start.file is not None and config.model_name not in TINY_MODELS else None,
        _listed(card, "license", "license_name"),
        _listed(card, "base_model"),
        tuple(_lacks(start, config.model_cache_dir)),
    )


def facts_of_starts(configs: Mapping[str, ProjectConfig]) -> dict[str, StartFacts]:
    """Of all that a sweep starts from, by ``clip_model``."""
    labels = start_labels(configs)
    return {name: start_facts(config, labels[name]) for name, config in configs.items()}


def start_changes(saved: Mapping[str, Mapping[str, Any]] | None, now: Mapping[str, StartFacts]) -> list[tuple[str, str]]:
    """What a sweep that goes on would start from otherwise than before, and how; nothing is known of an older version's."""
    if saved is None:
        return []
    found = [(name, "it is another start now, or its folder is looked for from elsewhere") for name in saved if name not in now]
    for name, facts in now.items():
        before = saved.get(name, {}).get("weights_hash")
        if before is not None and before != facts.weights_hash:
            found.append((name, "its weights are others"))
    return found


def _planned(config: ProjectConfig) -> Start:
    """Without a network, and before tiny towers are pretrained: as far as it is known beforehand."""
    if _is_to_be_made(config):
        return find_start(config.model_name, None)
    if config.model_name.startswith(HUB_PREFIX):
        return architecture_start(config.model_name)
    return find_start(config.model_name, config.model.pretrained)


def _architecture(start: Start) -> str:
    """OpenCLIP's name; a folder's may have none."""
    named = start.openclip_name if folder_of(start.openclip_name) is None else "an architecture of its own"
    return known_name(start.model_config) or named


def _is_to_be_made(config: ProjectConfig) -> bool:
    is_own = config.model.pretrained == "default" and config.model_name in TINY_MODELS
    return is_own and not pretrained_tiny_dir(config.model_name).is_dir()


def _weights(start: Start) -> str:
    if start.repository is not None:
        return f"weights of {HUB_PREFIX}{start.repository}"
    if start.tag is not None:
        repository = _repository(start)
        return f"weights {start.tag}" + (f" of {HUB_PREFIX}{repository}" if repository else "")
    return f"weights in {start.file}" if start.file is not None else "random weights"


def start_card(start: Start, weights_file: Path) -> dict[str, Any]:
    """Of the hub's model card of whatever is trained from a start: its licence and ``base_model``, as far as they are known.

    A folder's own card is read: what was trained from a start names it, too.
    """
    known, repository = _card(weights_file), _repository(start)
    if repository:
        known["base_model"] = repository
    return known


def _repository(start: Start) -> str:
    if start.tag is None:
        return start.repository or ""
    known = open_clip.get_pretrained_cfg(start.openclip_name, start.tag) or {}
    return str(known.get("hf_hub", "").rpartition("/")[0])


def tokenizer_on_the_hub(start: Start) -> str | None:
    """The repository that its tokenizer is in; None: it is in a folder, or OpenCLIP's own."""
    folder = folder_of(start.openclip_name)
    is_in_folder = folder is not None and (has_tokenizer(folder) or not start.is_on_the_hub)
    if start.tokenizer_folder is not None or is_in_folder:
        return None
    name: str | None = start.model_config["text_cfg"].get("hf_tokenizer_name")
    return name


def _lacks(start: Start, cache_dir: Path) -> Iterator[str]:
    text, folder, begins = start.model_config["text_cfg"], folder_of(start.openclip_name), "not here: fetched when it begins"
    if start.repository is not None and not start.is_on_the_hub:
        return  # its description is not here, and may name another
    repository, tower, place = tokenizer_on_the_hub(start), text.get("hf_model_name"), start.tokenizer_folder or folder
    if repository and cached_tokenizer(repository, None if start.is_on_the_hub else cache_dir) is None:
        yield f"the tokenizer of {repository} ({begins})"
    elif not repository and place is not None and text.get("hf_tokenizer_name") and not has_tokenizer(place):
        yield f"the tokenizer ({place} has none)"
    if tower and not Path(tower).is_dir() and cached_file(tower, ["config.json"], None) is None:
        yield f"the description of the text tower {tower} ({begins})"


def _listed(card: Mapping[str, Any], *names: str) -> str | None:
    """As people read it: one, or several after commas."""
    said = [card[name] for name in names if name in card]
    return ", ".join(each for value in said for each in ([value] if isinstance(value, str) else value)) or None


def _card(weights_file: Path) -> dict[str, Any]:
    """What the head of the card beside the weights says of both, else the record of a checkpoint of ours."""
    path, record = weights_file.parent / CARD_NAME, weights_file.parent / RECORD_NAME
    try:
        head = (metadata_load(path) if path.is_file() else None) or {}
        if record.is_file():
            head = {**(read_record(record.parent).get("card") or {}), **head}
    except Exception:  # somebody's files: yaml and the hub's client raise many types
        return {}
    return {name: head[name] for name in ("license", "license_name", "license_link", "base_model") if _is_text(head.get(name))}


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value))
