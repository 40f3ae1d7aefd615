"""However a model is named, what is in memory is what its file holds, and photos are prepared as these weights want it."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.preprocessing import Preprocessing
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.architecture import meta_model
from fashionclip_tune.models.hub import tokenizer_folder
from fashionclip_tune.models.named_model import loading_call, named_model, settled
from fashionclip_tune.models.openclip import export_openclip, fetch_weights, load_model, load_random_model
from fashionclip_tune.models.start_facts import start_facts
from fashionclip_tune.models.starts import find_start
from fashionclip_tune.models.weights import put_weights, read_weights
from fashionclip_tune.storage.checkpoint import newest_weights
from fashionclip_tune.training.callbacks import TrainResult
from fashionclip_tune.training.train import train
from tests.support.transformers_models import WORDS, save_word_tokenizer

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
PREPARED = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "resize_mode": "squash", "interpolation": "bilinear"}


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def of(config: ProjectConfig, name: object, pretrained: object = "default") -> ProjectConfig:
    return config.with_overrides({"clip_model": str(name), "model.pretrained": pretrained and str(pretrained)})


def unlisted(folder: Path) -> Path:
    """An OpenCLIP folder of an architecture that OpenCLIP does not list."""
    from fashionclip_tune.models.tiny import register_tiny_models

    register_tiny_models()
    described = open_clip.get_model_config("tiny-clip")
    described["vision_cfg"]["layers"] = 1
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps({"model_cfg": described, "preprocess_cfg": PREPARED}))
    torch.manual_seed(11)
    network = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False)
    save_file({key: tensor.clone() for key, tensor in network.state_dict().items()}, folder / WEIGHTS)
    return folder


@pytest.fixture
def start(tmp_path: Path) -> Path:
    return unlisted(tmp_path / "start")


@pytest.fixture(scope="module")
def trained(garments: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    """The folder that a run started from, and the run. Do not change them."""
    place = tmp_path_factory.mktemp("unlisted")
    folder = unlisted(place / "start")
    config = ProjectConfig(clip_model=f"local-dir:{folder}", dataset_root=garments, device="cpu").with_overrides(
        {
            "training.batch_size": 16,
            "training.num_workers": 0,
            "training.learning_rate": 1e-3,
            "training.max_steps": 6,
            "hardware.threads": 1,
        }
    )
    return folder, train(config, place / "run")


def assert_same(network: nn.Module, file: Path) -> None:
    ours, theirs = network.state_dict(), read_weights(file)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_every_way_to_name_a_model_loads_its_own_weights(
    tiny_config: ProjectConfig, trained: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    start, run = trained
    weights = run.checkpoint / "model.safetensors"
    assert_same(load_model(of(tiny_config, f"local-dir:{start}")).network, start / WEIGHTS)
    assert_same(load_model(of(tiny_config, f"local-dir:{start}", start)).network, start / WEIGHTS)
    assert_same(load_model(of(tiny_config, f"local-dir:{start}", weights)).network, weights)
    torch.save(read_weights(weights), tmp_path / "weights.pt")
    assert_same(load_model(of(tiny_config, f"local-dir:{start}", tmp_path / "weights.pt")).network, weights)
    for model in (start, f"local-dir:{start}"):
        found = named_model(str(model), ProjectConfig())
        assert_same(found.loaded.network, start / WEIGHTS)
        assert found.loaded.preprocessing.mean == (0.4, 0.5, 0.6)
    for model in (run.out_dir, run.checkpoint, weights):
        found = named_model(str(model), ProjectConfig())
        assert_same(found.loaded.network, weights)
        assert found.started_from is not None
        assert found.started_from.model_name == f"local-dir:{start}"

    exported = load_model(of(tiny_config, f"local-dir:{start}", weights))
    export_openclip(exported, tmp_path / "sweep" / "best")
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    for model in (tmp_path / "sweep", tmp_path / "sweep" / "best", f"local-dir:{tmp_path / 'sweep' / 'best'}"):
        loaded = named_model(str(model), ProjectConfig()).loaded
        assert_same(loaded.network, weights)
        assert loaded.preprocessing == Preprocessing(32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "squash", "bilinear")
        assert loaded.clamps_logit_scale


def test_random_weights_are_random_under_the_name_of_a_folder_too(tiny_config: ProjectConfig, start: Path) -> None:
    stored = load_file(start / WEIGHTS)["text_projection"]
    config = of(tiny_config, f"local-dir:{start}", None)
    for load in (load_model, load_random_model):
        loaded = load(config)
        assert not torch.equal(loaded.network.state_dict()["text_projection"], stored)
        assert loaded.preprocessing.mean == (0.4, 0.5, 0.6)


def test_a_folder_by_a_relative_path_is_recorded_by_where_it_is(
    tiny_config: ProjectConfig, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside").mkdir()
    monkeypatch.chdir(tmp_path / "beside")
    config = of(tiny_config, "local-dir:../start")
    assert config.to_dict()["clip_model"] == f"local-dir:{start.resolve()}" == config.model_name
    monkeypatch.chdir("/")
    assert_same(load_model(ProjectConfig.from_dict(config.to_dict())).network, start / WEIGHTS)


def test_a_model_on_the_hub_loads_from_the_hubs_cache(
    tiny_config: ProjectConfig, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config = of(tiny_config, "hf-hub:owner/name")
    for load in (load_model, fetch_weights, lambda config: named_model("hf-hub:owner/name", config)):
        said = message(lambda load=load: load(config))
        assert "hf-hub:owner/name" in said
        assert "local-dir:FOLDER" in said
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(start, repository / "snapshots" / ("0" * 40))
    fetch_weights(config)
    for loaded in (load_model(config), named_model("hf-hub:owner/name", tiny_config).loaded):
        assert_same(loaded.network, start / WEIGHTS)
        assert loaded.preprocessing.mean == (0.4, 0.5, 0.6)
    other = {key: tensor + 1 for key, tensor in load_file(start / WEIGHTS).items()}
    save_file(other, tmp_path / "other.safetensors")
    again = load_model(of(tiny_config, "hf-hub:owner/name", tmp_path / "other.safetensors"))
    assert_same(again.network, tmp_path / "other.safetensors")


def test_a_file_that_was_written_anew_is_read_anew(tiny_config: ProjectConfig, start: Path) -> None:
    config = of(tiny_config, f"local-dir:{start}")
    first = load_model(config)
    later = {key: tensor + 1 for key, tensor in load_file(start / WEIGHTS).items()}
    save_file(later, start / WEIGHTS)
    second = load_model(config)
    assert_same(second.network, start / WEIGHTS)
    assert first.weights_fingerprint != second.weights_fingerprint
    described = json.loads((start / CONFIG).read_text())
    described["preprocess_cfg"]["mean"] = [0.1, 0.1, 0.1]
    (start / CONFIG).write_text(json.dumps(described))
    assert load_model(config).preprocessing.mean == (0.1, 0.1, 0.1)


class Altered(nn.Linear):
    """Changes what it has loaded, as a library's hook may."""

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        result = super().load_state_dict(*args, **options)
        with torch.no_grad():
            self.weight[1, 1] += 1e-3
        return result


