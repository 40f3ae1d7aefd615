"""Places of parameters, checked against the modules themselves, and what freezing, patch dropout and checkpointing do."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import PatchDropout
from torch import nn

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.openclip import load_model
from fashionclip_tune.models.towers import is_vision_transformer, parameter_places, prepare_towers
from tests.support.networks import frozen, on_meta

REAL = ("ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP2-256")
ALL = ("tiny-clip", "tiny-sig", *REAL)


def stations(network: Any) -> Iterator[tuple[str, list[list[Any]]]]:
    """Each tower's modules and parameters from input to output, as the forward passes of OpenCLIP and timm use them."""
    text = getattr(network, "text", network)
    yield "text", [[text.token_embedding, text.positional_embedding], *([b] for b in text.transformer.resblocks),
                   [text.ln_final, text.text_projection]]  # fmt: skip
    visual = network.visual
    if hasattr(visual, "trunk"):
        trunk = visual.trunk
        head = [trunk.norm, trunk.fc_norm, trunk.attn_pool, visual.head]
        yield "image", [[trunk.patch_embed, trunk.pos_embed, trunk.norm_pre], *([b] for b in trunk.blocks), head]
    else:
        embeddings = [visual.conv1, visual.class_embedding, visual.positional_embedding, visual.ln_pre]
        yield "image", [embeddings, *([b] for b in visual.transformer.resblocks), [visual.ln_post, visual.proj]]


def depths(network: Any) -> dict[int, tuple[str, int, int]]:
    """By a parameter's identity: tower, depth, number of blocks."""
    found: dict[int, tuple[str, int, int]] = {}
    for tower, parts in stations(network):
        for depth, part in enumerate(parts):
            for each in part:
                for parameter in each.parameters() if isinstance(each, nn.Module) else [each]:
                    assert id(parameter) not in found
                    found[id(parameter)] = (tower, depth, len(parts) - 2)
    return found


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_is_at_one_depth_of_one_tower(name: str) -> None:
    network = on_meta(name)
    places, expected = parameter_places(network), depths(network)
    named = dict(network.named_parameters())
    assert places.keys() == named.keys()
    for key, parameter in named.items():
        place = places[key]
        if key in ("logit_scale", "logit_bias"):
            assert (place.tower, place.depth) == ("logits", None)
        else:
            assert (place.tower, place.depth, place.num_blocks) == expected.pop(id(parameter)), key
    assert not expected
    blocks = {"tiny-clip": (3, 2), "tiny-sig": (3, 2)}.get(name, (12, 12))
    assert {(place.tower, place.num_blocks) for place in places.values()} == {
        ("image", blocks[0]), ("text", blocks[1]), ("logits", 0)}  # fmt: skip


def prepared(config: ProjectConfig, **overrides: Any) -> Any:
    config = config.with_overrides(overrides)
    network = load_model(config).network.train()
    prepare_towers(network, config)
    return network


def under(network: Any, *prefixes: str) -> set[str]:
    return {name for name, _ in network.named_parameters() if name.startswith(prefixes)}


CLIP_TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")


@pytest.mark.parametrize(
    ("name", "setting", "value", "prefixes"),
    [
        ("tiny-clip", "image_tower", True, ["visual."]),
        ("tiny-clip", "text_tower", True, CLIP_TEXT),
        ("tiny-clip", "token_embedding", True, ["token_embedding."]),
        ("tiny-clip", "image_blocks", 1, ["visual.conv1", "visual.class", "visual.pos", "visual.ln_pre",
                                          "visual.transformer.resblocks.0."]),
        ("tiny-clip", "text_blocks", 2, ["token_embedding.", "positional_embedding", "transformer."]),
        ("tiny-sig", "image_tower", True, ["visual."]),
        ("tiny-sig", "text_tower", True, ["text."]),
        ("tiny-sig", "token_embedding", True, ["text.token_embedding."]),
        ("tiny-sig", "text_blocks", 1, ["text.token_embedding.", "text.positional", "text.transformer.resblocks.0."]),
    ],
)  # fmt: skip
def test_what_is_frozen_is_what_the_setting_says(
    tiny_config: ProjectConfig, name: str, setting: str, value: Any, prefixes: list[str]
) -> None:
    network = prepared(replace(tiny_config, clip_model=name), **{f"freeze.{setting}": value})
    assert frozen(network) == under(network, *prefixes) != set()


