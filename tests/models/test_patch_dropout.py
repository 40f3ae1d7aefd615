"""Patch dropout: what OpenCLIP's and timm's do, with draws that do not depend on the micro-batch."""

from typing import Any

import pytest
import torch
from open_clip.transformer import PatchDropout as OpenClipPatchDropout
from timm.layers.patch_dropout import PatchDropout as TimmPatchDropout
from torch import nn

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.models.openclip import load_model
from fashionclip_tune.models.sequences import SharedPatchDropout, share_patch_draws, tied_to_micro_batch
from fashionclip_tune.training.trainer import Trainer
from tests.support.trainers import CPU, batches, steps, trainer_for, weights


def network_with(dropout: nn.Module) -> Any:
    network = nn.Module()
    network.trunk = nn.Sequential(nn.Identity(), dropout)
    return network


# Patch p of photo b is 100 b + p, so that what comes out says where it is from; a prefix is negative.
def numbered(batch_size: int, num_patches: int, num_prefix: int) -> torch.Tensor:
    patches_BL = 100 * torch.arange(batch_size)[:, None] + torch.arange(num_patches)
    prefix_BL = -1 - torch.arange(num_prefix).expand(batch_size, -1)
    return torch.cat([prefix_BL, patches_BL], dim=1)[:, :, None].expand(-1, -1, 3).float()


DROPOUTS = {
    "open_clip": (lambda prob: OpenClipPatchDropout(prob), 1),
    "open_clip without a class token": (lambda prob: OpenClipPatchDropout(prob, exclude_first_token=False), 0),
    "timm": (lambda prob: TimmPatchDropout(prob, num_prefix_tokens=2), 2),
    "timm without a class token": (lambda prob: TimmPatchDropout(prob, num_prefix_tokens=0), 0),
}


@pytest.mark.parametrize("prob", [0.3, 0.5, 0.99])
@pytest.mark.parametrize("kind", DROPOUTS)
def test_as_many_patches_are_kept_as_the_original_keeps_and_the_prefix_always(kind: str, prob: float) -> None:
    make, num_prefix = DROPOUTS[kind]
    network = network_with(make(prob))
    draws = share_patch_draws(network)
    draws.begin_step(seed=1, batch_size=5)
    draws.choose(slice(0, 5))
    x_BLD = numbered(5, 20, num_prefix)
    ours_BLD = network.trunk(x_BLD)
    assert ours_BLD.shape == make(prob)(x_BLD).shape
    for photo, kept_LD in enumerate(ours_BLD):
        assert torch.equal(kept_LD[:num_prefix], x_BLD[photo, :num_prefix])
        patches = kept_LD[num_prefix:, 0].tolist()
        assert len(set(patches)) == len(patches)
        assert all(100 * photo <= patch < 100 * photo + 20 for patch in patches)


def test_draws_are_those_of_the_effective_batch_however_it_is_cut() -> None:
    network = network_with(TimmPatchDropout(0.5))
    draws = share_patch_draws(network)
    x_BLD = numbered(7, 30, 1)

    def cut(*sizes: int) -> torch.Tensor:
        draws.begin_step(seed=4, batch_size=7)
        parts, start = [], 0
        for size in sizes:
            rows = slice(start, start + size)
            draws.choose(rows)
            torch.rand(size)  # the global generator has nothing to do with it
            parts.append(network.trunk(x_BLD[rows]))
            start += size
        return torch.cat(parts)

    whole = cut(7)
    assert all(torch.equal(cut(*sizes), whole) for sizes in ((3, 4), (2, 2, 2, 1), (1,) * 7))
    draws.begin_step(seed=5, batch_size=7)
    draws.choose(slice(0, 7))
    assert not torch.equal(network.trunk(x_BLD), whole)
    kept = (whole[:, 1:, 0] % 100).sort(dim=1).values
    assert len({tuple(row.tolist()) for row in kept}) == 7, "each photo has draws of its own"


