"""CLIPModel and SiglipModel are OpenCLIP's models under other names: their embeddings are equal, in both directions."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.preprocessing import Preprocessing
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.named_model import loading_call
from fashionclip_tune.models.openclip import LoadedModel, load_model, openclip_is_quiet
from fashionclip_tune.models.starts import find_start
from fashionclip_tune.models.tiny import register_tiny_models
from fashionclip_tune.models.transformers_export import write_transformers
from fashionclip_tune.models.transformers_format import (
    TransformersStart,
    describe_transformers,
    is_transformers_folder,
)
from fashionclip_tune.models.transformers_shapes import find_architecture, set_activation, transformers_config
from fashionclip_tune.models.transformers_weights import read_transformers_weights, to_openclip, to_transformers
from tests.support.transformers_models import (
    SMALL_SIGLIP,
    WORDS,
    clip_config,
    embeddings,
    inputs,
    randomise,
    register_small_siglip,
    save,
    siglip_config,
)

PREPARED = Preprocessing(32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "shortest", "bicubic")
TEXTS = [
    "a red dress",
    "A photo of a Woman's   blouse, 100% cotton & silk!",
    "naïve café Über-coat №5, it's they're",
    "日本語 ドレス 👗👠",
    "",
    "tab\tand\nnew line <b>bold</b> " * 30,
]


@pytest.fixture(scope="module", autouse=True)
def small_siglip(tmp_path_factory: pytest.TempPathFactory) -> None:
    register_tiny_models()
    register_small_siglip(tmp_path_factory.mktemp("architectures"))


def built(architecture: str, model_config: Mapping[str, Any]) -> nn.Module:
    """OpenCLIP's network of a ``model_cfg``, which its name alone does not say."""
    parts = {key: value for key, value in model_config.items() if key != "custom_text"}
    with openclip_is_quiet():
        network: nn.Module = open_clip.create_model(architecture, load_weights=False, pretrained_text=False, **parts).eval()
    set_activation(network, model_config)
    return network


def loaded(start: TransformersStart) -> LoadedModel:
    """As every run loads it, by the name of its folder."""
    return load_model(ProjectConfig(clip_model=f"local-dir:{start.weights_file.parent}"))


def converted(start: TransformersStart) -> Any:
    return loaded(start).network.eval()


