"""Models: what goes in is what OpenCLIP would put in, and what comes out loads in OpenCLIP as it was."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file

from fashionclip_tune.config.choices import ClipModelOptions
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data import preprocessing
from fashionclip_tune.data.preprocessing import Preprocessing
from fashionclip_tune.errors import UserError
from fashionclip_tune.models import openclip as model_module
from fashionclip_tune.models.description import DEFAULT_TAGS
from fashionclip_tune.models.openclip import export_openclip, fetch_weights, load_model
from fashionclip_tune.models.starts import find_start
from tests.support.networks import scrambled

CAPTIONS = ["red cotton dress", "blue jeans with a very long title " * 8, ""]
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise on a gradient: every pixel matters, to the last row."""
    rng = np.random.default_rng(width * height)
    gradient = np.linspace(0, 200, width)[None, :, None] + rng.integers(0, 56, (height, width, 3))
    return Image.fromarray(gradient.astype(np.uint8)).convert(mode)


PHOTOS = {
    "portrait": photo(45, 83),
    "landscape": photo(97, 41),
    "grey": photo(64, 50, "L"),
    "transparent": photo(60, 61, "RGBA"),
    "tiny": photo(7, 5),
    "exact": photo(32, 32),
    "strip": photo(300, 33),
}


@pytest.mark.parametrize("kind", PHOTOS)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_preprocessing_equals_openclips_evaluation_transform(resize_mode: str, interpolation: str, kind: str) -> None:
    ours = Preprocessing(32, MEAN, STD, resize_mode, interpolation)
    theirs = image_transform_v2(
        PreprocessCfg(size=32, mean=MEAN, std=STD, resize_mode=resize_mode, interpolation=interpolation), is_train=False
    )
    image = PHOTOS[kind]
    input_BCHW = ours.normalise(ours.resize(image)[None].float() / 255)
    torch.testing.assert_close(input_BCHW[0], theirs(image), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(470, 9), (9, 470), (700, 50), (50, 700), (1, 301), (301, 1)])
def test_of_a_photo_too_long_to_be_resized_the_middle_is_kept(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    ours, gradient = Preprocessing(224, MEAN, STD, "shortest", "bicubic"), Image.linear_gradient("L").rotate(30).resize(size)
    whole = ours.resize(gradient).int()
    monkeypatch.setattr(preprocessing, "_MAX_RESIZED_PIXELS", 0)
    difference = (ours.resize(gradient).int() - whole).abs()
    assert difference.max() <= 2 * 255 * 50 / 700  # two pixels of the photo


_WITHIN_MEMORY = """
import io, resource
from itertools import product
from PIL import Image
from fashionclip_tune.evaluation.examples import thumbnail
from fashionclip_tune.data.preprocessing import Preprocessing
from fashionclip_tune.data.reader import decode_photo, decode_pil

def encoded(size, image_format):
    written = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(written, image_format)
    return written.getvalue()

photos = [encoded(*each) for each in product([(1, 30_000), (30_000, 1), (2, 65_500), (65_500, 2)], ["JPEG", "PNG"])]
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, -1))
for data, mode in product(photos, ["shortest", "squash"]):
    preprocessing = Preprocessing(256, (0.5,) * 3, (0.5,) * 3, mode, "bicubic")
    assert preprocessing.resize(decode_pil(data)).shape == (3, 256, 256)
    assert preprocessing.resize_to_canvas(decode_photo(data), (320, 320)).shape == (3, 320, 320)
    assert thumbnail(data, 112).size == (112, 112)
print("done")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is limited as on Linux")
def test_a_photo_of_any_shape_takes_little_memory() -> None:
    """256 MB are left to a process for 1 x 30,000 pixels; the whole of it, resized, would have six billion values."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", _WITHIN_MEMORY]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_the_canvas_of_the_training_path_shows_the_same_part_of_a_photo(resize_mode: str) -> None:
    preprocessing = Preprocessing(32, MEAN, STD, resize_mode, "bicubic")
    image = photo(60, 90).resize((15, 22)).resize((60, 90))  # smooth: only geometry can differ
    decoded_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    difference_CHW = preprocessing.resize_to_canvas(decoded_CHW, (32, 32)).float() - preprocessing.resize(image).float()
    assert difference_CHW.abs().max() <= 2


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_resized_on_the_device_a_canvas_is_what_evaluation_makes_of_the_photo(resize_mode: str) -> None:
    preprocessing = Preprocessing(32, MEAN, STD, resize_mode, "bicubic")
    image = photo(48, 60)
    decoded_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    canvas = preprocessing.canvas(np.array([[48, 60]] * 3))
    assert canvas == ((48, 48) if resize_mode == "shortest" else (60, 48))
    on_canvas_CHW = preprocessing.resize_to_canvas(decoded_CHW, canvas)
    assert set(on_canvas_CHW.flatten().tolist()) <= set(decoded_CHW.flatten().tolist())
    difference_CHW = preprocessing.resize_canvas(on_canvas_CHW[None])[0].float() - preprocessing.resize(image).float()
    assert difference_CHW.abs().mean() < 1
    if resize_mode == "squash":  # the centre crop before or after resizing may differ by a part of a pixel
        assert difference_CHW.abs().max() <= 2


