"""``export``: what is written is loaded by OpenCLIP, or by transformers, as the model itself."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from fashionclip_tune.cli.main import main
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.models.named_model import named_model
from fashionclip_tune.models.openclip import LoadedModel
from fashionclip_tune.models.transformers_format import describe_transformers
from fashionclip_tune.models.transformers_weights import to_openclip
from fashionclip_tune.training.train import train

SETTINGS = {
    "clip_model": "tiny-clip",
    "model.pretrained": None,
    "training.batch_size": 16,
    "training.num_workers": 0,
    "training.learning_rate": 1e-3,
    "training.max_steps": 2,
    "hardware.threads": 1,
}


@pytest.fixture(scope="module")
def runs(garments: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A short run of each tiny tower, and one of ``tiny-clip`` with the sigmoid loss. Do not change them."""
    folder = tmp_path_factory.mktemp("runs")
    base = ProjectConfig(dataset_root=garments, device="cpu").with_overrides(SETTINGS)
    more = {"tiny-clip": {}, "tiny-sig": {"clip_model": "tiny-sig"}, "siglip loss": {"loss_function": "siglip"}}
    for name, settings in more.items():
        train(base.with_overrides(settings), folder / name)
    return {name: folder / name for name in more}


def model(run: Path) -> LoadedModel:
    return named_model(str(run), ProjectConfig()).loaded


def encoded(network: Any, size: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    images_BCHW = torch.randn(3, 3, size, size, generator=generator)
    tokens_BL = open_clip.get_tokenizer("tiny-clip")(["a red dress", "shoes", "a shirt with blue dots"])
    with torch.inference_mode():
        if hasattr(network, "encode_image"):
            return [network.encode_image(images_BCHW, normalize=True), network.encode_text(tokens_BL, normalize=True)]
        found = network(input_ids=tokens_BL, pixel_values=images_BCHW)
        return [found.image_embeds, found.text_embeds]


def test_a_runs_folder_is_loaded_by_openclip_as_the_runs_model_bit_for_bit(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, run in runs.items():
        out = tmp_path / name
        main(["export", str(run), "--to", str(out)])
        assert f"open_clip.create_model_and_transforms('local-dir:{out}')" in capsys.readouterr().out
        network, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}")
        loaded = model(run)
        state = loaded.network.state_dict()
        assert network.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())
        assert all(map(torch.equal, encoded(network.eval()), encoded(loaded.network.eval())))
        assert tuple(transform.transforms[-1].mean) == loaded.preprocessing.mean


def test_a_sweeps_best_is_exported(small_sweep: Path, tmp_path: Path) -> None:
    import shutil

    (run,) = small_sweep.glob("trials/0000-*")
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    shutil.copy(small_sweep / "sweep.json", sweep)
    main(["export", str(run), "--to", str(sweep / "best")])
    main(["export", str(sweep), "--to", str(tmp_path / "out")])
    names = ("open_clip_model.safetensors", "open_clip_config.json")
    assert all((tmp_path / "out" / name).read_bytes() == (sweep / "best" / name).read_bytes() for name in names)


def test_transformers_loads_a_runs_folder_as_the_same_model_which_comes_back_bit_by_bit(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoProcessor, CLIPModel

    for name in ("tiny-clip", "siglip loss"):
        out, loaded = tmp_path / name, model(runs[name])
        capsys.readouterr()
        main(["export", str(runs[name]), "--to", str(out), "--transformers"])
        said = capsys.readouterr().out
        assert f"transformers.CLIPModel.from_pretrained('{out}')" in said
        assert ("logit bias" in said) is (name == "siglip loss")
        theirs = CLIPModel.from_pretrained(out).eval()
        for one, other in zip(encoded(theirs), encoded(loaded.network.eval()), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        assert AutoProcessor.from_pretrained(out)(text="a red dress").input_ids[0] == 49406
        start = describe_transformers(out)
        assert start.architecture == "tiny-clip"
        assert start.preprocessing["resize_mode"] == "squash"
        network = open_clip.create_model("tiny-clip", load_weights=False)
        back = to_openclip(load_file(out / "model.safetensors"), network)
        assert all(torch.equal(tensor, loaded.network.state_dict()[key]) for key, tensor in back.items())


def test_quick_gelu_is_kept(tmp_path: Path) -> None:
    """Of a folder of random weights: a converted start of FashionCLIP is such a one."""
    main(["export", "tiny-clip", "--to", str(tmp_path / "plain"), "--set", "model.pretrained=none"])
    config = tmp_path / "plain" / "open_clip_config.json"
    described = json.loads(config.read_text())
    described["model_cfg"]["quick_gelu"] = True
    config.write_text(json.dumps(described))
    main(["export", f"local-dir:{tmp_path / 'plain'}", "--to", str(tmp_path / "out"), "--transformers"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vision_config"]["hidden_act"] == "quick_gelu"
    assert describe_transformers(tmp_path / "out").model_config["quick_gelu"] is True


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["export", *map(str, arguments)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_model_without_a_counterpart_is_refused_with_the_reason_and_leaves_nothing(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, runs["tiny-sig"], "--to", tmp_path / "deep" / "out", "--transformers")
    assert "pool_type = 'avg'" in line
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_folder_with_something_in_it_is_not_touched(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert "empty" in refused(capsys, runs["tiny-clip"], "--to", tmp_path)
    assert "empty" in refused(capsys, runs["tiny-clip"], "--to", tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "new").mkdir()
    main(["export", str(runs["tiny-clip"]), "--to", str(tmp_path / "new")])
    assert (tmp_path / "new" / "open_clip_config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new"]


def test_a_write_that_fails_leaves_nothing_half_written(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fashionclip_tune.models.transformers_export.give_usual_mode", full)
    line = refused(capsys, runs["tiny-clip"], "--to", tmp_path / "out", "--transformers")
    assert "No space left on device" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["no/such/folder", "ViT-B-33"])
def test_what_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert name in refused(capsys, name, "--to", tmp_path / "out")
    assert not (tmp_path / "out").exists()