def assert_same_embeddings(one: Any, other: Any, config: Any) -> None:
    both = (embeddings(network, *inputs(config)) for network in (one, other))
    for ours, theirs in zip(*both, strict=True):
        assert (ours @ ours.T).min() < 0.99, "all alike: nothing would be seen"
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    save(clip_config(), tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def siglip_folder(tmp_path: Path) -> Path:
    save(siglip_config(), tmp_path / "siglip")
    return tmp_path / "siglip"


def change(folder: Path, name: str = "config.json", part: str | None = None, **values: Any) -> None:
    content = json.loads((folder / name).read_text())
    (content if part is None else content[part]).update(values)
    (folder / name).write_text(json.dumps(content))


# Embeddings


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_a_clip_model_becomes_the_tiny_tower_of_its_shape_with_its_activation(tmp_path: Path, activation: str) -> None:
    model = save(clip_config(activation), tmp_path)
    start = describe_transformers(tmp_path)
    assert start.architecture == "tiny-clip"
    assert start.model_config.get("quick_gelu", False) is (activation == "quick_gelu")
    assert_same_embeddings(converted(start), model, model.config)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_a_siglip_model_becomes_a_timm_trunk_with_its_activation(tmp_path: Path, activation: str) -> None:
    model = save(siglip_config(activation), tmp_path)
    start = describe_transformers(tmp_path)
    assert start.architecture == SMALL_SIGLIP
    assert start.model_config["init_logit_bias"] == -10
    network = converted(start)
    assert_same_embeddings(network, model, model.config)
    assert network.logit_bias.item() == model.logit_bias.item()
    assert network.logit_scale.item() == model.logit_scale.item()
    assert [("2e-4" in note) for note in start.notes] == ([True] if activation == "gelu_pytorch_tanh" else [])


def test_the_exact_gelu_in_place_of_the_approximation_would_be_seen(siglip_folder: Path) -> None:
    start = describe_transformers(siglip_folder)
    network, exact = converted(start), converted(start)
    for module in exact.visual.trunk.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "none"
    ours, theirs = (embeddings(each, *inputs(siglip_config()))[0] for each in (network, exact))
    assert 1e-5 < (ours - theirs).norm(dim=-1).max() < 1e-3


@pytest.mark.parametrize("name", ["tiny-clip", SMALL_SIGLIP])
@pytest.mark.parametrize("variant", ["as registered", "quick", "tanh"])
def test_what_is_written_is_loaded_by_transformers_as_the_same_model_and_comes_back_bit_by_bit(
    tmp_path: Path, name: str, variant: str
) -> None:
    from transformers import AutoModel

    model_config = open_clip.get_model_config(name)
    if variant == "quick":
        model_config["quick_gelu"] = True
    if variant == "tanh":
        model_config["vision_cfg"]["act_kwargs"] = {"approximate": "tanh"}
    if (name, variant) == ("tiny-clip", "tanh"):
        model_config["text_cfg"]["act_kwargs"] = {"approximate": "tanh"}
    if (name, variant) == (SMALL_SIGLIP, "quick"):
        return
    network = built(name, model_config)
    randomise(network)
    write_transformers(tmp_path, model_config, network.state_dict(), PREPARED, SimpleTokenizer(context_length=12))
    model = AutoModel.from_pretrained(tmp_path).eval()
    assert type(model).__name__ == ("CLIPModel" if name == "tiny-clip" else "SiglipModel")
    assert_same_embeddings(network, model, model.config)
    back = to_openclip(load_file(tmp_path / "model.safetensors"), network)
    assert back.keys() == network.state_dict().keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in network.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("expected", "kind", "vision"),
    [
        ("ViT-B-32-quickgelu", "clip", {}),
        ("ViT-B-16-quickgelu", "clip", {"patch_size": 16}),
        ("ViT-L-14", "clip", {"patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}),
        ("ViT-B-16-SigLIP", "siglip", {}),
    ],
)
def test_full_size_models_have_the_same_embeddings_in_both_directions(
    monkeypatch: pytest.MonkeyPatch, expected: str, kind: str, vision: dict[str, int]
) -> None:
    from transformers import CLIPConfig, CLIPModel, PreTrainedModel, SiglipConfig, SiglipModel

    monkeypatch.setattr(PreTrainedModel, "init_weights", lambda self: None)
    for name in (
        "normal_",
        "uniform_",
        "trunc_normal_",
        "kaiming_uniform_",
        "xavier_uniform_",
    ):  # most of the time, for nothing
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **options: tensor)
    if kind == "siglip":
        config = SiglipConfig()
    elif expected == "ViT-L-14":
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "hidden_act": "gelu"}
        vision = {**vision, "num_attention_heads": 16, "hidden_act": "gelu"}
        config = CLIPConfig(projection_dim=768, text_config=text, vision_config=vision)
    else:
        config = CLIPConfig(vision_config=vision)
    architecture, model_config = find_architecture(config.to_dict(), "it")
    assert architecture == expected
    model = (SiglipModel if kind == "siglip" else CLIPModel)(config).eval()
    randomise(model)
    network = built(architecture, model_config)
    network.load_state_dict(to_openclip(model.state_dict(), network), assign=True)
    assert_same_embeddings(network, model, config)
    back = to_transformers(network.state_dict(), model.state_dict())
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


# What the files say


def test_a_folder_is_known_by_its_config_and_an_openclip_folder_is_none(clip_folder: Path, tmp_path: Path) -> None:
    assert is_transformers_folder(clip_folder)
    assert not is_transformers_folder(tmp_path)
    (clip_folder / "open_clip_config.json").write_text("{}")
    assert not is_transformers_folder(clip_folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"clip_model": "tiny-clip"}', '{"model_type": 3}', "\udcff"])