def test_weights_that_are_not_what_the_file_holds_are_an_error() -> None:
    weights = {"weight": torch.tensor([[1.0, -0.0], [torch.nan, 4]]), "bias": torch.zeros(2, dtype=torch.float16)}
    put_weights(nn.Linear(2, 2), weights, "here")
    assert "1 tensors differ, such as weight" in message(lambda: put_weights(Altered(2, 2), weights, "here"))


def test_a_checkpoint_whose_weights_are_not_those_it_lists_is_refused(
    trained: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    folder = shutil.copytree(trained[1].checkpoint, tmp_path / "step")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "logit_scale": weights["logit_scale"] + 1}, folder / "model.safetensors")
    assert "damaged" in message(lambda: named_model(str(folder), ProjectConfig()))


def test_weights_in_the_forms_that_openclip_converts_are_converted(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    ours = load_model(of(tiny_config, "tiny-sig", None)).network.state_dict()
    older = {key.removeprefix("text."): tensor for key, tensor in ours.items() if key != "logit_bias"}
    older["logit_scale"] = older["logit_scale"].reshape(1)
    for suffix in ("safetensors", "pt"):
        path = tmp_path / f"older.{suffix}"
        save_file(older, path) if suffix == "safetensors" else torch.save(older, path)
        loaded = load_model(of(tiny_config, "tiny-sig", path)).network
        theirs = open_clip.create_model("tiny-sig", str(path), pretrained_text=False).state_dict()
        state = loaded.state_dict()
        assert all(torch.equal(state[key], theirs[key]) for key in theirs)
        assert float(state["logit_bias"]) == 0


def test_a_folder_with_several_weights_files_of_no_known_name_is_refused(tiny_config: ProjectConfig, start: Path) -> None:
    (start / WEIGHTS).rename(start / "one.safetensors")
    load_model(of(tiny_config, f"local-dir:{start}"))
    shutil.copy(start / "one.safetensors", start / "two.safetensors")
    assert "one.safetensors, two.safetensors" in message(lambda: load_model(of(tiny_config, f"local-dir:{start}")))


@pytest.mark.parametrize("name", ["local-dir:", "hf-hub:", ""])
def test_a_name_without_a_name_is_refused(name: str) -> None:
    assert "clip_model" in message(lambda: ProjectConfig(clip_model=name))


NO_TOWERS = {"model_cfg": {"embed_dim": 3, "vision_cfg": 1, "text_cfg": {}}}


@pytest.mark.parametrize("content", [None, "[]", "{}", '{"model_cfg": {"embed_dim": 3}}', json.dumps(NO_TOWERS)])
def test_a_name_of_a_folder_that_is_none_is_refused(tiny_config: ProjectConfig, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / CONFIG).write_text(content)
    said = message(lambda: load_model(of(tiny_config, f"local-dir:{tmp_path}")))
    assert ("is no model" if content is None else "is no OpenCLIP folder") in said


# How photos are prepared for a weights file.


def published(name: str) -> list[dict[str, Any]]:
    keys = PREPARED.keys()
    found = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    return [{key: list(known[key]) if key in ("mean", "std") else known[key] for key in keys} for known in found]


@pytest.mark.parametrize("name", open_clip.list_models())
def test_a_weights_file_is_fed_as_all_published_weights_of_its_architecture_or_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "weights.safetensors"
    file.touch()
    if name.startswith("tiny-"):
        return
    wanted = published(name)
    if wanted and all(each == wanted[0] for each in wanted):
        assert find_start(name, str(file)).preprocessing == wanted[0]
        return
    said = message(lambda: find_start(name, str(file)))
    assert all(tag in said for tag in open_clip.list_pretrained_tags_by_model(name))
    assert str(file) in said
    assert str(tmp_path / CONFIG) in said
    assert find_start(name, None) is not None, "with random weights, any will do"
    (tmp_path / CONFIG).write_text(json.dumps({"preprocess_cfg": PREPARED}))  # as the message says
    assert find_start(name, str(file)).preprocessing == PREPARED


def test_what_is_said_beside_a_file_counts_where_it_is_of_the_same_architecture(
    tiny_config: ProjectConfig, tmp_path: Path
) -> None:
    loaded = load_model(of(tiny_config, "tiny-clip", None))
    loaded.preprocessing = replace(loaded.preprocessing, mean=(0.4, 0.5, 0.6))
    export_openclip(loaded, tmp_path)
    assert load_model(of(tiny_config, "tiny-clip", tmp_path / WEIGHTS)).preprocessing.mean == (0.4, 0.5, 0.6)


# What has no shape, or has the same one, is not found by loading.
OF_ANOTHER = {
    "vision_cfg.layers": 9,
    "vision_cfg.head_width": 8,
    "text_cfg.heads": 2,
    "text_cfg.no_causal_mask": True,
    "text_cfg.pool_type": "last",
    "vision_cfg.pool_type": "avg",
    "vision_cfg.act_kwargs": {"approximate": "tanh"},
    "vision_cfg.image_size": 64,
    "text_cfg.context_length": 16,
    "text_cfg.hf_tokenizer_name": "of/somebody",
    "text_cfg.tokenizer_kwargs": {"clean": "lower"},
}


@pytest.mark.parametrize(("path", "value"), OF_ANOTHER.items())
@pytest.mark.parametrize("is_ours", [False, True])
def test_a_file_beside_the_description_or_record_of_another_architecture_or_tokenizer_is_refused(
    tiny_config: ProjectConfig, tmp_path: Path, path: str, value: object, is_ours: bool
) -> None:
    export_openclip(load_model(of(tiny_config, "tiny-clip", None)), tmp_path)
    described = json.loads((tmp_path / CONFIG).read_text())
    part, key = path.split(".")
    described["model_cfg"][part][key] = value
    weights = tmp_path / WEIGHTS
    if is_ours:
        (tmp_path / "checkpoint.json").write_text(json.dumps({"model_config": described["model_cfg"]}))
        weights = weights.rename(tmp_path / "model.safetensors")
    (tmp_path / CONFIG).write_text(json.dumps(described))
    said = message(lambda: load_model(of(tiny_config, "tiny-clip", weights)))
    assert f"{path} = {value}, not " in said
    assert f"--set clip_model=local-dir:{tmp_path}" in said


def test_a_file_beside_a_description_with_gelu_is_not_computed_with_quick_gelu(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).touch()
    (tmp_path / CONFIG).write_text(json.dumps({"model_cfg": open_clip.get_model_config("ViT-B-32")}))
    assert "quick_gelu = False, not True" in message(lambda: find_start(f"ViT-B-32-quickgelu={tmp_path / WEIGHTS}"))


def test_a_description_that_spells_out_defaults_is_of_the_same_architecture(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    loaded = load_model(of(tiny_config, "tiny-clip", None))
    export_openclip(loaded, tmp_path)
    described = json.loads((tmp_path / CONFIG).read_text())
    described["model_cfg"]["text_cfg"] |= {"no_causal_mask": False, "hf_tokenizer_name": None}
    described["model_cfg"] |= {"init_logit_bias": -10.0, "custom_text": True}
    (tmp_path / CONFIG).write_text(json.dumps(described))
    start = find_start("tiny-clip", str(tmp_path / WEIGHTS))
    assert start.preprocessing["resize_mode"] == "squash"


def activations(network: nn.Module) -> set[type]:
    return {type(module) for module in network.modules() if type(module).__name__ in ("GELU", "QuickGELU")}


def test_weights_that_were_trained_with_quick_gelu_keep_it(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    """No tensor says so: it stands in the description beside the file, and goes into that of the export."""
    plain = load_model(of(tiny_config, "tiny-clip", None))
    assert activations(plain.network) == {nn.GELU}
    plain.model_config = {**plain.model_config, "quick_gelu": True}
    export_openclip(plain, tmp_path / "given")
    loaded = load_model(of(tiny_config, "tiny-clip", tmp_path / "given" / WEIGHTS))
    assert activations(loaded.network) == {open_clip.transformer.QuickGELU}
    export_openclip(loaded, tmp_path / "best")
    again, *_ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'best'}")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.eval().encode_image(images), loaded.network.eval().encode_image(images))
    assert not torch.allclose(plain.network.eval().encode_image(images), loaded.network.encode_image(images), atol=1e-5)


def test_a_checkpoint_of_weights_with_quick_gelu_is_built_with_it(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    """Whether it is evaluated or started from: its folder has no description, and the tag or file may be gone."""
    plain = load_model(of(tiny_config, "tiny-clip", None))
    plain.model_config = {**plain.model_config, "quick_gelu": True}
    export_openclip(plain, tmp_path / "given")
    config = of(tiny_config, "tiny-clip", tmp_path / "given" / WEIGHTS).with_overrides({"training.max_steps": 2})
    config = config.with_overrides({"training.budget_examples": None, "training.stage_examples": None})
    run = train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "given")
    weights = newest_weights(run.out_dir)
    assert weights is not None
    for loaded in (named_model(str(run.out_dir), ProjectConfig()).loaded, load_model(of(tiny_config, "tiny-clip", weights))):
        assert activations(loaded.network) == {open_clip.transformer.QuickGELU}
        assert loaded.model_config["quick_gelu"]


@pytest.mark.parametrize(("name", "tag"), open_clip.list_pretrained())
def test_a_tag_s_weights_have_the_activation_that_they_were_trained_with(name: str, tag: str) -> None:
    start = find_start(name, tag)
    is_quick = start.model_config.get("quick_gelu", False)
    assert is_quick == bool(
        open_clip.get_pretrained_cfg(name, tag).get("quick_gelu") or "quickgelu" in name or "roberta-V" in name
    )
    call = loading_call(name, tag)
    assert ("force_quick_gelu" in str(call)) == (is_quick and not open_clip.get_model_config(name).get("quick_gelu"))


def test_a_checkpoint_of_ours_says_how_its_photos_are_prepared(
    tiny_config: ProjectConfig, trained: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    start, run = trained
    described = json.loads((start / CONFIG).read_text())
    bare = shutil.copytree(start, tmp_path / "bare")
    (bare / CONFIG).write_text(json.dumps({"model_cfg": described["model_cfg"]}))
    name = f"local-dir:{bare}"
    weights = newest_weights(run.out_dir)
    assert weights is not None
    assert load_model(of(tiny_config, name, weights)).preprocessing.mean == (0.4, 0.5, 0.6)
    alone = shutil.copy(weights, tmp_path / "alone.safetensors")
    for pretrained in (alone, "default"):
        said = message(lambda pretrained=pretrained: load_model(of(tiny_config, name, pretrained)))
        assert "how photos are prepared" in said
        assert "no published weights" in said


def test_a_folder_that_does_not_say_how_photos_are_prepared_is_that_of_its_architecture(
    tiny_config: ProjectConfig, tmp_path: Path
) -> None:
    export_openclip(load_model(of(tiny_config, "tiny-clip", None)), tmp_path)
    described = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**described, "preprocess_cfg": {}}))
    for name, pretrained in (("tiny-clip", tmp_path), (f"local-dir:{tmp_path}", "default")):
        loaded = load_model(of(tiny_config, name, pretrained))
        assert (loaded.preprocessing.mean, loaded.preprocessing.resize_mode) == ((0.5, 0.5, 0.5), "squash")