def test_siglip2_is_frozen_by_its_own_names() -> None:
    network = on_meta("ViT-B-16-SigLIP2-256", force_image_size=256)  # one of its own: freezing changes it
    settings = {"freeze.token_embedding": True, "freeze.image_blocks": 2}
    prepare_towers(network, ProjectConfig(clip_model="ViT-B-16-SigLIP2-256").with_overrides(settings))
    expected = under(
        network, "text.token_embedding.", "visual.trunk.patch_embed.", "visual.trunk.pos_embed",
        "visual.trunk.blocks.0.", "visual.trunk.blocks.1.",
    )  # fmt: skip
    assert frozen(network) == expected
    assert len(expected) == 1 + 3 + 2 * 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze.image_blocks": 4}, "freeze.image_blocks = 4 .* tiny-clip has 3 there; allowed are 0 to 3"),
        ({"freeze.text_blocks": 3}, "freeze.text_blocks = 3 .* tiny-clip has 2 there; allowed are 0 to 2"),
    ],
)
def test_more_blocks_than_there_are_is_refused(tiny_config: ProjectConfig, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepared(tiny_config, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze.image_blocks": 1}, r"freeze.image_blocks = 1 .* RN50 is no plain transformer .*; allowed is 0"),
        ({"model.patch_dropout": 0.5}, r"model.patch_dropout = 0.5 .* RN50 is no vision transformer .*; allowed is 0"),
    ],
)
def test_a_tower_without_blocks_or_patches_is_refused_what_needs_them(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_towers(on_meta("RN50"), ProjectConfig(clip_model="RN50").with_overrides(settings))


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-sig"])
def test_patch_dropout_shows_fewer_patches_in_training_and_all_in_evaluation(tiny_config: ProjectConfig, name: str) -> None:
    config = replace(tiny_config, clip_model=name)
    network, whole = prepared(config, **{"model.patch_dropout": 0.5}), prepared(config)
    assert network.state_dict().keys() == whole.state_dict().keys()
    lengths = []
    network.visual.transformer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    images_BCHW = torch.randn(4, 3, 32, 32)
    torch.manual_seed(1)
    first_BD = network.encode_image(images_BCHW)
    torch.manual_seed(1)
    assert torch.equal(network.encode_image(images_BCHW), first_BD), "tied to the global generator"
    assert not torch.equal(network.encode_image(images_BCHW), first_BD)
    network.eval(), whole.eval()
    assert torch.equal(network.encode_image(images_BCHW), whole.encode_image(images_BCHW))
    assert lengths == [1 + 8] * 3 + [1 + 16]


def small_timm_network() -> Any:
    """A model built as SigLIP2 is, but small: timm's image tower with attention pooling, no class token."""
    vision = {"image_size": 32, "timm_model_name": "vit_base_patch16_siglip_256", "timm_model_pretrained": False,
              "timm_pool": "map", "timm_proj": "none"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        create = open_clip.timm_model.timm.create_model
        shape = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": 32}
        patch.setattr(open_clip.timm_model.timm, "create_model", lambda *args, **kwargs: create(*args, **kwargs, **shape))
        return open_clip.model.CustomTextCLIP(
            embed_dim=48,
            vision_cfg=vision,
            text_cfg={"context_length": 8, "vocab_size": 50, "width": 48, "heads": 3, "layers": 1},
        ).train()


def test_patch_dropout_on_timms_tower() -> None:
    network = small_timm_network()
    lengths: list[int] = []
    network.visual.trunk.blocks[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    images_BCHW = torch.randn(4, 3, 32, 32)
    keys = network.state_dict().keys()
    before_BD = network.eval().encode_image(images_BCHW)
    prepare_towers(network, ProjectConfig(clip_model="small").with_overrides({"model.patch_dropout": 0.25}))
    assert network.state_dict().keys() == keys
    assert isinstance(network.visual.trunk.patch_drop, PatchDropout)
    assert torch.equal(network.encode_image(images_BCHW), before_BD)
    network.train()
    assert not torch.equal(network.encode_image(images_BCHW), before_BD)
    assert lengths == [16, 16, 12]


def gradients(network: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    images_BCHW, tokens_BL = torch.randn(4, 3, 32, 32), torch.randint(1, 49, (4, network.context_length))
    image_BD, text_BD = network.encode_image(images_BCHW, normalize=True), network.encode_text(tokens_BL, normalize=True)
    (image_BD @ text_BD.T).logsumexp(dim=1).sum().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-sig", "timm"])
def test_gradient_checkpointing_computes_blocks_again_and_gives_the_same_gradients(
    tiny_config: ProjectConfig, name: str
) -> None:
    results, calls = [], []
    for enabled in (False, True):
        config = replace(tiny_config, clip_model=name).with_overrides(
            {"hardware.gradient_checkpointing": enabled, "model.patch_dropout": 0.5}
        )
        torch.manual_seed(0)
        network = small_timm_network() if name == "timm" else load_model(config).network.train()
        prepare_towers(network, config)
        visual, text = network.visual, getattr(network, "text", network)
        blocks = [(visual.trunk.blocks if name == "timm" else visual.transformer.resblocks)[0], text.transformer.resblocks[0]]
        count = [0, 0]
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, number=number, count=count: count.__setitem__(number, count[number] + 1))
        results.append(gradients(network))
        calls.append(count)
    plain, again = results
    assert calls == [[1, 1], [2, 2]]
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[key], again[key]) for key in plain)


@pytest.mark.parametrize(
    ("name", "expected"),
    [*((name, True) for name in ALL), ("RN50", False), ("MobileCLIP2-S0", False), ("convnext_base", False)],
)
def test_vision_transformers_are_told_from_other_image_towers(name: str, expected: bool) -> None:
    assert is_vision_transformer(on_meta(name)) is expected
