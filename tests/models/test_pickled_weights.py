"""Weights in ``.pt`` files: what the published runs saved is found, and nothing else is believed or executed."""

import os
import tarfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.openclip import load_model
from fashionclip_tune.models.weights import read_pickled_weights
from fashionclip_tune.storage.checkpoint import Checkpoint
from tests.support.networks import scrambled

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "logit_scale": torch.tensor(2.5)}
WRAPPERS = ("", "module.", "_orig_mod.", "module._orig_mod.", "model.", "model._orig_mod.")

SHAPES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "bare": lambda weights: weights,
    "published": lambda weights: {"model_state_dict": weights},
    "with the rest": lambda weights: {
        "epoch": 4,
        "model_state_dict": weights,
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]},
        "loss": 0.25,
        "config": {"batch_size": 64, "name": "ViT-B-32"},
    },
    "open_clip": lambda weights: {"epoch": 4, "name": "run", "state_dict": weights},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_state_dict_is_found_in_what_runs_save(tmp_path: Path, shape: str, wrapper: str) -> None:
    torch.save(SHAPES[shape]({f"{wrapper}{key}": tensor for key, tensor in WEIGHTS.items()}), tmp_path / "model.pt")
    weights = read_pickled_weights(tmp_path / "model.pt")
    assert weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(weights[key], WEIGHTS[key]) for key in WEIGHTS)


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
@pytest.mark.parametrize(
    ("name", "saved", "run"),
    [
        ("tiny-clip", "contrastive", "contrastive"),
        ("tiny-clip", "contrastive", "siglip"),
        ("tiny-clip", "siglip", "siglip"),
        ("tiny-clip", "siglip", "contrastive"),
        ("tiny-sig", "siglip", "siglip"),
    ],
)
def test_a_model_starts_from_them_with_its_scale_and_bias(
    tiny_config: ProjectConfig, tmp_path: Path, name: str, saved: str, run: str, suffix: str
) -> None:
    trained = scrambled(load_model(replace(tiny_config, clip_model=name, loss_function=saved)))
    path = tmp_path / f"model{suffix}"
    torch.save({"model_state_dict": trained.network.state_dict(), "epoch": 1}, path)
    again = load_model(replace(tiny_config, clip_model=name, loss_function=run).with_overrides({"model.pretrained": str(path)}))
    ours, theirs = trained.network.state_dict(), again.network.state_dict()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    if saved != run:
        assert float(theirs["logit_bias"]) == (-10 if saved == "contrastive" else float(ours["logit_bias"]))


def message(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_pickled_weights(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([1, 2], "not list"),
        ({}, "not "),
        ({"epoch": 3, "loss": 0.5}, "not epoch, loss"),
        ({"model_state_dict": {"a": 3}}, "not a"),
        (torch.zeros(3), "not Tensor"),
    ],
)
def test_a_file_without_weights_is_refused_with_what_is_in_it(tmp_path: Path, content: Any, found: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    assert found in message(tmp_path / "model.pt")
    assert "holds no weights" in message(tmp_path / "model.pt")


def test_a_file_cut_short_or_empty_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(WEIGHTS, path)
    whole = path.read_bytes()
    for content in (whole[:-40], whole[:20], b"", b"not a checkpoint"):
        path.write_bytes(content)
        assert "was not loaded" in message(path)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_code_in_a_file_is_not_run(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    path, exploded = tmp_path / "model.pt", tmp_path / "exploded"
    torch.save({"model_state_dict": WEIGHTS, "config": Bomb(exploded)}, path)
    assert "could run code" in message(path)
    with pytest.raises(UserError, match="could run code"):
        load_model(tiny_config.with_overrides({"model.pretrained": str(path)}))
    assert not exploded.exists()
    with suppress(RuntimeError):
        torch.load(path, weights_only=False)
    assert exploded.is_dir(), "the bomb is live"


@pytest.mark.parametrize("form", ["TorchScript", "tar"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_a_form_in_which_an_older_torch_runs_code_is_not_given_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """CVE-2025-32434: up to 2.5.1 weights_only did not hold for these. Today's torch refuses them itself."""
    path = tmp_path / "training_state.pt"
    if form == "tar":
        with tarfile.open(path, "w") as archive:
            archive.add(__file__, "pickle")
    else:
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    monkeypatch.setattr(torch, "load", lambda *args, **how: pytest.fail("it was loaded"))
    assert "it is a TorchScript or tar archive" in message(path)
    with pytest.raises(UserError, match=r"cannot be resumed from: training_state\.pt is not ours \(it is a TorchScript"):
        Checkpoint(tmp_path, {}).training_state()


def test_an_old_file_of_plain_weights_is_read(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_pickled_weights(tmp_path / "model.pt")["a.weight"], WEIGHTS["a.weight"])


def test_weights_of_another_model_are_refused(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    torch.save({"model_state_dict": WEIGHTS}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"tiny-clip in .*model\.pt cannot be loaded: missing are"):
        load_model(tiny_config.with_overrides({"model.pretrained": str(tmp_path / "model.pt")}))


def test_what_does_not_fit_is_said_in_a_line(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    weights = load_model(tiny_config).network.state_dict()
    unfit = {"visual.proj": torch.zeros(3, 3), **{name: weights[name] for name in list(weights)[4:] if name != "visual.proj"}}
    files = {
        "of transformers": {"text_model.embeddings.weight": torch.zeros(2), "vision_model.embeddings.weight": torch.zeros(2)},
        "of another shape": unfit,
    }
    said = {}
    for name, content in files.items():
        torch.save(content, tmp_path / "weights.pt")
        with pytest.raises(UserError) as error:
            load_model(tiny_config.with_overrides({"model.pretrained": str(tmp_path / "weights.pt")}))
        said[name] = str(error.value)
    assert (
        "unknown are 2 tensors, such as text_model.embeddings.weight, vision_model.embeddings.weight" in said["of transformers"]
    )
    assert "are those of transformers: name the folder that has its config.json" in said["of transformers"]
    assert "of another shape are 1 tensors, such as visual.proj (wanted (" in said["of another shape"]
    assert "missing are 4 tensors, such as" in said["of another shape"]
