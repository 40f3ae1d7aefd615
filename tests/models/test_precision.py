from dataclasses import replace

import pytest
import torch

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.precision import PrecisionPlan, choose_device, plan_precision


@pytest.mark.parametrize(
    ("precision", "dtype", "scaler"),
    [
        ("auto", None, False),
        ("fp32", None, False),
        ("bf16", torch.bfloat16, False),
        ("fp16", torch.float16, True),
    ],
)
def test_on_a_cpu(tiny_config: ProjectConfig, precision: str, dtype: torch.dtype | None, scaler: bool) -> None:
    plan = plan_precision(tiny_config.with_overrides({"hardware.precision": precision}))
    assert plan == PrecisionPlan(torch.device("cpu"), dtype)
    assert plan.needs_grad_scaler is scaler
    with plan.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype is (dtype or torch.float32)
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


@pytest.mark.parametrize(("in_hardware", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_on_a_gpu_bf16_only_where_the_hardware_has_it(
    tiny_config: ProjectConfig, monkeypatch: pytest.MonkeyPatch, in_hardware: bool, dtype: torch.dtype
) -> None:
    """No GPU is at hand: torch's answers are put in its mouth. With emulation it says yes on a T4 as well."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or in_hardware)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    for device in ("auto", "cuda"):  # with its number: without one torch's allocator refuses to be capped, among others
        assert plan_precision(replace(tiny_config, device=device)) == PrecisionPlan(torch.device("cuda:2"), dtype)
    assert plan_precision(replace(tiny_config, device="cpu")).autocast_dtype is None
    assert choose_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused_and_auto_takes_the_cpu(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"(?s){device}.*--device cpu"):
        choose_device(device)
    assert choose_device("auto") == torch.device("cpu")
