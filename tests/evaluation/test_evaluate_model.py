"""``evaluate`` on the command line: the same figures as in a run, from whatever names a model; and the test split's guard."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fashionclip_tune.cli.main import main
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.models.openclip import export_openclip, load_model, load_weights
from fashionclip_tune.training.callbacks import TrainResult
from fashionclip_tune.training.train import train

SETTINGS = ("--set", "device=cpu", "--set", "hardware.threads=1", "--set", "model.pretrained=none")


@pytest.fixture(scope="module")
def trained(garments: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """tiny-sig with the sigmoid loss: it has a bias that its architecture alone has not. Do not change it."""
    config = ProjectConfig(clip_model="tiny-sig", loss_function="siglip", dataset_root=garments, device="cpu").with_overrides(
        {
            "model.pretrained": None,
            "training.batch_size": 16,
            "training.num_workers": 0,
            "training.learning_rate": 1e-3,
            "training.max_steps": 6,
            "hardware.threads": 1,
        }
    )
    return train(config, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def evaluate(garments: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def run(model: object, *more: str, data: Path = garments) -> dict[str, Any]:
        main(["evaluate", "--model", str(model), "--data", str(data), *SETTINGS, "--json", "-", *more])
        printed = capsys.readouterr().out
        parsed: dict[str, Any] = json.loads(printed)
        return parsed

    return run


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *map(str, arguments), *SETTINGS])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return str(line)


def recalls(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name.startswith(("recall", "median", "mean", "num_", "protocol"))}


def test_a_run_its_checkpoint_and_its_export_have_the_figures_of_the_run(
    trained: TrainResult, evaluate: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    in_the_run = recalls(trained.metrics)
    for model in (trained.out_dir, trained.checkpoint, trained.checkpoint / "model.safetensors"):
        report = evaluate(model, "--protocol", "instance")
        assert [recalls(figures) for figures in report["figures"]] == [in_the_run]
        assert [recalls(figures) for figures in report["untouched"]] == [recalls(trained.history[0])]
        assert report["architecture"] == "tiny-sig"

    loaded = load_model(ProjectConfig.from_dict(json.loads((trained.out_dir / "config.json").read_text())))
    load_weights(loaded.network, trained.checkpoint / "model.safetensors")
    export_openclip(loaded, tmp_path / "sweep" / "best")
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    for model in (tmp_path / "sweep" / "best", tmp_path / "sweep"):
        report = evaluate(model, "--protocol", "instance")
        assert [recalls(figures) for figures in report["figures"]] == [in_the_run]
        assert (report["architecture"], report["untouched"], report["gains"]) == ("tiny-sig", None, None)

    # Of a whole sweep, it is known what its best trial started from.
    trial = tmp_path / "sweep" / "trials" / "0003-tiny-sig-siglip"
    trial.mkdir(parents=True)
    shutil.copy(trained.out_dir / "config.json", trial)
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"state": "FINISHED", "best": {"trial_id": "0003"}}))
    for model in (tmp_path / "sweep" / "best", tmp_path / "sweep"):
        report = evaluate(model, "--protocol", "instance")
        assert [recalls(figures) for figures in report["figures"]] == [in_the_run]
        assert [recalls(figures) for figures in report["untouched"]] == [recalls(trained.history[0])]


def test_a_run_that_started_from_another_is_compared_with_what_it_started_from(
    trained: TrainResult, evaluate: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    config = ProjectConfig.from_dict(json.loads((trained.out_dir / "config.json").read_text()))
    further = {"should_load_checkpoint": True, "checkpoint_path": str(trained.checkpoint), "training.max_steps": 2}
    second = train(config.with_overrides(further), tmp_path / "second")
    report = evaluate(second.out_dir, "--protocol", "instance")
    assert [recalls(figures) for figures in report["untouched"]] == [recalls(second.history[0])] == [recalls(trained.metrics)]
    (gain,) = report["gains"]
    before, after = trained.metrics["recall_at_10"], second.metrics["recall_at_10"]
    assert gain["absolute"] == after - before
    assert gain["relative"] == pytest.approx((after - before) / before)
    assert gain["low"] <= gain["absolute"] <= gain["high"]


@pytest.mark.parametrize(("learning_rate", "said"), [(1e-30, "gain +0.0000 (+0.0%), a tie (p 1.0000)"), (3e-3, "than chance")])
def test_a_gain_inside_chance_is_called_a_tie(
    garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], learning_rate: float, said: str
) -> None:
    """Measured on the photos that it was trained on, where five epochs show."""
    config = ProjectConfig(clip_model="tiny-clip", dataset_root=garments, device="cpu").with_overrides(
        {
            "model.pretrained": None,
            "training.batch_size": 32,
            "training.num_workers": 0,
            "training.learning_rate": learning_rate,
            "training.weight_decay": 0.0,
            "training.max_steps": 1 if learning_rate < 1e-9 else 40,
            "hardware.threads": 1,
        }
    )
    result = train(config, tmp_path / "run")
    capsys.readouterr()
    arguments = ("--split", "train", "--protocol", "product")
    main(["evaluate", "--model", str(result.out_dir), "--data", str(garments), *SETTINGS, *arguments])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("product: "))
    assert said in line


def copied(trained: TrainResult, folder: Path) -> Path:
    """The run's checkpoint elsewhere, with what is beside it."""
    return Path(shutil.copytree(trained.checkpoint.parent, folder / "checkpoints")) / trained.checkpoint.name