def test_a_config_of_something_else_is_not_of_transformers(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    assert not is_transformers_folder(tmp_path)


def test_defaults_that_a_config_leaves_out_are_those_of_transformers(clip_folder: Path) -> None:
    (clip_folder / "config.json").write_text('{"model_type": "clip"}')
    change(clip_folder, "preprocessor_config.json", size=224, crop_size=224)
    start = describe_transformers(clip_folder)
    assert start.architecture == "ViT-B-32-quickgelu"
    assert start.preprocessing["interpolation"] == "bicubic"
    assert start.tokenizer_folder is None


def test_a_config_as_the_first_versions_wrote_it_is_read(clip_folder: Path) -> None:
    """Integer sizes, the class of a feature extractor, values only in ``text_config_dict``, 2 as the token of the end."""
    content = json.loads((clip_folder / "config.json").read_text())
    content["text_config"]["eos_token_id"] = 2
    content["text_config_dict"], content["text_config"] = content["text_config"], {}
    (clip_folder / "config.json").write_text(json.dumps(content))
    said = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32, "resample": 2}
    (clip_folder / "preprocessor_config.json").write_text(json.dumps(said))
    start = describe_transformers(clip_folder)
    assert start.architecture == "tiny-clip"
    assert start.preprocessing["interpolation"] == "bilinear"
    assert start.preprocessing["resize_mode"] == "shortest"


@pytest.mark.parametrize(
    ("size", "cropped", "resize_mode"),
    [({"shortest_edge": 32}, True, "shortest"), ({"height": 32, "width": 32}, False, "squash")],
)
def test_photos_are_prepared_as_the_image_processor_says(
    clip_folder: Path, size: dict[str, int], cropped: bool, resize_mode: str
) -> None:
    change(clip_folder, "preprocessor_config.json", size=size, do_center_crop=cropped, image_mean=[0.1, 0.2, 0.3])
    said = describe_transformers(clip_folder).preprocessing
    assert said["resize_mode"] == resize_mode
    assert said["mean"] == [0.1, 0.2, 0.3]
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(clip_folder)
    image = Image.effect_noise((64, 48), 80).convert("RGB")
    theirs = processor(image, return_tensors="pt").pixel_values[0]
    own = Preprocessing(32, tuple(said["mean"]), tuple(said["std"]), said["resize_mode"], said["interpolation"])
    ours = own.normalise(own.resize(image)[None] / 255)[0]
    # Theirs resizes a tensor, ours as OpenCLIP a photo of Pillow: values between 0 and 255 are rounded in other places.
    assert ((ours - theirs).abs() * torch.tensor(said["std"])[:, None, None]).max() < 2.5 / 255


def test_what_a_processor_of_version_5_saves_in_one_file_is_read(clip_folder: Path) -> None:
    said = json.loads((clip_folder / "preprocessor_config.json").read_text())
    (clip_folder / "preprocessor_config.json").unlink()
    said["image_mean"] = [0.1, 0.2, 0.3]
    (clip_folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "CLIPProcessor", "image_processor": said})
    )
    assert describe_transformers(clip_folder).preprocessing["mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("named", "values"),
    [
        ("resample = 1", {"resample": 1}),
        ("do_normalize = False", {"do_normalize": False}),
        ("rescale_factor", {"rescale_factor": 0.0078}),
        ("crop_size", {"crop_size": {"height": 24, "width": 24}}),
        ("size", {"size": {"shortest_edge": 36}}),
        ("do_center_crop = False", {"do_center_crop": False}),
        ("size", {"size": {"shortest_edge": 32, "longest_edge": 64}}),
        ("do_pad = True", {"do_pad": True}),
    ],
)
def test_photos_that_openclip_cannot_prepare_so_are_refused(clip_folder: Path, named: str, values: dict[str, Any]) -> None:
    change(clip_folder, "preprocessor_config.json", **values)
    said = message(lambda: describe_transformers(clip_folder))
    assert named in said
    assert "preprocessor_config.json" in said
    assert "Supported" in said


@pytest.mark.parametrize("missing", ["preprocessor_config.json", "model.safetensors"])
def test_a_file_that_is_missing_is_named(clip_folder: Path, missing: str) -> None:
    (clip_folder / missing).unlink()
    assert missing in message(lambda: describe_transformers(clip_folder))