def test_a_file_of_big_vision_is_refused(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    (tmp_path / "weights.npz").touch()
    assert "big_vision" in message(lambda: load_model(of(tiny_config, "tiny-clip", tmp_path / "weights.npz")))


def test_the_real_start_has_its_weights_and_preprocessing(tiny_config: ProjectConfig, real_photos: Path) -> None:
    folder = real_photos.parent / "starts" / "lite0-clip"
    if not folder.is_dir():
        pytest.skip(f"no pretrained start at {folder}")
    stored = load_file(folder / WEIGHTS)
    for model in (str(folder), f"local-dir:{os.path.relpath(folder)}"):
        loaded = named_model(model, ProjectConfig()).loaded
        state = loaded.network.state_dict()
        assert all(torch.equal(state[key], stored[key].to(state[key].dtype)) for key in stored)
        assert loaded.preprocessing == Preprocessing(80, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "squash", "bicubic")


def test_a_weights_file_is_measured_itself_whatever_lies_beside_it(tmp_path: Path) -> None:
    config = ProjectConfig(clip_model="tiny-clip").with_overrides({"model.pretrained": None})
    folder = tmp_path / "two"
    export_openclip(load_model(config), folder)
    other = load_model(config.with_overrides({"training.seed": 5}))
    save_file({key: tensor.contiguous() for key, tensor in other.network.state_dict().items()}, folder / "model.safetensors")
    with pytest.raises(UserError, match="name its architecture, too, as clip_model=ARCHITECTURE="):
        named_model(str(folder / "model.safetensors"), ProjectConfig())
    by_file = config.with_overrides({"model.pretrained": str(folder / "model.safetensors")})
    assert load_model(by_file).weights_fingerprint == other.weights_fingerprint
    with pytest.raises(UserError, match="both name weights: give one of them"):
        named_model(str(folder), by_file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": 0.5}, "mean = 0.5 in its preprocess_cfg is not allowed: three numbers"),
        ({"mean": [0.5, 0.5, "x"]}, "is not allowed: three numbers"),
        ({"std": [0.5, 0.0, 0.5]}, "is not allowed: above 0"),
        ({"interpolation": "lanczos"}, "interpolation = 'lanczos' in its preprocess_cfg is not supported"),
        ({"resize_mode": "longest"}, "resize_mode = 'longest'"),
    ],
)
def test_a_folder_s_preprocessing_is_one_that_photos_can_have(tmp_path: Path, change: dict[str, object], message: str) -> None:
    export_openclip(load_model(ProjectConfig(clip_model="tiny-clip").with_overrides({"model.pretrained": None})), tmp_path)
    path = tmp_path / "open_clip_config.json"
    described = json.loads(path.read_text())
    described["preprocess_cfg"] |= change
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match=re.escape(message)):
        load_model(ProjectConfig(clip_model=f"local-dir:{tmp_path}"))


