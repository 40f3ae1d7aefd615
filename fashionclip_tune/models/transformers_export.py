"""A model as a folder that CLIPModel or SiglipModel of transformers loads, with its processor and tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from safetensors.torch import save_file
from torch import Tensor

from fashionclip_tune.data.preprocessing import Preprocessing, Tokenizer
from fashionclip_tune.errors import UserError
from fashionclip_tune.files import give_usual_mode
from fashionclip_tune.models.transformers_format import (
    CONFIG_NAME,
    INTERPOLATIONS,
    PREPROCESSOR_NAME,
    SPECIAL_TOKENS,
    WEIGHTS_NAME,
)
from fashionclip_tune.models.transformers_shapes import CLIP, transformers_config
from fashionclip_tune.models.transformers_weights import to_transformers

_BIAS = "logit_bias"


def write_transformers(
    folder: Path,
    model_config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    preprocessing: Preprocessing,
    tokenizer: Tokenizer,
) -> list[str]:
    """Writes a folder that transformers loads without a network: config, weights, image processor, tokenizer.

    Args:
        model_config: OpenCLIP's ``model_cfg``.
        weights: the state dict of OpenCLIP's network.

    Returns:
        What a user should know of the folder, a sentence each.

    Raises:
        UserError: transformers has no model that computes the same; says why. Nothing is written then.
    """
    config = transformers_config(model_config)
    is_clip, notes = config["model_type"] == CLIP, list[str]()
    if is_clip and _BIAS in weights:
        notes.append(f"CLIPModel has no logit bias: {weights[_BIAS].item():g} is left out, on which no embedding depends")
        weights = {name: tensor for name, tensor in weights.items() if name != _BIAS}
    context_length = config["text_config"]["max_position_embeddings"]
    converted = to_transformers(weights, _wanted(config))
    if isinstance(tokenizer, HFTokenizer):
        kwargs = model_config["text_cfg"].get("tokenizer_kwargs") or {}
        notes += (
            [f"texts are cleaned by open_clip.tokenizer.get_clean_fn({kwargs['clean']!r}) first"] if "clean" in kwargs else []
        )
        notes.append(f'texts are padded: processor(text=..., padding="max_length", max_length={context_length})')
    elif not isinstance(tokenizer, SimpleTokenizer):
        raise UserError(f"a tokenizer of the kind {type(tokenizer).__name__} cannot be written for transformers")

    folder.mkdir(parents=True, exist_ok=True)
    save_file(converted, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    give_usual_mode(folder / WEIGHTS_NAME)
    _write(folder / CONFIG_NAME, config)
    _write(folder / PREPROCESSOR_NAME, _image_processor(preprocessing, is_clip))
    if isinstance(tokenizer, HFTokenizer):
        tokenizer.save_pretrained(folder)
    else:
        _write_clip_tokenizer(folder, tokenizer, context_length)
    return notes


def _wanted(config: dict[str, Any]) -> dict[str, Tensor]:
    """Names and shapes of the model's weights, without storage."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    with torch.device("meta"):
        if config["model_type"] == CLIP:
            return dict(CLIPModel(CLIPConfig.from_dict(config)).state_dict())
        return dict(SiglipModel(SiglipConfig.from_dict(config)).state_dict())


def _image_processor(preprocessing: Preprocessing, is_clip: bool) -> dict[str, Any]:
    both_sides = {"height": preprocessing.size, "width": preprocessing.size}
    is_cropped = preprocessing.resize_mode == "shortest"
    kind = "CLIP" if is_clip or is_cropped else "Siglip"  # the latter cannot crop
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "processor_class": f"{'CLIP' if is_clip else 'Siglip'}Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocessing.size} if is_cropped else both_sides,
        "resample": next(code for code, name in INTERPOLATIONS.items() if name == preprocessing.interpolation),
        **({"do_center_crop": is_cropped, "crop_size": both_sides} if kind == "CLIP" else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocessing.mean,
        "image_std": preprocessing.std,
    }


def _write_clip_tokenizer(folder: Path, tokenizer: SimpleTokenizer, context_length: int) -> None:
    """OpenCLIP's own, as the files that transformers has for it; its names of the two special tokens are others."""
    vocabulary = {SPECIAL_TOKENS.get(token, token): number for token, number in tokenizer.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.bpe_ranks)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    start, end = SPECIAL_TOKENS.values()
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": context_length,
            "bos_token": start,
            "eos_token": end,
            "unk_token": end,
            "pad_token": end,
        },
    )


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
