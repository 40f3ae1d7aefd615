"""No Python file that a model's folder names is run, whatever its description asks for, and nobody is asked for leave."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.architecture import check_model_options, meta_model
from fashionclip_tune.models.foreign_code import no_foreign_code
from fashionclip_tune.models.named_model import named_model
from fashionclip_tune.models.openclip import export_openclip, fetch_weights, load_model, load_random_model
from fashionclip_tune.storage.checkpoint import save_best

WEIGHTS = "open_clip_model.safetensors"
# As its first act, it leaves a mark.
BOMB = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import BertConfig, PreTrainedTokenizerFast
class Theirs(PreTrainedTokenizerFast): pass
class TheirConfig(BertConfig): model_type = "theirs"
"""
TOKENIZER_MAP = {"AutoTokenizer": [None, "theirs.Theirs"]}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "was-run"


@pytest.fixture
def folder(tiny_config: ProjectConfig, tmp_path: Path, marker: Path) -> Path:
    """An OpenCLIP folder with a tokenizer that only its own Python file can load. It asks for nothing yet."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "red": 2}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "theirs"
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    export_openclip(load_model(tiny_config), folder)
    (folder / "theirs.py").write_text(BOMB.format(marker=str(marker)))
    change(folder / "tokenizer_config.json", lambda content: content.update(tokenizer_class="Theirs", auto_map=TOKENIZER_MAP))
    change(folder / "open_clip_config.json", lambda content: text(content).update(hf_tokenizer_name="theirs/on-the-hub"))
    return folder


def change(path: Path, how: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    how(content)
    path.write_text(json.dumps(content))


def text(described: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = described["model_cfg"]["text_cfg"]
    return found


def trusting(folder: Path, value: object = True) -> Path:
    change(
        folder / "open_clip_config.json", lambda content: text(content).update(tokenizer_kwargs={"trust_remote_code": value})
    )
    return folder


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def checkpoint_of(config: ProjectConfig, folder: Path, place: Path) -> Path:
    record = {"step": 1, "fingerprint": "f", "config": config.to_dict(), "history": []}
    return save_best(place, load_file(folder / WEIGHTS), record)


WAYS: dict[str, Callable[[ProjectConfig, Path], object]] = {
    "local-dir": lambda config, folder: load_model(
        config.with_overrides({"clip_model": f"local-dir:{folder}", "model.pretrained": "default"})
    ),
    "local-dir, random weights": lambda config, folder: load_random_model(
        config.with_overrides({"clip_model": f"local-dir:{folder}"})
    ),
    "pretrained": lambda config, folder: load_model(config.with_overrides({"model.pretrained": str(folder)})),
    "fetched": lambda config, folder: fetch_weights(config.with_overrides({"model.pretrained": str(folder)})),
    "evaluated": lambda config, folder: named_model(str(folder), config),
    "evaluated by name": lambda config, folder: named_model(f"local-dir:{folder}", config),
    "a checkpoint": lambda config, folder: named_model(
        str(
            checkpoint_of(
                config.with_overrides({"clip_model": f"local-dir:{folder}", "model.pretrained": "default"}),
                folder,
                folder.parent / "checkpoints",
            )
        ),
        config,
    ),
    "planned": lambda config, folder: check_model_options(
        config.with_overrides({"clip_model": f"local-dir:{folder}", "freeze.image_blocks": 1})
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_that_asks_for_its_code_is_refused(tiny_config: ProjectConfig, folder: Path, marker: Path, way: str) -> None:
    said = message(lambda: WAYS[way](tiny_config, trusting(folder)))
    assert str(folder / "open_clip_config.json") in said
    assert "model_cfg.text_cfg.tokenizer_kwargs.trust_remote_code" in said
    assert "tokenizer.json" in said
    assert not marker.exists()


def test_the_code_is_live(folder: Path, marker: Path, tmp_path: Path) -> None:
    code = "import open_clip, sys; open_clip.get_tokenizer('local-dir:' + sys.argv[1])"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code, trusting(folder)], check=True, timeout=120, env=environment)
    assert marker.exists()


@pytest.mark.parametrize("value", ["true", "false", 1, "", {"yes": True}])
def test_any_answer_but_a_plain_no_is_a_yes(tiny_config: ProjectConfig, folder: Path, value: object) -> None:
    assert "trust_remote_code" in message(lambda: WAYS["pretrained"](tiny_config, trusting(folder, value)))


@pytest.mark.parametrize("place", ["model_cfg", "preprocess_cfg"])
def test_a_flag_is_found_wherever_it_stands(tiny_config: ProjectConfig, folder: Path, place: str) -> None:
    asking = {"deep": [{"er": {"trust_remote_code": True}}]}
    change(folder / "open_clip_config.json", lambda content: content[place].update(asking))
    assert f"{place}.deep.er.trust_remote_code" in message(lambda: WAYS["pretrained"](tiny_config, folder))


@pytest.mark.parametrize("answer", [None, False])
def test_who_asks_for_nothing_is_not_asked_and_not_run(folder: Path, marker: Path, answer: bool | None) -> None:
    """transformers would ask at the keyboard: there, somebody waits to say yes."""
    if answer is not None:
        trusting(folder, answer)
    # In the place of a tokenizer's class, transformers takes one that it knows.
    change(folder / "tokenizer_config.json", lambda content: content.pop("tokenizer_class"))
    (folder / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.TheirConfig"}}))
    code = (
        "import sys; from fashionclip_tune.config.project import ProjectConfig\n"
        "from fashionclip_tune.models.named_model import named_model\n"
        "from fashionclip_tune.errors import UserError\n"
        "try: named_model(sys.argv[1], ProjectConfig())\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder], input="y\n" * 10, capture_output=True, text=True, timeout=120, check=True
    )
    assert "run the custom code" not in done.stdout + done.stderr
    (line,) = done.stdout.splitlines()
    assert str(folder) in line
    assert "auto_map" in line
    assert "trust_remote_code" not in line, "there is no such setting here"
    assert not marker.exists()


def test_where_transformers_can_do_without_that_is_said_and_handed_on_without(
    tiny_config: ProjectConfig, folder: Path, marker: Path, tmp_path: Path
) -> None:
    change(folder / "tokenizer_config.json", lambda content: content.update(tokenizer_class="PreTrainedTokenizerFast"))
    with pytest.warns(UserWarning, match="names Python files .*auto_map.*not run"):
        loaded = load_model(tiny_config.with_overrides({"model.pretrained": str(folder)}))
    assert loaded.tokenizer(["red red"])[0, :3].tolist() == [2, 2, 0]
    export_openclip(loaded, tmp_path / "best")
    assert not any("auto_map" in path.read_text() for path in (tmp_path / "best").glob("*.json"))
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path / 'best'}")(["red"]), loaded.tokenizer(["red"]))
    assert not marker.exists()


def test_a_text_tower_of_transformers_brings_no_code(tiny_config: ProjectConfig, folder: Path, marker: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.TheirConfig"}}))
    change(folder / "open_clip_config.json", lambda content: text(content).update(hf_model_name=str(folder)))
    config = tiny_config.with_overrides({"clip_model": f"local-dir:{folder}", "model.pretrained": "default"})
    assert "model_type = 'theirs'" in message(lambda: load_model(config))
    assert not marker.exists()


@pytest.mark.parametrize(
    "place", ["hf-hub:somebody/tower", "HF_HUB:somebody/tower", "local-dir:/nowhere/tower", "hf-hub:somebody/here"]
)
def test_a_folder_whose_tower_is_described_elsewhere_is_refused(
    tiny_config: ProjectConfig, folder: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one stands, there may be a folder of a repository's name."""
    (tmp_path / "somebody" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    change(folder / "open_clip_config.json", lambda content: content["model_cfg"]["vision_cfg"].update(timm_model_name=place))
    for way in WAYS.values():
        assert "which is described elsewhere" in message(lambda way=way: way(tiny_config, folder))


def test_a_folder_whose_text_tower_is_described_elsewhere_is_refused(tiny_config: ProjectConfig, folder: Path) -> None:
    change(folder / "open_clip_config.json", lambda content: text(content).update(hf_model_name="somebody/tower"))
    for way in WAYS.values():
        said = message(lambda way=way: way(tiny_config, folder))
        assert "'somebody/tower', which is described elsewhere" in said
        assert "roberta-base" in said


BACKBONE = {"use_timm_backbone": False, "backbone": "somebody/else", "use_pretrained_backbone": True, "backbone_config": None}


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"model_type": "table-transformer", "is_encoder_decoder": True, **BACKBONE}, "model_type = 'table-transformer'"),
        ({"model_type": "timm_backbone", "is_encoder_decoder": True, "backbone": "hf-hub:somebody/else"}, "'timm_backbone'"),
        ({"model_type": "roberta", "attn_implementation": "somebody/kernel"}, "attn_implementation = 'somebody/kernel'"),
    ],
)
def test_a_text_tower_in_a_folder_names_no_network_on_the_hub(
    tiny_config: ProjectConfig, folder: Path, described: dict[str, Any], said: str
) -> None:
    (folder / "config.json").write_text(json.dumps(described))
    change(folder / "open_clip_config.json", lambda content: text(content).update(hf_model_name=str(folder)))
    for way in WAYS.values():
        assert said in message(lambda way=way: way(tiny_config, folder))


