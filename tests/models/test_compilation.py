"""``hardware.compile``: tracing alone (no code is generated, which would take a minute), names, and the refusal."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.openclip import load_model
from fashionclip_tune.models.sequences import causal_text, use_own_attention
from fashionclip_tune.models.towers import encoders


def test_compiled_encoders_give_the_same_and_leave_the_names_alone(
    tiny_config: ProjectConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or compile_(function, backend="eager"))
    monkeypatch.setenv("CXX", "true")
    network: Any = load_model(tiny_config).network
    names = list(network.state_dict())
    encode_image, encode_text = encoders(network, torch.device("cpu"), compiled=True, text=causal_text(network))
    images_BCHW, tokens_BL = torch.randn(2, 3, 32, 32), torch.randint(1, 40_000, (2, 32))
    torch.testing.assert_close(encode_image(images_BCHW, normalize=True), network.encode_image(images_BCHW, normalize=True))
    tokens_BL[:, 6] = 49407
    for length in (32, 8, 16, 24):
        text_BD = encode_text(tokens_BL[:, :length].contiguous(), normalize=True)
        torch.testing.assert_close(text_BD, network.encode_text(tokens_BL, normalize=True))
    assert list(network.state_dict()) == names
    assert len(compiled) == 2


def test_captions_of_all_lengths_are_few_compilations(tiny_config: ProjectConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=counter))
    monkeypatch.setenv("CXX", "true")
    torch.compiler.reset()
    network: Any = load_model(tiny_config).network.train()
    use_own_attention(network)
    _, encode_text = encoders(network, torch.device("cpu"), compiled=True, text=causal_text(network))
    for length in (24, 8, 16, 32, 8, 24):
        encode_text(torch.randint(1, 40_000, (2, length)), normalize=True).sum().backward()
    assert counter.frame_count <= 3  # the first length, full length, and one for all others


def test_without_a_compiler_it_is_refused_before_anything_is_traced(
    tiny_config: ProjectConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    network = load_model(tiny_config).network
    with pytest.raises(UserError, match=r"^hardware.compile = True is not possible here: there is no C\+\+ compiler"):
        encoders(network, torch.device("cpu"), compiled=True)
    assert encoders(network, torch.device("cpu"), compiled=False) == (network.encode_image, network.encode_text)