def test_a_siglip_folder_needs_a_tokenizer_of_its_own(siglip_folder: Path) -> None:
    start = describe_transformers(siglip_folder)
    assert start.tokenizer_folder == siglip_folder
    tokens_BL = loaded(start).tokenizer(["A Red, dress!", "dots"])  # cleaned as OpenCLIP cleans SigLIP's texts
    wanted = [[WORDS.index("a"), WORDS.index("red"), WORDS.index("dress")], [WORDS.index("dots")]]
    assert tokens_BL.tolist() == [words + [0] * (12 - len(words)) for words in wanted]
    (siglip_folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in message(lambda: describe_transformers(siglip_folder))


def test_a_clip_model_with_other_words_than_openclips_is_refused(clip_folder: Path) -> None:
    own = {{"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(token, token): number
           for token, number in SimpleTokenizer().encoder.items()}  # fmt: skip
    (clip_folder / "vocab.json").write_text(json.dumps(own))
    assert describe_transformers(clip_folder).tokenizer_folder is None
    own["dress</w>"], own["shirt</w>"] = own["shirt</w>"], own["dress</w>"]
    (clip_folder / "vocab.json").write_text(json.dumps(own))
    said = message(lambda: describe_transformers(clip_folder))
    assert "2 tokens differ" in said
    assert "dress</w>" in said


# What does not fit


@pytest.mark.parametrize(
    ("part", "values", "named"),
    [
        ("vision_config", {"num_hidden_layers": 5}, "vision_config.num_hidden_layers = 5, not 3"),
        ("vision_config", {"num_attention_heads": 6}, "vision_config.num_attention_heads = 6, not 3"),
        ("vision_config", {"layer_norm_eps": 1e-6}, "vision_config.layer_norm_eps = 1e-06, not 1e-05"),
        ("vision_config", {"num_channels": 1}, "vision_config.num_channels = 1, not 3"),
        ("text_config", {"intermediate_size": 96}, "text_config.intermediate_size = 96, not 384"),
        ("text_config", {"max_position_embeddings": 31}, "text_config.max_position_embeddings = 31, not 32"),
        (None, {"projection_dim": 64}, "projection_dim = 64, not 96"),
    ],
)
def test_a_shape_that_no_architecture_has_is_refused_beside_the_nearest_one(
    clip_folder: Path, part: str | None, values: dict[str, Any], named: str
) -> None:
    change(clip_folder, part=part, **values)
    said = message(lambda: describe_transformers(clip_folder))
    assert f"the nearest one is tiny-clip: {named}" in said


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("vision_config", {"num_hidden_layers": 5}),
        ("vision_config", {"vision_use_head": False}),
        ("text_config", {"projection_size": 32}),
    ],
)
def test_a_siglip_model_of_another_shape_is_refused(siglip_folder: Path, part: str, values: dict[str, Any]) -> None:
    change(siglip_folder, part=part, **values)
    ((name, value),) = values.items()
    assert f"nearest one is {SMALL_SIGLIP}: {part}.{name} = {value}" in message(lambda: describe_transformers(siglip_folder))


@pytest.mark.parametrize("text", ["relu", "gelu"])
def test_activations_that_openclip_cannot_have_are_refused(clip_folder: Path, text: str) -> None:
    change(clip_folder, part="text_config", hidden_act=text)
    said = message(lambda: describe_transformers(clip_folder))
    assert text in said
    assert "quick_gelu, gelu, gelu_pytorch_tanh" in said


def test_another_token_of_the_end_is_refused(clip_folder: Path) -> None:
    change(clip_folder, part="text_config", eos_token_id=7)
    assert "eos_token_id = 7" in message(lambda: describe_transformers(clip_folder))


def test_dropout_in_attention_is_said_to_be_left_out(clip_folder: Path) -> None:
    change(clip_folder, part="vision_config", attention_dropout=0.1)
    (note,) = describe_transformers(clip_folder).notes
    assert "vision_config.attention_dropout = 0.1" in note


@pytest.mark.parametrize("kind", ["siglip2", "clip_vision_model", "blip", "xlm-roberta"])
def test_another_kind_of_model_is_refused_with_the_two_that_are_read(clip_folder: Path, kind: str) -> None:
    change(clip_folder, model_type=kind)
    assert is_transformers_folder(clip_folder)
    said = message(lambda: describe_transformers(clip_folder))
    assert kind in said
    assert "clip and siglip" in said