@pytest.mark.parametrize("name", ["AutoModel", "AutoModelFast", "TableTransformerModel"])
def test_a_tokenizer_is_of_no_other_class(tiny_config: ProjectConfig, folder: Path, name: str) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "table-transformer", **BACKBONE}))
    change(folder / "tokenizer_config.json", lambda content: (content.pop("auto_map"), content.update(tokenizer_class=name)))
    said = message(lambda: WAYS["local-dir"](tiny_config, folder))
    assert str(folder) in said
    assert "as its tokenizer_class, which is no tokenizer of transformers" in said


def test_a_text_tower_that_cannot_be_had_is_a_mistake_of_the_name(folder: Path) -> None:
    """No hub is reached here, so nobody knows what the text tower looks like."""
    change(folder / "open_clip_config.json", lambda content: text(content).update(hf_model_name="roberta-base"))
    wanted = "the description of the text tower of roberta-base (config.json) is not on this machine"
    assert wanted in message(lambda: meta_model(f"local-dir:{folder}"))


def test_elsewhere_transformers_is_as_it_was() -> None:
    from transformers import dynamic_module_utils

    before = dict(vars(dynamic_module_utils))
    with pytest.raises(KeyError), no_foreign_code("x"):
        raise KeyError
    assert dict(vars(dynamic_module_utils)) == before


class Bomb:
    """Its unpickling makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "pytorch_model.pth", "other.bin"])
@pytest.mark.parametrize("way", ["local-dir", "pretrained", "evaluated"])
def test_pickled_weights_of_a_folder_are_read_and_nothing_in_them_is_run(
    tiny_config: ProjectConfig, tmp_path: Path, marker: Path, way: str, name: str
) -> None:
    folder = tmp_path / "pickled"
    export_openclip(load_model(tiny_config.with_overrides({"training.seed": 7})), folder)
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / name)
    loaded = WAYS[way](tiny_config, folder)
    state = getattr(loaded, "loaded", loaded).network.state_dict()
    assert all(torch.equal(state[key], weights[key]) for key in weights)

    torch.save({"state_dict": weights, "more": Bomb(marker)}, folder / name)
    assert "could run code" in message(lambda: WAYS[way](tiny_config, folder))
    assert not marker.exists()