def test_a_tag_that_is_in_either_cache_is_loaded_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: ProjectConfig
) -> None:
    """Random weights at the place of those of a small tag: RN50 would take long, so a tiny tower gets a tag of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "own" / "hub"))
    tag = {"hf_hub": "shop/tagged/", "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5), "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", {"shop": {**tag, "interpolation": "bicubic"}})
    made = load_model(of(tiny_config, "tiny-clip", None))
    for cache in (tmp_path / "own" / "hub", tmp_path / "openclip_cache"):
        shutil.rmtree(tmp_path / "own", ignore_errors=True)
        repository = cache / "models--shop--tagged"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("1" * 40)
        export_openclip(made, repository / "snapshots" / ("1" * 40))
        named = ProjectConfig(clip_model="tiny-clip/shop").with_overrides({"model.cache_dir": tmp_path / "openclip_cache"})
        fetch_weights(named)
        loaded = load_model(named)
        assert loaded.weights_fingerprint == made.weights_fingerprint
        assert loaded.preprocessing.mean == (0.1, 0.2, 0.3)


def fetched(cache: Path, repository: str, folder: Path, digit: str = "2") -> Path:
    """In a hub's cache as the hub's own client leaves what it has fetched a part of."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(digit * 40)
    (place / "trees").mkdir()
    (place / "trees" / f"{digit * 40}.json").write_text(json.dumps([{"type": "file", "path": "not_fetched.bin", "size": 1}]))
    return Path(shutil.copytree(folder, place / "snapshots" / (digit * 40)))