@pytest.mark.parametrize("values", [{"num_hidden_layers": "three"}, {"hidden_size": None}])
def test_a_config_with_values_of_another_type_is_refused_in_a_line(clip_folder: Path, values: dict[str, Any]) -> None:
    change(clip_folder, part="text_config", **values)
    assert "config.json" in message(lambda: describe_transformers(clip_folder))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("flag", [{"auto_map": {"AutoModel": "own.Model"}}, {"trust_remote_code": True}])
def test_python_files_that_a_folder_names_are_never_run(clip_folder: Path, name: str, flag: dict[str, Any]) -> None:
    (clip_folder / "own.py").write_text("raise SystemExit('was run')")
    change(clip_folder, name, **flag)
    said = message(lambda: describe_transformers(clip_folder))
    assert next(iter(flag)) in said
    assert name in said


def rewritten(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> TransformersStart:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")
    return describe_transformers(folder)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda w: w.pop("text_model.encoder.layers.1.self_attn.k_proj.bias"), "1 missing (text_model.encoder.layers.1"),
        (lambda w: w.pop("logit_scale"), "1 missing (logit_scale)"),
        (lambda w: w.update(classifier=torch.ones(3)), "1 left over (classifier)"),
        (lambda w: w.update({"visual_projection.weight": torch.ones(96, 95)}), "of another shape (visual_projection.weight"),
        (
            lambda w: w.update({"vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(95, 96)}),
            "of another shape (vision_model.encoder.layers.0.self_attn.q_proj.weight",
        ),
        (lambda w: [w.pop(name) for name in list(w) if name.startswith("text_model.")], "and "),
    ],
)
def test_weights_that_lack_a_tensor_or_have_others_are_refused_by_name(
    clip_folder: Path, edit: Callable[[dict[str, Tensor]], object], named: str
) -> None:
    start = rewritten(clip_folder, edit)
    said = message(lambda: converted(start))
    assert named in said
    assert len(said) < 800


def test_the_pooling_heads_part_of_a_siglip_model_must_be_whole(siglip_folder: Path) -> None:
    def cut(weights: dict[str, Tensor]) -> None:
        name = "vision_model.head.attention.in_proj_weight"
        weights[name] = weights[name][:128].clone()

    start = rewritten(siglip_folder, cut)
    assert "vision_model.head.attention.in_proj_weight [128, 64]" in message(lambda: converted(start))


def test_buffers_of_older_versions_are_no_weights(clip_folder: Path) -> None:
    def add(weights: dict[str, Tensor]) -> None:
        weights["text_model.embeddings.position_ids"] = torch.arange(32)[None]
        weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]

    converted(rewritten(clip_folder, add))


def test_weights_in_half_precision_are_read(tmp_path: Path) -> None:
    model = save(clip_config(), tmp_path)
    save_file({name: tensor.half() for name, tensor in load_file(tmp_path / "model.safetensors").items()}, tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "model.safetensors")
    start = describe_transformers(tmp_path)
    assert_same_embeddings(converted(start), model.half().float(), model.config)


def test_weights_in_several_files_are_read_by_their_index(tmp_path: Path) -> None:
    model = save(clip_config(), tmp_path, max_shard_size="2MB")
    start = describe_transformers(tmp_path)
    assert start.weights_file.name == "model.safetensors.index.json"
    assert_same_embeddings(converted(start), model, model.config)
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.rename(tmp_path / "elsewhere")
    assert lost.name in message(lambda: converted(start))


def test_an_index_does_not_reach_out_of_its_folder(clip_folder: Path) -> None:
    shutil.move(clip_folder / "model.safetensors", clip_folder.parent / "model.safetensors")
    index = {"weight_map": {"logit_scale": "../model.safetensors"}}
    (clip_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    start = describe_transformers(clip_folder)
    assert "../model.safetensors" in message(lambda: read_transformers_weights(start.weights_file))


def test_pickled_weights_are_read_and_code_in_them_is_refused(clip_folder: Path) -> None:
    model_file, pickled = clip_folder / "model.safetensors", clip_folder / "pytorch_model.bin"
    weights = load_file(model_file)
    model_file.unlink()
    torch.save(weights, pickled)
    start = describe_transformers(clip_folder)
    assert start.weights_file == pickled
    converted(start)

    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("code in a weights file was run",))

    torch.save({"logit_scale": Harm()}, pickled)
    assert "could run code" in message(lambda: converted(start))