@pytest.mark.parametrize(
    ("resize_mode", "sizes", "canvas"),
    [
        ("shortest", [(48, 60), (60, 48), (48, 48), (50, 90)], (48, 48)),  # the short side counts
        ("squash", [(48, 60), (48, 60), (48, 60), (50, 90)], (60, 48)),
        ("squash", [(48, 60), (60, 48), (48, 60), (50, 90)], (40, 40)),  # no shape of more than half
        ("shortest", [(24, 30)] * 3, (24, 24)),  # enlarged on the device
        ("shortest", [(64, 99)] * 3, (64, 64)),
        ("shortest", [(65, 99)] * 3, (40, 40)),  # more than twice the input
        ("squash", [(0, 0)] * 3 + [(32, 32)], (40, 40)),  # mostly not JPEGs
    ],
)
def test_the_canvas_is_the_shape_that_most_photos_have(
    resize_mode: str, sizes: list[tuple[int, int]], canvas: tuple[int, int]
) -> None:
    assert Preprocessing(32, MEAN, STD, resize_mode, "bicubic").canvas(np.array(sizes)) == canvas


def local_config(tiny_config: ProjectConfig, folder: Path) -> ProjectConfig:
    return tiny_config.with_overrides({"model.pretrained": str(folder)})


def embeddings(network: Any, images_BCHW: torch.Tensor, tokens_BL: torch.Tensor) -> list[torch.Tensor]:
    network.eval()
    with torch.no_grad():
        return [network.encode_image(images_BCHW), network.encode_text(tokens_BL)]


@pytest.mark.parametrize(
    ("name", "loss", "bias"),
    [("tiny-clip", "contrastive", None), ("tiny-clip", "siglip", -10.0), ("tiny-sig", "siglip", -10.0)],
)
def test_openclip_loads_an_exported_folder_as_the_same_model(
    tiny_config: ProjectConfig, tmp_path: Path, name: str, loss: str, bias: float | None
) -> None:
    loaded = load_model(replace(tiny_config, clip_model=name, loss_function=loss))
    fresh_bias = getattr(loaded.network, "logit_bias", None)
    assert (None if fresh_bias is None else float(fresh_bias.detach())) == bias
    scrambled(loaded)
    loaded.preprocessing = Preprocessing(32, MEAN, STD, "shortest", "bilinear")
    export_openclip(loaded, tmp_path / "best")

    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'best'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'best'}")
    image = PHOTOS["portrait"]
    input_CHW = loaded.preprocessing.normalise(loaded.preprocessing.resize(image).float() / 255)
    torch.testing.assert_close(transform(image), input_CHW, atol=1e-6, rtol=0)
    assert torch.equal(tokenizer(CAPTIONS), loaded.tokenizer(CAPTIONS))
    for ours, their in zip(
        embeddings(loaded.network, input_CHW[None], loaded.tokenizer(CAPTIONS)),
        embeddings(theirs, input_CHW[None], tokenizer(CAPTIONS)),
        strict=True,
    ):
        assert torch.equal(ours, their)
    assert float(theirs.logit_scale.detach()) == 3.25
    if bias is None:
        assert theirs.logit_bias is None
    else:
        assert torch.equal(theirs.logit_bias, loaded.network.logit_bias)


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-sig"])
def test_an_exported_folder_is_a_starting_point_with_its_scale_bias_and_preprocessing(
    tiny_config: ProjectConfig, tmp_path: Path, name: str
) -> None:
    config = replace(tiny_config, clip_model=name, loss_function="siglip")
    trained = scrambled(load_model(config))
    with torch.no_grad():
        trained.network.logit_bias.fill_(-7.5)
    trained.preprocessing = Preprocessing(32, MEAN, STD, "shortest", "bilinear")
    export_openclip(trained, tmp_path / "best")
    again = load_model(local_config(config, tmp_path / "best"))
    assert again.preprocessing == trained.preprocessing
    assert again.clamps_logit_scale == trained.clamps_logit_scale == (name == "tiny-clip")
    ours, theirs = trained.network.state_dict(), again.network.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    # and once more: export of a loaded folder says the same
    export_openclip(again, tmp_path / "again")
    first, second = (json.loads((tmp_path / folder / "open_clip_config.json").read_text()) for folder in ("best", "again"))
    assert first == second