def test_a_checkpoint_without_the_table_beside_it_is_refused_with_what_to_bring(
    trained: TrainResult, garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of its token table it has the trained rows only; another run's table would not do."""
    alone = shutil.copytree(trained.checkpoint, tmp_path / "run" / "step_00000001")
    text = refused(capsys, "--model", alone, "--data", garments)
    place = tmp_path / "run" / "token_table" / "model.safetensors"
    assert f"text.token_embedding.weight were trained, and their table is not here: it belongs in {place}" in text
    place.parent.mkdir()
    name = "text.token_embedding.weight"
    save_file({name: torch.zeros_like(load_file(trained.checkpoint.parent / "token_table" / place.name)[name])}, place)
    assert "their table is another one now" in refused(capsys, "--model", alone, "--data", garments)


def test_a_checkpoint_of_an_ended_trial_will_do_and_its_own_preprocessing_counts(
    trained: TrainResult, evaluate: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    stripped = copied(trained, tmp_path)
    (stripped / "training_state.pt").unlink()
    assert recalls(evaluate(stripped, "--protocol", "instance")["figures"][0]) == recalls(trained.metrics)
    record = json.loads((stripped / "checkpoint.json").read_text())
    record["preprocessing"]["mean"] = [0.1, 0.9, 0.2]
    (stripped / "checkpoint.json").write_text(json.dumps(record))
    changed = evaluate(stripped, "--protocol", "instance")
    assert recalls(changed["figures"][0]) != recalls(trained.metrics)
    assert recalls(changed["untouched"][0]) == recalls(trained.history[0])


def test_an_architecture_by_name_several_protocols_and_a_larger_gallery(evaluate: Callable[..., dict[str, Any]]) -> None:
    report = evaluate("tiny-clip", "--protocol", "product", "--protocol", "all_captions", "--gallery", "all")
    assert [figures["protocol"] for figures in report["figures"]] == ["product", "all_captions"]
    assert [(f["num_pairs"], f["num_gallery_images"], f["num_gallery_texts"]) for f in report["figures"]] == [
        (20, 200, 100),
        (20, 200, 600),
    ]
    assert report["untouched"] is None
    assert (report["split"], report["gallery"], report["precision"], report["not_readable"]) == ("valid", "all", "fp32", [])


def test_the_table_says_protocol_interval_gain_and_pool(
    trained: TrainResult, garments: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    written = tmp_path / "figures.json"
    main(["evaluate", "--model", str(trained.out_dir), "--data", str(garments), *SETTINGS, "--json", str(written)])
    out = capsys.readouterr().out
    instance, product = json.loads(written.read_text())["figures"]
    assert (instance["protocol"], product["protocol"]) == ("instance", "product")
    line = next(line for line in out.splitlines() if line.startswith("instance: "))
    assert f"recall_at_10 {instance['recall_at_10']:.4f}, 95 % interval {instance['recall_at_10_low']:.4f} to " in line
    assert "(10 products); zero-shot 0." in line
    assert "gain " in line
    row = next(line for line in out.splitlines() if line.startswith("product") and "text to image" in line)
    assert row.split()[4:] == [
        *(f"{product[f'recall_at_{k}_text_to_image']:.4f}" for k in (1, 5, 10)),
        f"{product['median_rank_text_to_image']:g}",
        "10",
        "20",
    ]
    assert all(len(line) <= 80 for line in out.splitlines() if "to image" in line or "to text" in line)


def test_the_test_split_is_used_by_those_who_say_so_and_each_use_is_noted(
    evaluate: Callable[..., dict[str, Any]], garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(garments, tmp_path / "data")
    notes = data / "test_split_uses.jsonl"
    text = refused(capsys, "--model", "tiny-clip", "--data", data, "--split", "test")
    assert "--use-test-split" in text
    assert not notes.exists()
    candidates = ("--split", "test", "--use-test-split", "--protocol", "candidates_101")
    assert "needs 100 photos" in refused(capsys, "--model", "tiny-clip", "--data", data, *candidates)
    assert not notes.exists(), "what cannot be measured is no use"
    first = evaluate("tiny-clip", "--split", "test", "--use-test-split", data=data)
    assert first["notes"] == ["the test split was used for the first time, as far as is noted"]
    second = evaluate("tiny-sig", "--split", "test", "--use-test-split", data=data)
    uses = [json.loads(line) for line in notes.read_text().splitlines()]
    assert [use["model"] for use in uses] == ["tiny-clip", "tiny-sig"]
    assert all(use["user"] and use["host"] and use["time"].startswith("20") for use in uses)
    assert "used once before" in second["notes"][0]
    assert uses[0]["time"] in second["notes"][0]
    evaluate("tiny-clip", data=data)
    assert len(notes.read_text().splitlines()) == 2, "the validation split needs no leave"


def test_where_the_data_cannot_be_written_the_note_is_kept_in_the_cache(
    evaluate: Callable[..., dict[str, Any]], garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shutil.copytree(garments, tmp_path / "data")
    (data / "test_split_uses.jsonl").mkdir()  # root may write to a read-only folder, but nobody into a folder
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path / "cache"))
    assert "first time" in evaluate("tiny-clip", "--split", "test", "--use-test-split", data=data)["notes"][0]
    assert "used once before" in evaluate("tiny-clip", "--split", "test", "--use-test-split", data=data)["notes"][0]
    (noted,) = (tmp_path / "cache" / "test_split_uses").iterdir()
    assert len(noted.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--model", "ViT-B-33"), "ViT-B-33"),
        (("--model", "runs/gone"), "clip_model = 'runs/gone': there is no such folder"),
        (("--model", "tiny-clip", "--json", "/"), "--json / cannot be written"),
        (("--model", "tiny-clip", "--json", "nowhere/figures.json"), "--json nowhere/figures.json cannot be written"),
        (("--model", "tiny-clip", "--protocol", "candidates_101"), "needs 100 photos of other products"),
        (("--model", "tiny-clip", "--protocol", "shop"), "all_captions"),
        (("--model", "tiny-clip", "--set", "evaluation.batch_size=0"), "evaluation.batch_size"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    garments: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], named: str
) -> None:
    assert named in refused(capsys, *arguments, "--data", garments)


def test_a_protocol_that_cannot_be_measured_does_not_take_the_others_down(
    evaluate: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate("tiny-clip", "--protocol", "candidates_101", "--protocol", "product", "--protocol", "instance")
    assert [figures["protocol"] for figures in report["figures"]] == ["product", "instance"]
    assert list(report["not_measured"]) == ["candidates_101"]
    assert "needs 100 photos of other products" in report["not_measured"]["candidates_101"]
    assert any(note.startswith("candidates_101: not measured: ") for note in report["notes"])


def test_folders_that_are_no_model_are_refused_by_name(
    trained: TrainResult, garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"local-dir:{tmp_path}' is no model" in refused(capsys, "--model", tmp_path, "--data", garments)
    (tmp_path / "checkpoint.json").write_text("{}")
    assert "checkpoint.json" in refused(capsys, "--model", tmp_path, "--data", garments)
    folder = tmp_path / "export"
    export_openclip(load_model(ProjectConfig(clip_model="tiny-clip").with_overrides({"model.pretrained": None})), folder)
    described = json.loads((folder / "open_clip_config.json").read_text())
    described["model_cfg"]["embed_dim"] = 48
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    text = refused(capsys, "--model", folder, "--data", garments)
    assert str(folder) in text
    assert "of another shape are 2 tensors, such as text_projection (wanted (96, 48), found (96, 96))" in text


def test_a_fresh_process_knows_the_architecture_of_a_tiny_tower_in_an_openclip_folder(tmp_path: Path) -> None:
    export_openclip(load_model(ProjectConfig(clip_model="tiny-sig").with_overrides({"model.pretrained": None})), tmp_path)
    code = "import sys; from fashionclip_tune.config.project import ProjectConfig; "
    code += "from fashionclip_tune.models.named_model import named_model; "
    code += "print(named_model(sys.argv[1], ProjectConfig()).loaded.name)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.stdout == "tiny-sig\n", done.stderr


def test_untouched_weights_that_are_gone_are_a_note_not_an_end(
    trained: TrainResult, evaluate: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    moved = copied(trained, tmp_path)
    record = json.loads((moved / "checkpoint.json").read_text())
    record["config"]["model.pretrained"] = str(tmp_path / "gone.safetensors")
    (moved / "checkpoint.json").write_text(json.dumps(record))
    report = evaluate(moved, "--protocol", "instance")
    assert recalls(report["figures"][0]) == recalls(trained.metrics)
    assert report["untouched"] is None
    assert "gone.safetensors" in report["notes"][0]


def test_unreadable_photos_are_listed_by_file_and_key(
    garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(garments, tmp_path / "data")
    from fashionclip_tune.data.index import load_index

    (shard,) = data.glob("*valid*.tar")
    index = load_index([shard])
    content = bytearray(shard.read_bytes())
    start, size = index.image_spans[5]
    content[start : start + size] = bytes(size)
    shard.write_bytes(content)
    arguments = ["evaluate", "--model", "tiny-clip", "--data", str(data), *SETTINGS]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    assert f"{shard.name}: {index.keys[5]}" in capsys.readouterr().err
    main([*arguments, "--set", "training.max_bad_share=0.1"])
    assert f"not readable: {shard.name}: {index.keys[5]}" in capsys.readouterr().out


def test_shards_of_other_names_are_named_by_patterns_as_in_training(
    garments: Path, evaluate: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "valid", "test"):
        (shard,) = garments.glob(f"clip_dataset_{split}*.tar")
        shutil.copy(shard, tmp_path / f"{split}.tar")
    patterns = ("--set", "train_shards_pattern=train.tar", "--set", "valid_shards_pattern=valid.tar")
    named = evaluate("tiny-clip", *patterns, data=tmp_path)
    assert [recalls(row) for row in named["figures"]] == [recalls(row) for row in evaluate("tiny-clip")["figures"]]
    of_train = evaluate("tiny-clip", "--split", "train", *patterns, data=tmp_path)
    assert of_train["figures"][0]["num_gallery_images"] == 160
    other = ("--set", "valid_eval_shards_pattern=test.tar")  # the metrics come from these, as in training
    assert evaluate("tiny-clip", *patterns, *other, data=tmp_path)["figures"][0]["num_gallery_images"] == 20
    assert "has no such shards, only train, valid" in refused(
        capsys, "--model", "tiny-clip", "--data", tmp_path, "--split", "test", "--use-test-split", *patterns
    )
