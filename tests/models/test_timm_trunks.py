"""Blocks of image towers of timm's that are no plain transformers: places, frozen blocks and rates, against timm's own."""

from typing import Any

import pytest
from timm.optim import param_groups_layer_decay

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.architecture import check_model_options
from fashionclip_tune.models.towers import parameter_groups, parameter_places, prepare_towers
from tests.support.networks import frozen, on_meta

DECAY = 0.75
TRUNKS = ("convnext_base", "swin_base_patch4_window7_224", "MobileCLIP2-S0", "MobileCLIP2-S4")


def rates(network: Any) -> dict[str, float]:
    """The factor on the rate of each parameter that has a gradient."""
    config = ProjectConfig().with_overrides({"training.learning_rate": 1.0, "optimizer.layer_decay": DECAY})
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = parameter_groups(network, config.training, config.optimizer)
    return {names[id(parameter)]: group["peak_rate"] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("name", TRUNKS)
def test_rates_fall_as_timms_own_layer_decay_has_them(name: str) -> None:
    """timm's trunk may end in a block or in a head: with OpenCLIP's head above a block, all of it is one step lower."""
    network = on_meta(name)
    trunk = network.visual.trunk
    names = {id(parameter): f"visual.trunk.{name}" for name, parameter in trunk.named_parameters()}
    theirs = {
        names[id(parameter)]: group["lr_scale"]
        for group in param_groups_layer_decay(trunk, layer_decay=DECAY)
        for parameter in group["params"]
    }
    ours = rates(network)
    ends_in_a_head = any(ours[name] == 1.0 for name in theirs)
    below = 1.0 if ends_in_a_head else DECAY
    assert {name: ours[name] for name in theirs} == pytest.approx({name: below * rate for name, rate in theirs.items()})
    assert all(rate == 1.0 for name, rate in ours.items() if name.startswith("visual.head."))
    assert len(set(theirs.values())) > 10


@pytest.mark.parametrize(
    ("name", "stem", "first", "last", "heads", "blocks"),
    [
        ("convnext_base", "trunk.stem.", "trunk.stages.0.blocks.0.", "trunk.stages.3.blocks.2.", ("trunk.head.", "head."), 36),
        ("MobileCLIP2-S0", "trunk.stem.", "trunk.stages.0.blocks.0.", "trunk.stages.3.blocks.1.",
         ("trunk.final_conv.", "trunk.head."), 20),
        ("EVA02-B-16", "trunk.patch_embed.", "trunk.blocks.0.", "trunk.blocks.11.", ("trunk.norm.", "trunk.head."), 12),
        ("PE-Core-B-16", "trunk.patch_embed.", "trunk.blocks.0.", "trunk.blocks.11.", ("trunk.attn_pool.", "trunk.head."), 12),
    ],
)  # fmt: skip
def test_a_tower_has_a_stem_then_its_blocks_then_its_head(
    name: str, stem: str, first: str, last: str, heads: tuple[str, ...], blocks: int
) -> None:
    places = {
        name.removeprefix("visual."): place for name, place in parameter_places(on_meta(name)).items() if place.tower == "image"
    }
    for depth, prefixes in ((0, (stem,)), (1, (first,)), (blocks, (last,)), (blocks + 1, heads)):
        found = {name: place.depth for name, place in places.items() if name.startswith(prefixes)}
        assert found
        assert set(found.values()) == {depth}, found
    assert {place.num_blocks for place in places.values()} == {blocks}
    assert {place.depth for place in places.values()} == set(range(blocks + 2))


def test_the_first_blocks_are_frozen_and_more_than_there_are_is_refused() -> None:
    config = ProjectConfig(clip_model="MobileCLIP2-S0")
    network = on_meta("MobileCLIP2-S0", force_image_size=256).train()  # one of its own: freezing changes it
    prepare_towers(network, config.with_overrides({"freeze.image_blocks": 2}))
    prefixes = tuple(f"visual.trunk.{part}" for part in ("stem.", "stages.0.blocks.0.", "stages.0.blocks.1."))
    assert frozen(network) == {name for name, _ in network.named_parameters() if name.startswith(prefixes)} != set()
    check_model_options(config.with_overrides({"freeze.image_blocks": 20, "optimizer.layer_decay": DECAY}))
    with pytest.raises(UserError, match=r"freeze\.image_blocks = 21 .* MobileCLIP2-S0 has 20 there; allowed are 0 to 20"):
        check_model_options(config.with_overrides({"freeze.image_blocks": 21}))


def test_updated_statistics_and_micro_batches_are_refused_without_the_weights() -> None:
    cut = {"model.batch_norm": "update", "training.micro_batch_size": 16}
    config = ProjectConfig(clip_model="MobileCLIP2-S0")
    with pytest.raises(UserError, match=r"model\.batch_norm = update .*micro_batch_size = 16: MobileCLIP2-S0 has batch norms"):
        check_model_options(config.with_overrides(cut))
    for allowed in (
        {**cut, "model.batch_norm": "fixed"},
        {**cut, "training.micro_batch_size": 64},
        {**cut, "training.batch_size": 16},
        {**cut, "freeze.image_tower": True},
        {**cut, "clip_model": "ViT-B-32"},
    ):
        check_model_options(config.with_overrides(allowed))