def test_a_weights_file_with_a_logit_bias_fits_a_model_that_has_none_of_its_own(
    tiny_config: ProjectConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, loss_function="siglip")
    trained = scrambled(load_model(config))
    save_file(trained.network.state_dict(), tmp_path / "weights.safetensors")
    for loss in ("siglip", "contrastive"):
        again = load_model(local_config(replace(config, loss_function=loss), tmp_path / "weights.safetensors"))
        assert torch.equal(again.network.logit_bias, trained.network.logit_bias)
        assert again.clamps_logit_scale
    export_openclip(again, tmp_path / "best")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'best'}")
    assert torch.equal(theirs.logit_bias, trained.network.logit_bias)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_tokenizer_of_the_folder_is_used_and_exported_with_the_model(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[EOS]", "red", "dress", "blue"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    source = tmp_path / "source"
    PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]", sep_token="[EOS]", cls_token="[UNK]"
    ).save_pretrained(source)
    loaded = load_model(tiny_config)
    loaded.model_config = json.loads(json.dumps(loaded.model_config))
    loaded.model_config["text_cfg"] |= {"hf_tokenizer_name": "nowhere/on-the-hub", "vocab_size": 49408}
    export_openclip(loaded, source)

    custom = load_model(local_config(tiny_config, source))
    tokens_BL = custom.tokenizer(["red dress", "blue blue unheard"])
    assert tokens_BL[:, :3].tolist() == [[3, 4, 0], [5, 5, 1]]
    assert tokens_BL.shape == (2, 32)
    export_openclip(custom, tmp_path / "best")
    shutil.rmtree(source)
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path / 'best'}")(["red dress", "blue blue unheard"]), tokens_BL)


def test_copies_are_independent(tiny_config: ProjectConfig) -> None:
    first, second = load_model(tiny_config), load_model(tiny_config)
    before = {key: tensor.clone() for key, tensor in second.network.state_dict().items()}
    scrambled(first)
    third = load_model(tiny_config)
    for copy in (second, third):
        assert all(torch.equal(tensor, before[key]) for key, tensor in copy.network.state_dict().items())
    assert third.weights_fingerprint == second.weights_fingerprint


def test_random_weights_are_the_seeds_and_leave_no_trace_of_what_was_drawn_before(tiny_config: ProjectConfig) -> None:
    def weights(seed: int) -> torch.Tensor:
        model_module._load_cached.cache_clear()
        return load_model(tiny_config.with_overrides({"training.seed": seed})).network.state_dict()["text_projection"]

    first = weights(0)
    torch.rand(17)
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)


def test_the_default_tags_of_the_published_models_are_in_openclips_registry() -> None:
    assert set(DEFAULT_TAGS) == {option.value for option in ClipModelOptions}
    for name, tag in DEFAULT_TAGS.items():
        assert tag in open_clip.list_pretrained_tags_by_model(name)


@pytest.mark.parametrize("name", [None, "weights.pt"])
def test_siglip2_from_a_file_or_from_random_weights_is_fed_as_it_was_trained(tmp_path: Path, name: str | None) -> None:
    (tmp_path / "weights.pt").touch()
    known = find_start("ViT-B-16-SigLIP2-256", name and str(tmp_path / name)).preprocessing
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()} == {
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "resize_mode": "squash",
        "interpolation": "bicubic",
    }


