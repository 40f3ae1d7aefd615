"""Attention in training against torch's and OpenCLIP's own: the same embeddings to the bit, gradients but for rounding."""

import copy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.models.openclip import export_openclip, load_model
from fashionclip_tune.models.sequences import SelfAttention, use_own_attention
from fashionclip_tune.models.tiny import register_tiny_models
from tests.support.networks import SMALL, built
from tests.support.trainers import batches, steps, trainer_for, weights


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pass_through(network: Any, batch_size: int = 4) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Embeddings and gradients of a loss in which each photo and caption has a part of its own."""
    generator = torch.Generator().manual_seed(1)
    side, length = network.visual.image_size[0], network.context_length
    images_BCHW = torch.randn(batch_size, 3, side, side, generator=generator)
    tokens_BL = torch.randint(1, network.vocab_size, (batch_size, length), generator=generator)
    found = [network.encode_image(images_BCHW, normalize=True), network.encode_text(tokens_BL, normalize=True)]
    network.zero_grad()
    (torch.arange(batch_size**2).view(batch_size, -1) * (found[0] @ found[1].T)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return [embedding.detach() for embedding in found], gradients


def check_alike(network: Any, batch_size: int = 4) -> None:
    before, gradients_before = pass_through(network, batch_size)
    use_own_attention(network)
    after, gradients = pass_through(network, batch_size)
    assert all(map(torch.equal, before, after))
    assert gradients.keys() == gradients_before.keys()
    for name, gradient in gradients.items():
        scale = gradients_before[name].abs().max()
        assert (gradient - gradients_before[name]).abs().max() <= 1e-5 * scale, name


VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {},
    "quickgelu": {"quick_gelu": True},
    "siglip": {"custom_text": True, "text_cfg": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}},
    "cls and padding": {"custom_text": True, "text_cfg": {"embed_cls": True}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_openclips_custom_block_to_the_bit_and_torchs_but_for_sums(variant: str) -> None:
    model_config = copy.deepcopy(SMALL)
    for key, value in VARIANTS[variant].items():
        model_config[key] = {**model_config[key], **value} if isinstance(value, dict) else value
    network, custom = built(model_config), built(model_config, block_type="custom")
    assert [name for name, _ in network.named_parameters()] == [name for name, _ in custom.named_parameters()]
    custom.load_state_dict(network.state_dict())
    check_alike(network)
    ours, theirs = pass_through(network), pass_through(custom)
    assert all(map(torch.equal, ours[0], theirs[0]))
    assert all(torch.equal(ours[1][name], gradient) for name, gradient in theirs[1].items())
    network.set_grad_checkpointing(True)
    again = pass_through(network)[1]
    assert all(torch.equal(ours[1][name], gradient) for name, gradient in again.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP2-256"])
def test_the_published_architectures_compute_the_same(name: str) -> None:
    """SigLIP2's own blocks are its text tower's: the image tower is timm's and small here, the table has fewer rows."""
    model_config = open_clip.get_model_config(name)
    if "timm_model_name" in model_config["vision_cfg"]:
        model_config["vision_cfg"] = SMALL["vision_cfg"]
        model_config["text_cfg"]["vocab_size"] = 1_000
    check_alike(built(model_config))


def test_evaluation_keeps_its_bits_and_other_attention_is_left_alone() -> None:
    model_config = copy.deepcopy(SMALL)
    model_config["vision_cfg"] |= {"attentional_pool": True}
    network = built(model_config)
    own = copy.deepcopy(network)
    use_own_attention(own)
    assert type(own.visual.attn_pool.attn) is nn.MultiheadAttention
    assert sum(isinstance(module, SelfAttention) for module in own.modules()) == 4
    images_BCHW, tokens_BL = torch.randn(3, 3, 32, 32), torch.randint(1, 100, (3, 12))
    network.eval(), own.eval()
    with torch.no_grad():  # torch has a path of its own there
        assert torch.equal(own.encode_image(images_BCHW), network.encode_image(images_BCHW))
        assert torch.equal(own.encode_text(tokens_BL), network.encode_text(tokens_BL))


def test_a_model_that_states_its_blocks_keeps_them() -> None:
    network = built(SMALL, block_type="custom", scale_heads=True)
    before = pass_through(network)
    use_own_attention(network)
    after = pass_through(network)
    assert all(map(torch.equal, before[0], after[0]))
    assert not any(isinstance(module, nn.MultiheadAttention) for module in network.modules())


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-sig"])
def test_what_began_with_torchs_attention_keeps_it_and_no_file_knows_of_the_other(
    tiny_config: ProjectConfig, name: str, tmp_path: Path
) -> None:
    register_tiny_models()
    ends = []
    for edition in (1, 2):
        config = tiny_config.with_overrides({"clip_model": name, "training.edition": edition})
        trainer = trainer_for(config)
        attention = {type(module) for module in trainer.network.modules() if isinstance(module, nn.MultiheadAttention)}
        assert attention == {nn.MultiheadAttention if edition == 1 else SelfAttention}
        steps(trainer, batches(1))
        ends.append(weights(trainer))
    assert list(ends[0]) == list(ends[1])
    loaded = load_model(config)
    loaded.network = trainer.network
    export_openclip(loaded, tmp_path)
    assert "block_type" not in (tmp_path / "open_clip_config.json").read_text()
    assert loaded.model_config == load_model(config).model_config
