"""Models of transformers with random weights, small enough for a test, and OpenCLIP's architectures of the same shapes."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from timm.models import VisionTransformer, build_model_with_cfg, register_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

SMALL_SIGLIP = "small-SigLIP"  # two layers of 64, photos of 32 x 32; by timm as OpenCLIP has its SigLIP
END = 49407  # of a text, in CLIP's vocabulary
WORDS = ["</s>", "<unk>", *["a", "red", "blue", "dress", "shirt", "with", "dots", "of", "cotton", "wool"]]
TINY_CLIP_TEXT = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 3}
TINY_CLIP_VISION = {**TINY_CLIP_TEXT, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
_SMALL = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}


@register_model
def vit_small_test_siglip_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "class_token": False}
    own = {"pretrained_cfg": {"num_classes": 0}, **sizes, "global_pool": "map", **kwargs}
    own = {key: value for key, value in own.items() if not key.startswith(("pretrained_cfg_overlay", "cache_dir"))}
    return build_model_with_cfg(VisionTransformer, "vit_small_test_siglip_32", pretrained, **own)


@cache
def register_small_siglip(folder: Path) -> None:
    """Makes the architecture known to OpenCLIP in this process."""
    vision = {"image_size": 32, "timm_model_name": "vit_small_test_siglip_32", "timm_pool": "map", "timm_proj": "none"}
    text = {"context_length": 12, "vocab_size": len(WORDS), "width": 64, "heads": 2, "layers": 2, "norm_kwargs": {"eps": 1e-6}}
    text |= {"hf_tokenizer_name": "nobody/nothing", "tokenizer_kwargs": {"clean": "canonicalize"}}
    text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    described = {"embed_dim": 64, "init_logit_bias": -10, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    folder.mkdir(exist_ok=True)
    (folder / f"{SMALL_SIGLIP}.json").write_text(json.dumps(described))
    open_clip.add_model_config(folder)


def randomise(network: nn.Module, seed: int = 0) -> None:
    """No bias at 0, no norm at 1, no two alike: each has its own part in the embeddings."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            is_norm = ("norm" in name or "layrnorm" in name or ".ln_" in name) and parameter.ndim == 1
            scale = 0.2 if parameter.ndim < 2 or "embed" in name else parameter[0].numel() ** -0.5
            parameter.normal_(float(is_norm and name.endswith("weight")), scale, generator=generator)


def clip_config(activation: str = "quick_gelu", **sizes: Any) -> Any:
    """Of the shape of ``tiny-clip``; by ``sizes`` of another."""
    from transformers import CLIPConfig

    text = {**TINY_CLIP_TEXT, "max_position_embeddings": 32, "hidden_act": activation, **sizes.get("text", {})}
    vision = {**TINY_CLIP_VISION, "hidden_act": activation, **sizes.get("vision", {})}
    return CLIPConfig(projection_dim=sizes.get("projection_dim", 96), text_config=text, vision_config=vision)


def siglip_config(activation: str = "gelu_pytorch_tanh") -> Any:
    """Of the shape of ``SMALL_SIGLIP``."""
    from transformers import SiglipConfig

    tokens = {"vocab_size": len(WORDS), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    vision = {**_SMALL, "image_size": 32, "patch_size": 8, "hidden_act": activation}
    return SiglipConfig(text_config={**_SMALL, **tokens, "hidden_act": activation}, vision_config=vision)


def save(config: Any, folder: Path, **how: Any) -> Any:
    """A folder as ``save_pretrained`` leaves it; gives the model."""
    from transformers import CLIPImageProcessor, CLIPModel, SiglipImageProcessor, SiglipModel

    is_clip, side = config.model_type == "clip", config.vision_config.image_size
    model = (CLIPModel if is_clip else SiglipModel)(config).eval()
    randomise(model)
    model.save_pretrained(folder, **how)
    if is_clip:
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(folder)
    else:
        SiglipImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
        save_word_tokenizer(folder)
    return model


def save_word_tokenizer(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="</s>", unk_token="<unk>").save_pretrained(folder)


def inputs(config: Any, num: int = 2) -> tuple[Tensor, Tensor]:
    """Photos, and texts of different lengths, as both libraries take them."""
    generator = torch.Generator().manual_seed(1)
    side, text = config.vision_config.image_size, config.text_config
    images_BCHW = torch.randn(num, 3, side, side, generator=generator)
    length = text.max_position_embeddings
    tokens_BL = torch.randint(1, text.vocab_size - 2, (num, length), generator=generator)
    if config.model_type == "clip":
        for row in range(num):
            tokens_BL[row, 3 + row], tokens_BL[row, 4 + row :] = END, 0
    return images_BCHW, tokens_BL


def embeddings(network: Any, images_BCHW: Tensor, tokens_BL: Tensor) -> Sequence[Tensor]:
    """Of length 1, of images and of texts, by whichever library the network is of."""
    with torch.inference_mode():
        if hasattr(network, "encode_image"):
            return network.encode_image(images_BCHW, normalize=True), network.encode_text(tokens_BL, normalize=True)
        found = network(input_ids=tokens_BL, pixel_values=images_BCHW)
        return found.image_embeds, found.text_embeds
