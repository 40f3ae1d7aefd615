"""Rates of steps that nobody ran: what is counted against independent counts, and how cards and settings move them."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from fashionclip_tune.machine.gpus import T4, find_gpu
from fashionclip_tune.models.architecture import forward_flops, meta_model
from fashionclip_tune.profiling.roofline import Passes, evaluation_rate, passes_of, training_rate

MODELS = ("ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP2-256")


@cache
def passes(name: str, num_photos: int = 64, frozen: str = "token_embedding") -> Passes:
    network: Any = meta_model(name)
    for path, parameter in network.named_parameters():
        parameter.requires_grad_(frozen not in path)
    return passes_of(network, num_photos, torch.float16)


def total(of: Passes, what: str, kind: str) -> float:
    return float(sum(getattr(operation, what) for operation in of.operations if operation.kind == kind))


@pytest.mark.parametrize("name", MODELS)
def test_what_a_pass_multiplies_is_what_torch_counts(name: str) -> None:
    found = passes(name)
    flops = total(found, "flops", "matmul") + total(found, "flops", "attention")
    assert flops == pytest.approx(64 * forward_flops(name), rel=0.01)
    assert 0 < total(found, "flops", "attention") < 0.06 * flops


def test_traffic_of_activations_follows_the_photos_and_that_of_weights_does_not() -> None:
    small, large = (total(passes("ViT-B-32", size), "num_bytes", "other") for size in (16, 64))
    casts = 6 * passes("ViT-B-32").trained_numbers  # of fp32 weights to halves
    assert large - casts == pytest.approx(4 * (small - casts), rel=0.05)


@pytest.mark.parametrize("name", MODELS)
def test_on_a_t4_the_published_models_are_slower_than_their_products_alone_say(name: str) -> None:
    """At 20 TFLOPS, and nothing but those."""
    rate = training_rate(passes(name), T4, batch_size=64)
    assert 1.2 < 20e12 / (3 * forward_flops(name)) / rate < 1.8
    assert evaluation_rate(passes(name), T4) > 3 * rate


def test_each_term_counts() -> None:
    whole = passes("ViT-B-32")

    def step_s(of: Passes = whole, **settings: Any) -> float:
        return 64 / training_rate(of, **{"gpu": T4, "batch_size": 64, **settings})

    forward_s, quicker, wider = whole.forward_s(T4), replace(T4, tflops=2 * T4.tflops), replace(T4, gb_per_second=640)
    assert step_s() / 2 < step_s(gpu=quicker) < 0.85 * step_s()
    assert step_s() / 2 < step_s(gpu=wider) < 0.85 * step_s()
    assert step_s(gpu=replace(quicker, gb_per_second=640)) == pytest.approx(step_s() / 2)
    assert step_s(gradient_checkpointing=True) == pytest.approx(step_s() + forward_s)
    assert step_s(side_by_side=2) == pytest.approx(2 * step_s())
    # In four cuts each photo passes once more, and the weights three times more.
    assert step_s() + forward_s < step_s(passes("ViT-B-32", 16)) < 1.25 * (step_s() + forward_s)
    average_s = step_s(averages_weights=True) - step_s()
    assert average_s == pytest.approx(12 * whole.trained_numbers / (0.8 * 320e9))
    frozen = step_s(passes("ViT-B-32", frozen="visual."))
    assert forward_s < frozen < step_s() - whole.forward_s(T4)
    assert step_s(gpu=replace(T4, tflops=1e9, gb_per_second=1e9)) > 1e-3  # the host starts kernels one after the other


@pytest.mark.parametrize(
    ("said", "name", "gb_per_second"),
    [
        ("Tesla T4", "T4", 320),
        ("NVIDIA L4", "L4", 300),
        ("NVIDIA A10G", "A10G", 600),
        ("NVIDIA A10", "A10", 600),
        ("NVIDIA A100-SXM4-40GB", "A100", 1555),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB", 2039),
        ("NVIDIA A100 80GB PCIe", "A100 80GB", 1935),
        ("NVIDIA H100 80GB HBM3", "H100", 3350),
        ("NVIDIA H100 PCIe", "H100 PCIe", 2000),
        ("NVIDIA H200", "H200", 4800),
        ("NVIDIA GeForce RTX 3060 Ti", "RTX 3060 Ti", 448),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 1008),
    ],
)
def test_a_card_is_found_by_torchs_name_of_it(said: str, name: str, gb_per_second: float) -> None:
    gpu = find_gpu(said)
    assert gpu is not None
    assert (gpu.name, gpu.gb_per_second) == (name, gb_per_second)


def test_a_card_that_is_not_known_is_taken_for_none_of_those_that_are() -> None:
    for said in ("NVIDIA L40S", "Tesla V100-SXM2-16GB", "NVIDIA A100X", "Quadro T400", "NVIDIA RTX A4000"):
        assert find_gpu(said) is None
    assert [find_gpu(name).with_article for name in ("T4", "L4", "RTX 3060")] == ["a T4", "an L4", "an RTX 3060"]