def test_what_was_fetched_in_part_is_at_hand_and_runs_that_started_from_it_too(
    tiny_config: ProjectConfig, garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tokenizer of its own, which the run's checkpoint has not."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    export_openclip(load_model(of(tiny_config, "tiny-clip", None)), tmp_path / "model")
    described = json.loads((tmp_path / "model" / CONFIG).read_text())
    described["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": "lower"}
    (tmp_path / "model" / CONFIG).write_text(json.dumps(described))
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\n")
    fetched(tmp_path / "hub", "shop/clip", tmp_path / "model")
    facts = start_facts(of(tiny_config, "hf-hub:shop/clip"), "clip")
    assert (facts.is_at_hand, facts.licence) == (True, "mit")
    steps = {"training.batch_size": 16, "training.max_steps": 1, "training.num_workers": 0, "dataset_root": str(garments)}
    run = train(of(tiny_config, "hf-hub:shop/clip").with_overrides(steps), tmp_path / "run")
    allowed = ProjectConfig().with_overrides({"reading.allow_remote": True})
    loaded = named_model(str(run.out_dir), allowed).loaded
    texts = ["A Red DRESS"]
    assert torch.equal(loaded.tokenizer(texts), load_model(of(tiny_config, "hf-hub:shop/clip")).tokenizer(texts))
    assert load_model(of(tiny_config, str(run.out_dir))).weights_fingerprint == loaded.weights_fingerprint
    shutil.rmtree(tmp_path / "hub")
    assert "fetch it by its name first" in message(lambda: load_model(of(tiny_config, f"{run.out_dir}/")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_config": {"embed_dim": 1}}, "is not of what its record says"),
        ({"model_config": ["x"]}, "is not of what its record says"),
        ({"model_config": {"text_cfg": {"hf_tokenizer_name": "somebody/else"}}}, "is not of what its record says"),
        ({"model_config": {"vision_cfg": {"timm_model_name": "hf-hub:somebody/else"}}}, "is not of what its record says"),
        ({"config": {"clip_model": "hf-hub:somebody/else"}}, "which is not in the hub's cache"),
        ({"config": {"clip_model": "hf-hub:no place"}}, "is no place on the hub"),
        ({"config": {"clip_model": "ITSELF"}}, "started from itself"),
    ],
)
def test_a_record_of_somebody_elses_decides_nothing_that_is_looked_for(
    tiny_config: ProjectConfig, trained: tuple[Path, TrainResult], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    _, run = trained
    folder = Path(shutil.copytree(run.checkpoint, tmp_path / "theirs"))
    record = json.loads((folder / "checkpoint.json").read_text())
    for part, value in change.items():
        if not isinstance(value, dict):
            record[part] = value
            continue
        for key, inner in value.items():
            inner = f"local-dir:{folder}" if inner == "ITSELF" else inner
            known = record[part].get(key)
            record[part][key] = {**known, **inner} if isinstance(inner, dict) and isinstance(known, dict) else inner
    (folder / "checkpoint.json").write_text(json.dumps(record))
    assert said in message(lambda: load_model(of(tiny_config, str(folder))))


@pytest.mark.parametrize("repository", ["shop", "shop/a/b", "shop/name@v1", "shop/", "../x"])
def test_what_is_no_place_on_the_hub_is_refused_in_words(tiny_config: ProjectConfig, repository: str) -> None:
    assert "OWNER/NAME is expected" in message(lambda: load_model(of(tiny_config, f"hf-hub:{repository}")))


TOKENIZERS = {open_clip.get_model_config(name)["text_cfg"].get("hf_tokenizer_name") for name in open_clip.list_models()}


@pytest.mark.parametrize("repository", sorted(filter(None, TOKENIZERS)))
def test_every_tokenizer_that_openclip_names_is_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: str
) -> None:
    """Old repositories, such as bert-base-uncased, have no owner."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert f"the tokenizer of {repository} " in message(lambda: tokenizer_folder(repository, None))
    (tmp_path / "words").mkdir()
    save_word_tokenizer(tmp_path / "words")
    folder = fetched(tmp_path / "hub", repository, tmp_path / "words")
    assert tokenizer_folder(repository, tmp_path / "openclip_cache") == folder


def test_a_text_tower_that_the_hub_describes_is_looked_for_before_trials_are_started(
    tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import RobertaConfig

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = unlisted(tmp_path / "model")
    described = json.loads((folder / CONFIG).read_text())
    described["model_cfg"]["text_cfg"] = {"hf_model_name": "roberta-base", "hf_tokenizer_name": "roberta-base"}
    (folder / CONFIG).write_text(json.dumps(described))
    save_word_tokenizer(folder)
    config = of(tiny_config, f"local-dir:{folder}")
    for call in (fetch_weights, load_model, load_random_model):
        said = message(lambda call=call: call(config))
        assert "the description of the text tower of roberta-base (config.json)" in said
        assert str(tmp_path / "hub" / "models--roberta-base") in said
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
    RobertaConfig(**small).save_pretrained(tmp_path / "tower")
    fetched(tmp_path / "hub", "roberta-base", tmp_path / "tower")
    asked = list[str]()
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", lambda *names, **_: asked.extend(names))
    network = load_model(of(tiny_config, f"local-dir:{folder}", None)).network
    assert network.text.transformer.config.hidden_size == 8
    assert asked == [], "what is in the cache is used as it is"
    meta_model(f"local-dir:{folder}")
    fetch_weights(config)


def test_a_card_hands_licence_and_source_on(
    tiny_config: ProjectConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export_openclip(load_model(of(tiny_config, "tiny-clip", None)), tmp_path / "first")
    assert not (tmp_path / "first" / "README.md").exists(), "nothing is known of random weights"
    (tmp_path / "first" / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: shop/clip\n---\nText\n")
    export_openclip(load_model(of(tiny_config, f"local-dir:{tmp_path / 'first'}")), tmp_path / "second")
    head = (tmp_path / "second" / "README.md").read_text()
    assert "license: apache-2.0" in head
    assert "base_model: shop/clip" in head
    for broken in ("---\nlicense: [a\n---\n", "---\n1: 2\n---\n", "no head", "---\n---\n"):
        (tmp_path / "first" / "README.md").write_text(broken)
        assert start_facts(of(tiny_config, f"local-dir:{tmp_path / 'first'}"), "first").licence is None
    assert "metadata" not in capfd.readouterr().err, "the hub's client warns of a README without"


def test_a_run_hands_licence_and_source_on(tiny_config: ProjectConfig, garments: Path, tmp_path: Path) -> None:
    export_openclip(load_model(of(tiny_config, "tiny-clip", None)), tmp_path / "first")
    card = "license: other\nlicense_name: shop-1\nbase_model:\n- shop/clip\n- shop/more"
    (tmp_path / "first" / "README.md").write_text(f"---\n{card}\n---\nText\n")
    steps = {"training.batch_size": 16, "training.max_steps": 1, "training.num_workers": 0, "dataset_root": str(garments)}
    run = train(of(tiny_config, f"local-dir:{tmp_path / 'first'}").with_overrides(steps), tmp_path / "run")
    facts = start_facts(of(tiny_config, f"local-dir:{run.out_dir}"), "run")
    assert (facts.licence, facts.source) == ("other, shop-1", "shop/clip, shop/more")
    assert "; licence other, shop-1; trained from shop/clip, shop/more" in facts.line()
    export_openclip(named_model(str(run.out_dir), ProjectConfig()).loaded, tmp_path / "exported")
    assert set(card.splitlines()) <= set((tmp_path / "exported" / "README.md").read_text().splitlines())
    for listed in ("license:\n- mit\n- apache-2.0", "license:\n- 1", "license: []"):
        (tmp_path / "first" / "README.md").write_text(f"---\n{listed}\n---\n")
        found = start_facts(of(tiny_config, f"local-dir:{tmp_path / 'first'}"), "first").licence
        assert found == ("mit, apache-2.0" if "mit" in listed else None)


def put_on_the_hub(tiny_config: ProjectConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``shop/clip`` in a cache of its own: description and weights; its tokenizer is in ``shop/words``, which is not there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    export_openclip(load_model(of(tiny_config, "tiny-clip", None)), folder / "model")
    described = json.loads((folder / "model" / CONFIG).read_text())
    described["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "shop/words"
    (folder / "model" / CONFIG).write_text(json.dumps(described))
    fetched(folder / "hub", "shop/clip", folder / "model")


def test_a_plan_says_which_tokenizer_is_not_here(
    tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_the_hub(tiny_config, tmp_path, monkeypatch)
    on_the_hub, here = of(tiny_config, "hf-hub:shop/clip"), of(tiny_config, f"local-dir:{tmp_path / 'model'}")
    assert "lacks the tokenizer of shop/words (not here: fetched when it begins)" in start_facts(on_the_hub, "x").line()
    assert f"lacks the tokenizer ({tmp_path / 'model'} has none)" in start_facts(here, "x").line()
    (tmp_path / "words").mkdir()
    save_word_tokenizer(tmp_path / "words")
    fetched(tmp_path / "hub", "shop/words", tmp_path / "words")
    save_word_tokenizer(tmp_path / "model")
    assert (start_facts(on_the_hub, "x").lacks, start_facts(here, "x").lacks) == ((), ())


def test_a_folder_that_does_not_say_how_photos_are_prepared_is_named_by_an_architecture_that_can_be_written(
    tmp_path: Path,
) -> None:
    (tmp_path / WEIGHTS).touch()
    (tmp_path / CONFIG).write_text(json.dumps({"model_cfg": open_clip.get_model_config("ViT-L-14")}))
    assert "clip_model=ViT-L-14/openai=FILE" in message(lambda: find_start(f"local-dir:{tmp_path}"))
    assert find_start(f"ViT-L-14/openai={tmp_path / WEIGHTS}").model_config["quick_gelu"], "as the message says"
    assert f"ViT-L-14={tmp_path}, or ViT-L-14/openai=FILE" in message(lambda: find_start(f"ViT-L-14/openai={tmp_path}"))


def test_a_folder_that_is_named_like_an_architecture_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "(a folder is ./first)" in message(lambda: find_start("first"))


def test_a_run_beside_its_architecture_is_settled_to_its_newest_checkpoint(
    tiny_config: ProjectConfig, garments: Path, tmp_path: Path
) -> None:
    steps = {"training.batch_size": 16, "training.max_steps": 1, "training.num_workers": 0, "dataset_root": str(garments)}
    run = train(of(tiny_config, "tiny-clip", None).with_overrides(steps), tmp_path / "run")
    own = f"tiny-clip={run.checkpoint}"
    for config in (
        of(tiny_config, f"tiny-clip={run.out_dir}"),
        of(tiny_config, "tiny-clip", run.out_dir),
        of(tiny_config, f"tiny-clip={run.out_dir}", run.out_dir),
    ):
        assert (settled(config).model_name, settled(config).model.pretrained) == (own, "default")
    assert settled(of(tiny_config, f"local-dir:{run.out_dir}", None)).model.pretrained is None
    assert start_facts(settled(config), "x").weights.endswith(f"{run.checkpoint / 'model.safetensors'}")


def test_weights_whose_activation_no_name_says_are_said_to_be_computed_with_gelu(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").touch()
    start = find_start(f"ViT-B-32={tmp_path / 'weights.pt'}")
    assert any("QuickGELU: ViT-B-32/openai=FILE" in note for note in start.notes)
    assert not start.model_config.get("quick_gelu")
    named = find_start(f"ViT-B-32/openai={tmp_path / 'weights.pt'}")
    assert (named.model_config["quick_gelu"], named.notes) == (True, ())


def test_a_model_on_the_hub_has_the_tokenizer_that_it_names_and_so_have_runs_from_it(
    tiny_config: ProjectConfig, garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Marqo's and SigLIP's: description and weights in one repository, the tokenizer in another."""
    put_on_the_hub(tiny_config, tmp_path, monkeypatch)
    config = of(tiny_config, "hf-hub:shop/clip")
    assert "the tokenizer of shop/words" in message(lambda: load_model(config))
    (tmp_path / "words").mkdir()
    save_word_tokenizer(tmp_path / "words")
    fetched(tmp_path / "hub", "shop/words", tmp_path / "words")
    tokens = load_model(config).tokenizer(["red dress"])
    assert tokens[0, :2].tolist() == [WORDS.index("red"), WORDS.index("dress")]
    steps = {"training.batch_size": 16, "training.max_steps": 1, "training.num_workers": 0, "dataset_root": str(garments)}
    run = train(config.with_overrides(steps), tmp_path / "run")
    assert torch.equal(named_model(str(run.out_dir), ProjectConfig()).loaded.tokenizer(["red dress"]), tokens)


def test_a_run_from_a_folder_beside_its_architecture_is_measured_with_the_folders_tokenizer(
    tiny_config: ProjectConfig, garments: Path, tmp_path: Path
) -> None:
    export_openclip(load_model(of(tiny_config, "tiny-clip", None)), tmp_path / "model")
    described = json.loads((tmp_path / "model" / CONFIG).read_text())
    described["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "nobody/nothing"
    (tmp_path / "model" / CONFIG).write_text(json.dumps(described))
    save_word_tokenizer(tmp_path / "model")
    steps = {"training.batch_size": 16, "training.max_steps": 1, "training.num_workers": 0, "dataset_root": str(garments)}
    for number, config in enumerate(
        (of(tiny_config, "tiny-clip", tmp_path / "model"), of(tiny_config, f"tiny-clip={tmp_path / 'model'}"))
    ):
        run = train(config.with_overrides(steps), tmp_path / str(number))
        found = named_model(str(run.out_dir), ProjectConfig())
        assert torch.equal(found.loaded.tokenizer(["red dress"]), load_model(config).tokenizer(["red dress"]))


def test_a_description_beside_a_weights_file_has_said_its_activation(tmp_path: Path, tiny_config: ProjectConfig) -> None:
    (tmp_path / "weights.pt").touch()
    described = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": PREPARED}
    (tmp_path / CONFIG).write_text(json.dumps(described))
    assert find_start(f"ViT-B-32={tmp_path / 'weights.pt'}").notes == ()