@pytest.mark.parametrize("kind", DROPOUTS)
def test_patches_and_gradients_are_those_of_gather_to_the_bit(kind: str) -> None:
    """By which they were taken before: what was begun then goes on with the same numbers."""
    make, num_prefix = DROPOUTS[kind]
    network = network_with(make(0.6))
    draws = share_patch_draws(network)
    draws.begin_step(seed=1, batch_size=5)
    draws.choose(slice(0, 5))
    x_BLD = torch.randn(5, 20 + num_prefix, 3, requires_grad=True)
    kept_BK = torch.rand(5, 20, generator=torch.Generator().manual_seed(1)).topk(8, dim=1).indices
    gathered_BKD = x_BLD[:, num_prefix:].gather(1, kept_BK[:, :, None].expand(-1, -1, 3))
    gathered_BKD = torch.cat([x_BLD[:, :num_prefix], gathered_BKD], dim=1)
    found_BKD = network.trunk(x_BLD)
    assert torch.equal(found_BKD, gathered_BKD)
    weights_BKD = torch.randn_like(found_BKD)
    found, gathered = (torch.autograd.grad((each * weights_BKD).sum(), x_BLD)[0] for each in (found_BKD, gathered_BKD))
    assert torch.equal(found, gathered)


def test_every_patch_is_kept_as_often_as_any_other() -> None:
    network = network_with(OpenClipPatchDropout(0.5))
    draws = share_patch_draws(network)
    draws.begin_step(seed=0, batch_size=4000)
    draws.choose(slice(0, 4000))
    kept = network.trunk(numbered(4000, 10, 1))[:, 1:, 0] - 100 * torch.arange(4000)[:, None]
    counts = torch.bincount(kept.long().flatten(), minlength=10)
    assert counts.sum() == 20_000
    assert (counts - 2000).abs().max() < 150  # 4.7 standard deviations


def test_in_evaluation_nothing_is_dropped_and_the_weights_are_named_as_before() -> None:
    network = network_with(TimmPatchDropout(0.5))
    network.trunk[0] = nn.Linear(3, 3)
    names = list(network.state_dict())
    share_patch_draws(network)
    assert isinstance(network.trunk[1], SharedPatchDropout)
    assert list(network.state_dict()) == names
    network.eval()
    x_BLD = numbered(2, 5, 1)
    assert torch.equal(network.trunk[1](x_BLD), x_BLD)


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-sig"])
def test_training_with_patch_dropout_does_not_depend_on_the_micro_batch(tiny_config: ProjectConfig, name: str) -> None:
    """A quarter of the patches in another micro-batch would change the loss in the second decimal."""
    torch.set_num_threads(1)
    config = tiny_config.with_overrides({"clip_model": name, "training.epsilon": 1e-4})
    losses, ends = [], []
    for micro_batch_size in (6, 4, 1):
        changed = config.with_overrides({"training.batch_size": 16, "training.micro_batch_size": micro_batch_size})
        loaded = load_model(changed)
        loaded.network.visual.patch_dropout = OpenClipPatchDropout(0.75, exclude_first_token=name == "tiny-clip")
        trainer = Trainer(loaded, changed, 8, CPU)
        losses.append(steps(trainer, batches(3)).loss)
        ends.append(weights(trainer))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    for end in ends[1:]:
        assert all(torch.allclose(end[key], ends[0][key], atol=1e-5) for key in end)
    without = trainer_for(config)
    assert abs(steps(without, batches(3)).loss - losses[0]) > 1e-4


def test_what_depends_on_the_micro_batch_is_named() -> None:
    network = nn.ModuleDict(
        {
            "dropout": nn.Dropout(0.1),
            "none": nn.Dropout(0.0),
            "attention": nn.MultiheadAttention(4, 2, dropout=0.2),
            "layer_norm": nn.LayerNorm(3),
            "patches": TimmPatchDropout(0.5),
        }
    )
    assert tied_to_micro_batch(network) == ["dropout", "attention"]