# What is written


def test_the_written_tokenizer_gives_openclips_tokens_and_the_processor_its_picture(tmp_path: Path) -> None:
    from transformers import AutoProcessor

    model_config = open_clip.get_model_config("tiny-clip")
    network = built("tiny-clip", model_config)
    tokenizer = SimpleTokenizer(context_length=32)
    notes = write_transformers(tmp_path, model_config, network.state_dict(), PREPARED, tokenizer)
    assert notes == []
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor).__name__ == "CLIPProcessor"
    found = processor(text=TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    own_BL = tokenizer(TEXTS)
    for row, mask in enumerate(found.attention_mask.bool()):
        assert found.input_ids[row][mask].tolist() == own_BL[row][mask].tolist()
        assert own_BL[row][~mask].eq(0).all()
    image = Image.effect_noise((48, 64), 80).convert("RGB")
    theirs = processor(images=image, return_tensors="pt").pixel_values[0]
    ours = PREPARED.normalise(PREPARED.resize(image)[None] / 255)[0]
    assert ((ours - theirs).abs() * torch.tensor(PREPARED.std)[:, None, None]).max() < 2.5 / 255


def test_a_siglip_folder_is_written_with_its_own_tokenizer_and_says_how_texts_are_cleaned(
    siglip_folder: Path, tmp_path: Path
) -> None:
    import transformers

    start = describe_transformers(siglip_folder)
    network, tokenizer = converted(start), loaded(start).tokenizer
    squash = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "squash", "bicubic")
    notes = write_transformers(tmp_path / "out", start.model_config, network.state_dict(), squash, tokenizer)
    assert any("canonicalize" in note for note in notes)
    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.importorskip(
            "sentencepiece", reason="transformers 4 reads a SigLIP tokenizer by sentencepiece, which is not here"
        )
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(processor).__name__ == "SiglipProcessor"
    found = processor(text=["red dress"], padding="max_length", max_length=12, return_tensors="pt")
    assert found.input_ids.tolist() == tokenizer(["red dress"]).tolist()
    again = describe_transformers(tmp_path / "out")
    assert again.model_config == start.model_config
    assert again.preprocessing == {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


def test_a_logit_bias_that_clip_model_has_not_is_said_to_be_left_out(tmp_path: Path) -> None:
    model_config = {**open_clip.get_model_config("tiny-clip"), "init_logit_bias": -9.5}
    network = built("tiny-clip", model_config)
    (note,) = write_transformers(tmp_path, model_config, network.state_dict(), PREPARED, SimpleTokenizer(context_length=32))
    assert "-9.5" in note


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("tiny-sig", "vision_cfg.pool_type = 'avg'"),
        ("RN50", "vision_cfg.layers"),
        ("MobileCLIP-S1", "fastvit_mci1"),
        ("coca_ViT-B-32", "multimodal_cfg"),
        ("roberta-ViT-B-32", "hf_model_name"),
        ("EVA02-B-16", "timm_model_name"),
        ("convnext_base", "timm_model_name"),
    ],
)
def test_an_architecture_without_a_counterpart_is_refused_with_the_reason(tmp_path: Path, name: str, named: str) -> None:
    model_config = open_clip.get_model_config(name)
    said = message(lambda: write_transformers(tmp_path / "out", model_config, {}, PREPARED, SimpleTokenizer()))
    assert named in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-B-16-SigLIP", "ViT-B-16-SigLIP2-384"]
)
def test_a_published_architecture_is_found_again_by_what_is_written_of_it(name: str) -> None:
    from transformers import CLIPConfig, SiglipConfig

    model_config = open_clip.get_model_config(name)
    written = transformers_config(model_config)
    config = (SiglipConfig if "SigLIP" in name else CLIPConfig).from_dict(written).to_dict()
    found, model_config_found = find_architecture(config, "it")
    assert found == name
    assert model_config_found == model_config


def test_openclip_s_own_call_is_not_given_for_a_folder_of_transformers(tmp_path: Path) -> None:
    save(clip_config(), tmp_path)
    assert find_start(f"local-dir:{tmp_path}").is_of_transformers
    assert loading_call(f"local-dir:{tmp_path}", "default") is None
