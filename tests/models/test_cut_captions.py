"""Captions that are cut behind the end of the longest: where it is done, that nothing changes but rounding, how far."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.batches import TrainBatch
from fashionclip_tune.models.architecture import has_known_text_tower, meta_model
from fashionclip_tune.models.openclip import load_model, load_random_model
from fashionclip_tune.models.sequences import causal_text
from fashionclip_tune.models.tiny import register_tiny_models
from tests.support.networks import SMALL, built
from tests.support.trainers import batches, model_config, steps, trainer_for, weights

END = 99  # the highest token of SMALL


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def captions(*lengths: int, context_length: int = 12, end: int = END) -> Tensor:
    """Random tokens, an end token, zeros: ``lengths`` count all but the zeros."""
    tokens_BL = torch.zeros(len(lengths), context_length, dtype=torch.long)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(row)
        tokens_BL[row, :length] = torch.randint(3, end, (length,), generator=generator)
        tokens_BL[row, length - 1] = end
    return tokens_BL


def text_pass(network: Any, encode: Any, tokens_BL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    network.zero_grad()
    text_BD = encode(tokens_BL, normalize=True)
    weights_BD = torch.randn(text_BD.shape, generator=torch.Generator().manual_seed(2))
    (text_BD * weights_BD).sum().backward()
    return text_BD.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def check_alike(network: Any, tokens_BL: Tensor, length: int) -> None:
    text = causal_text(network)
    assert text is not None
    cut_BL = text.cut(tokens_BL)
    assert torch.equal(cut_BL, tokens_BL[:, :length])
    whole_BD, whole = text_pass(network, network.encode_text, tokens_BL)
    found_BD, gradients = text_pass(network, text.encode, cut_BL)
    assert (found_BD - whole_BD).abs().max() <= 1e-6
    assert gradients.keys() == whole.keys()
    for name, gradient in gradients.items():
        assert (gradient - whole[name]).abs().max() <= 1e-5 * whole[name].abs().max(), name


VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {},
    "text tower of its own": {"custom_text": True},
    "end token by number": {"text_cfg": {"pool_type": "eos", "eos_id": 2}},
    "end token by number, tower of its own": {"custom_text": True, "text_cfg": {"pool_type": "eos", "eos_id": 2}},
    "linear projection": {"custom_text": True, "text_cfg": {"proj_bias": True}},
    "a dictionary": {"output_dict": True},
    "scaled heads": {"text_cfg": {"scale_heads": True}},
}


def changed(model_config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(model_config)
    for key, value in changes.items():
        made[key] = {**made[key], **value} if isinstance(value, dict) else value
    made["text_cfg"]["context_length"] = 30
    return made


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_embeddings_and_gradients_are_those_of_whole_captions(variant: str, checkpointing: bool) -> None:
    network = built(changed(SMALL, VARIANTS[variant]))
    if "scaled" not in variant:  # OpenCLIP's custom blocks cannot do so
        network.set_grad_checkpointing(checkpointing)
    end = 2 if "number" in variant else END
    for lengths, expected in (((3, 8, 5), 8), ((3, 9, 5), 16), ((2, 17), 24), ((1,), 8)):
        tokens_BL = captions(*lengths, context_length=30, end=END)
        tokens_BL[tokens_BL == END] = end
        check_alike(network, tokens_BL, expected)
    text = causal_text(network)
    assert text is not None
    for lengths in ((25, 3), (30, 30)):
        tokens_BL = captions(*lengths, context_length=30, end=END)
        tokens_BL[tokens_BL == END] = end
        assert torch.equal(text.cut(tokens_BL), tokens_BL)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16"])
def test_the_published_text_towers_give_the_same(name: str) -> None:
    found = {**open_clip.get_model_config(name), "vision_cfg": SMALL["vision_cfg"]}
    check_alike(built(found), captions(20, 11, 24, 5, context_length=77, end=49407), 24)


def test_of_several_end_tokens_the_first_counts_and_without_one_nothing_is_cut() -> None:
    network = built(changed(SMALL, {"text_cfg": {"pool_type": "eos", "eos_id": 2}}))
    text = causal_text(network)
    assert text is not None
    tokens_BL = captions(5, 6, context_length=30, end=END)
    tokens_BL[tokens_BL == END] = 2
    tokens_BL[0, 25] = 2
    assert text.cut(tokens_BL).shape == (2, 8)
    check_alike(network, tokens_BL, 8)
    tokens_BL[1, 5] = 7
    assert text.cut(tokens_BL).shape == (2, 30)
    highest = causal_text(built(changed(SMALL, {})))
    assert highest is not None
    assert highest.cut(torch.full((2, 30), 5)).shape == (2, 8)


def test_what_comes_behind_the_end_never_counts() -> None:
    network = built(changed(SMALL, {}))
    text = causal_text(network)
    assert text is not None
    tokens_BL = captions(7, 6, context_length=30)
    noise_BL = torch.where(torch.arange(30) >= 7, torch.randint(1, END, (2, 30)), tokens_BL)
    assert torch.equal(text.encode(text.cut(noise_BL), normalize=True), text.encode(text.cut(tokens_BL), normalize=True))


NOT_CUT: dict[str, dict[str, Any]] = {
    "looks ahead": {"text_cfg": {"no_causal_mask": True}},
    "looks ahead, tower of its own": {"custom_text": True, "text_cfg": {"no_causal_mask": True}},
    "pools its last token": {"text_cfg": {"pool_type": "last"}},
    "pools its first token": {"custom_text": True, "text_cfg": {"pool_type": "first"}},
    "appends a token": {"custom_text": True, "text_cfg": {"embed_cls": True}},
}


@pytest.mark.parametrize("variant", NOT_CUT)
def test_other_text_towers_take_whole_captions(variant: str) -> None:
    assert causal_text(built(changed(SMALL, NOT_CUT[variant]))) is None


@pytest.mark.slow
def test_of_openclips_architectures_those_that_see_back_and_pool_the_end_are_cut() -> None:
    """On the meta device, smallest of each kind: as their descriptions say."""
    kinds: dict[tuple[Any, ...], str] = {}
    for name in open_clip.list_models():
        found = open_clip.get_model_config(name)
        text = found["text_cfg"]
        if has_known_text_tower(found):
            said = [text.get("pool_type", "argmax"), text.get("no_causal_mask", False), text.get("embed_cls", False)]
            kinds.setdefault((*said, "custom_text" in found, "multimodal_cfg" in found, text.get("eos_id")), name)
    assert len(kinds) >= 8
    for (pool_type, looks_ahead, appends, *_), name in kinds.items():
        expected = pool_type in ("argmax", "eos") and not looks_ahead and not appends
        assert (causal_text(meta_model(name)) is not None) == expected, name


def of_lengths(batch: TrainBatch, *lengths: int) -> TrainBatch:
    return replace(batch, tokens_BL=captions(*lengths, context_length=32, end=49407))


@pytest.mark.parametrize("loss", ["contrastive", "siglip"])
def test_a_batch_has_one_length_however_it_is_cut(tiny_config: ProjectConfig, loss: str) -> None:
    """The longest caption is in the last micro-batch; and the losses are those of whole captions."""
    given = [of_lengths(batch, 5, 6, 7, 8, 9, 12) for batch in batches(3)]
    given[1] = of_lengths(given[1], 5, 6, 7, 3, 4, 8)
    config = model_config(tiny_config, "tiny-clip", loss, **{"training.epsilon": 1e-4})
    losses, ends = [], []
    for edition, micro_batch_size in ((2, 2), (2, 6), (1, 6)):
        settings = {"training.edition": edition, "training.micro_batch_size": micro_batch_size}
        trainer, seen = trainer_for(config.with_overrides(settings)), list[tuple[int, ...]]()
        encode = trainer._encode_text
        trainer._encode_text = lambda tokens_BL, *, encode=encode, seen=seen, **how: (
            seen.append(tuple(tokens_BL.shape)) or encode(tokens_BL, **how)
        )
        losses.append(steps(trainer, given).loss)
        ends.append(weights(trainer))
        lengths = [16, 8, 16] if edition == 2 else [32] * 3
        assert seen == [(micro_batch_size, length) for length in lengths for _ in range(6 if micro_batch_size == 2 else 1)]
    assert losses[:2] == pytest.approx([losses[2]] * 2, rel=1e-5)
    assert all(torch.allclose(end[key], ends[2][key], atol=1e-5) for end in ends for key in end)


def test_captions_that_differ_behind_the_cut_of_others_are_still_told_apart(tiny_config: ProjectConfig) -> None:
    """Which captions are equal is found out before they are cut."""
    (batch,) = batches(1)
    tokens_BL = captions(5, 5, 5, 5, 5, 5, context_length=32, end=49407)
    tokens_BL[1:, 10] = torch.arange(1, 6)  # an odd tokenizer's padding: no longest caption is above 8
    config = model_config(tiny_config, "tiny-clip", "contrastive", **{"loss.positives": "all"})
    whole = steps(trainer_for(config.with_overrides({"training.edition": 1})), [replace(batch, tokens_BL=tokens_BL)]).loss
    assert steps(trainer_for(config), [replace(batch, tokens_BL=tokens_BL)]).loss == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("edition", [1, 2])
def test_a_state_continues_bit_for_bit_with_captions_of_changing_length(tiny_config: ProjectConfig, edition: int) -> None:
    given = [of_lengths(batch, *[3 + 5 * number] * 6) for number, batch in enumerate(batches(5))]
    config = tiny_config.with_overrides({"training.edition": edition, "training.micro_batch_size": 4})
    whole = trainer_for(config)
    steps(whole, given[:2])
    resumed = trainer_for(config)
    resumed.network.load_state_dict(weights(whole))
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert steps(whole, given[2:]).loss == steps(resumed, given[2:]).loss
    after, expected = weights(resumed), weights(whole)
    assert all(torch.equal(after[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_the_text_tower_of_a_published_model_continues_bit_for_bit(tiny_config: ProjectConfig) -> None:
    """ViT-B-32's, beside an image tower that is frozen; captions are cut to 8, 16 and 24 tokens."""
    settings = {"clip_model": "ViT-B-32", "freeze.image_tower": True, "training.batch_size": 2, "training.micro_batch_size": 1}
    config = tiny_config.with_overrides(settings)
    photos = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    given = [
        TrainBatch(photos, captions(length, 4, context_length=77, end=49407), torch.arange(2), ("a", "b"), ())
        for length in (6, 12, 20)
    ]
    whole, resumed = trainer_for(config), trainer_for(config)
    text = causal_text(whole.network)
    assert text is not None
    assert [text.cut(batch.tokens_BL).shape[1] for batch in given] == [8, 16, 24]
    steps(whole, given[:1])
    resumed.network.load_state_dict(weights(whole))
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert steps(whole, given[1:]).loss == steps(resumed, given[1:]).loss
    after, expected = weights(resumed), weights(whole)
    assert all(torch.equal(after[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-sig"])
def test_measuring_takes_captions_of_full_length(tiny_config: ProjectConfig, name: str) -> None:
    register_tiny_models()
    loaded = load_random_model(tiny_config.with_overrides({"clip_model": name}))
    tokens_BL, text = loaded.tokenizer(["a", "b"]), causal_text(loaded.network)
    assert (text is None) == (name == "tiny-sig")
    assert tokens_BL.shape == (2, 32)
    assert text is None or text.cut(tokens_BL).shape == (2, 32)


def test_evaluation_takes_whole_captions(tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fashionclip_tune import train

    loaded, seen = load_model(tiny_config), set()
    encode_text = type(loaded.network).encode_text

    def encode(self: Any, tokens_BL: Tensor, normalize: bool = False) -> Tensor:
        if not self.training:
            seen.add(tokens_BL.shape[1])
        return encode_text(self, tokens_BL, normalize)

    monkeypatch.setattr(type(loaded.network), "encode_text", encode)
    train(tiny_config.with_overrides({"training.budget_examples": 32}), tmp_path / "run")
    assert seen == {32}