def test_b_32_from_a_file_is_fed_as_openai_did(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").touch()
    openai = PreprocessCfg(**find_start("ViT-B-32", str(tmp_path / "weights.pt")).preprocessing)
    assert (tuple(openai.mean), tuple(openai.std)) == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    assert (openai.resize_mode, openai.interpolation) == ("shortest", "bicubic")


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("wanted", [load_model, fetch_weights])
def test_an_unknown_architecture_is_refused_with_the_known_ones(
    tiny_config: ProjectConfig, wanted: Callable[[ProjectConfig], object]
) -> None:
    text = message(lambda: wanted(replace(tiny_config, clip_model="ViT-B-33")))
    assert "ViT-B-33" in text
    assert all(name in text for name in ("ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP2-256", "tiny-clip"))


@pytest.mark.parametrize("wanted", [load_model, fetch_weights])
def test_an_unknown_tag_or_path_is_refused_with_the_tags_there_are(wanted: Callable[[ProjectConfig], object]) -> None:
    config = ProjectConfig(clip_model="ViT-B-32").with_overrides({"model.pretrained": "laion_typo"})
    text = message(lambda: wanted(config))
    assert "laion_typo" in text
    assert "laion2b_s34b_b79k" in text


@pytest.mark.parametrize("wanted", [load_model, fetch_weights])
def test_a_tag_that_cannot_be_fetched_names_tag_places_and_the_way_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wanted: Callable[[ProjectConfig], object]
) -> None:
    text = message(lambda: wanted(ProjectConfig().with_overrides({"model.cache_dir": str(tmp_path / "empty")})))
    for part in ("ViT-B-32", "laion2b_s34b_b79k", str(tmp_path / "empty"), "laion/CLIP-ViT-B-32", "clip_model="):
        assert part in text
    assert not caplog.records, "said once, in the error"


def test_tiny_weights_that_are_not_made_yet_say_how_to_make_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path))
    assert "fashionclip_tune pretrain" in message(lambda: load_model(ProjectConfig(clip_model="tiny-clip")))


def exported(tiny_config: ProjectConfig, folder: Path, name: str = "tiny-clip") -> Path:
    export_openclip(load_model(replace(tiny_config, clip_model=name)), folder)
    return folder


def test_a_folder_of_another_architecture_is_refused(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    folder = exported(tiny_config, tmp_path / "sig", "tiny-sig")
    text = message(lambda: load_model(local_config(tiny_config, folder)))
    assert "tiny-clip" in text
    assert "vision_cfg" in text


def test_a_folder_without_weights_is_refused_and_not_filled_with_random_ones(
    tiny_config: ProjectConfig, tmp_path: Path
) -> None:
    folder = exported(tiny_config, tmp_path / "best")
    (folder / "open_clip_model.safetensors").unlink()
    assert str(folder) in message(lambda: load_model(local_config(tiny_config, folder)))


def test_a_folder_with_weights_cut_short_is_refused(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    folder = exported(tiny_config, tmp_path / "best")
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert str(folder) in message(lambda: load_model(local_config(tiny_config, folder)))


def test_weights_that_lack_a_tensor_are_refused(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    folder = exported(tiny_config, tmp_path / "best")
    weights = load_file(folder / "open_clip_model.safetensors")
    del weights["visual.proj"]
    save_file(weights, folder / "open_clip_model.safetensors")
    assert str(folder) in message(lambda: load_model(local_config(tiny_config, folder)))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_cfg": 3}'])
def test_a_folder_with_no_openclip_configuration_is_refused(tiny_config: ProjectConfig, tmp_path: Path, text: str) -> None:
    folder = exported(tiny_config, tmp_path / "best")
    (folder / "open_clip_config.json").write_text(text)
    assert str(folder) in message(lambda: load_model(local_config(tiny_config, folder)))


def test_a_way_of_resizing_that_we_do_not_have_is_refused(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    folder = exported(tiny_config, tmp_path / "best")
    described = json.loads((folder / "open_clip_config.json").read_text())
    described["preprocess_cfg"]["resize_mode"] = "longest"
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    assert "longest" in message(lambda: load_model(local_config(tiny_config, folder)))
