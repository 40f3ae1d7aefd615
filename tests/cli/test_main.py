"""The command line: mistakes are one line and status 2, and the ways that work do what they say."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fashionclip_tune.cli.flags import user_errors
from fashionclip_tune.cli.main import main
from fashionclip_tune.config.section import assignments
from fashionclip_tune.data.index import index_path
from fashionclip_tune.data.shards import find_dataset
from fashionclip_tune.errors import BadDataError, DivergedError, UserError

ROOT = Path(__file__).parents[2]


class Shop:
    """Twelve photos and a table of them."""

    def __init__(self, folder: Path) -> None:
        self.table, self.images, self.out = folder / "items.csv", folder / "images", folder / "shards"
        self.images.mkdir()
        with open(self.table, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "title", "product_id"])
            for number in range(12):
                Image.new("RGB", (40, 60), (20 * number, 30, 200)).save(self.images / f"{number}.jpg")
                writer.writerow([f"{number}.jpg", f"dress number {number}", f"P{number}"])

    @property
    def arguments(self) -> list[str]:
        return ["prepare", "--table", str(self.table), "--images", str(self.images), "--out", str(self.out)]


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


TrainArguments = Callable[..., list[str]]


@pytest.fixture
def train_arguments(garments: Path, tmp_path: Path) -> TrainArguments:
    def arguments(*more: str, data: Path = garments, **settings: object) -> list[str]:
        short = {
            "clip_model": "tiny-clip",
            "device": "cpu",
            "model.pretrained": "none",
            "training.batch_size": 16,
            "training.num_workers": 0,
            "training.max_steps": 2,
            "hardware.threads": 1,
        }
        assigned = [part for path, value in short.items() for part in ("--set", f"{path}={value}")]
        return ["train", "--data", str(data), "--out", str(tmp_path / "run"), *assigned, *more]

    return arguments


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    written = capsys.readouterr()
    lines = written.err.splitlines()
    assert len(lines) == 1, written.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in written.err + written.out
    return lines[0]


def test_prepare_writes_shards_and_says_how_many(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    main([*shop.arguments, "--valid-share", "0.25", "--test-share", "0.25"])
    assert "12" in capsys.readouterr().out
    described = json.loads((shop.out / "dataset.json").read_text())["splits"]
    assert sum(split["samples"] for split in described.values()) == 12
    assert find_dataset(shop.out).train


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda shop: shop.table.write_text("picture_of,words\na.jpg,b\n"), "picture_of"),
        (lambda shop: shop.images.rename(shop.images.with_name("moved")), "images"),
        (lambda shop: shop.table.unlink(), "items.csv"),
        (lambda shop: shop.table.write_text(""), "items.csv"),
        (lambda shop: [path.unlink() for path in shop.images.iterdir()], "images"),
    ],
    ids=["no such column", "no folder", "no table", "empty table", "no photos"],
)
def test_prepare_refuses(shop: Shop, capsys: pytest.CaptureFixture[str], change: Callable[[Shop], None], named: str) -> None:
    change(shop)
    assert named in refused(capsys, shop.arguments)


def test_prepare_refuses_a_column_that_is_not_there(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, [*shop.arguments, "--caption-column", "headline"])
    assert "headline" in text
    assert "title" in text


def test_synthesize_writes_a_data_set_and_does_not_write_over_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "garments"
    arguments = ["synthesize", "--out", str(out), "--num-products", "10", "--views-per-product", "1", "--image-size", "16"]
    main(arguments)
    assert str(out) in capsys.readouterr().out
    assert json.loads((out / "dataset.json").read_text())["splits"]["train"]["samples"] == 8
    before = sorted((path, path.stat().st_mtime_ns) for path in out.iterdir())
    assert str(out) in refused(capsys, arguments)
    assert sorted((path, path.stat().st_mtime_ns) for path in out.iterdir()) == before
    arguments[arguments.index("10")] = "1"
    arguments[2] = str(tmp_path / "other")
    assert "num_products" in refused(capsys, arguments)


def test_train_lists_what_it_could_not_read_and_reads_from_copies(
    train_arguments: TrainArguments, garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(garments, data)
    shard = data / "clip_dataset_train_aug.000000.tar"
    damaged = bytearray(shard.read_bytes())
    for start in [place for place in range(0, len(damaged), 512) if damaged[place : place + 3] == b"\xff\xd8\xff"][:2]:
        damaged[start : start + 2] = b"no"
    shard.write_bytes(damaged)
    index_path(shard).unlink(missing_ok=True)
    scratch = tmp_path / "scratch"
    settings = ["--set", "training.max_bad_share=0.1", "--set", "training.max_steps=20"]
    main(train_arguments("--scratch", str(scratch), *settings, data=data))
    lines = capsys.readouterr().out.splitlines()
    (said,) = (number for number, line in enumerate(lines) if line.startswith("2 samples could not be read"))
    assert "(2 not a decodable image); all are in" in lines[said]
    listed = (tmp_path / "run" / "bad_samples.csv").read_text().splitlines()
    assert listed[0] == "shard,key,reason"
    assert len(listed) == 3
    for line in lines[said + 1 : said + 3]:
        assert line.startswith(f"  {shard.name}: ")
    assert len(list(scratch.glob("shards/*.tar"))) == 2


def test_train_prints_each_evaluation_and_where_the_weights_are_and_resumes(
    train_arguments: TrainArguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(train_arguments())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["step", "0"],
        ["step", "2"],
        ["recall_at_10", lines[1].split()[5] + ":"],
        ["weights:", str(tmp_path / "run" / "checkpoints" / "step_00000002")],
    ]
    zero_shot, last = (float(line.split()[5]) for line in lines[:2])
    assert f": instance among 20 photos, 20 texts; zero-shot {zero_shot:.4f}, gain " in lines[2]
    assert float(lines[2].split("gain ")[1].split()[0]) == pytest.approx(last - zero_shot, abs=2e-4)
    assert "holds a run already" in refused(capsys, train_arguments())
    main(train_arguments("--resume"))
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [line.split()[:2] for line in lines[1:]]
    assert "training.learning_rate" in refused(capsys, train_arguments("--resume", "--set", "training.learning_rate=0.5"))


def test_train_says_in_words_that_the_untouched_weights_were_better(
    train_arguments: TrainArguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(train_arguments("--set", "training.learning_rate=1e-3", "--set", "training.max_steps=60"))
    weights = tmp_path / "run" / "checkpoints" / "step_00000060" / "model.safetensors"
    capsys.readouterr()
    ruin = ("--set", f"model.pretrained={weights}", "--set", "training.learning_rate=1", "--out", str(tmp_path / "worse"))
    main(train_arguments(*ruin))
    lines = capsys.readouterr().out.splitlines()
    zero_shot, last = (float(line.split()[5]) for line in lines[:2])
    assert last < zero_shot
    call = f'open_clip.create_model_and_transforms("tiny-clip", pretrained="{weights}")'
    assert lines[-2] == f"the trained weights are below zero-shot: use the zero-shot ones, {call}"


@pytest.mark.parametrize(
    ("assignment", "named"),
    [
        ("training.learningrate=3", "training.learningrate"),
        ("training.learning_rate=fast", "training.learning_rate = 'fast'"),
        ("training.batch_size=0", "training.batch_size"),
        ("training.batch_size=10000", "training.batch_size"),
        ("loss_function=triplet", "siglip"),
        ("training.epochs", "PATH=VALUE"),
        ("clip_model=ViT-B-33", "ViT-B-33"),
        ("model.pretrained=default", "fashionclip_tune pretrain"),
        ("train_shards_pattern=nothing.{000000..000002}.tar", "nothing.000000.tar"),
        ("train_shards_pattern=pipe:touch x", "pipe"),
        ("train_shards_pattern=a.{000000..", "unbalanced"),
        ("device=tpu", "device"),
    ],
)
def test_train_refuses(
    train_arguments: TrainArguments,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    assignment: str,
    named: str,
) -> None:
    assert named in refused(capsys, train_arguments("--set", assignment))
    assert not (tmp_path / "run").exists(), "checked before anything is written"


def test_train_refuses_a_data_folder_without_shards(
    train_arguments: TrainArguments, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in refused(capsys, train_arguments(data=empty))
    assert str(tmp_path / "nowhere") in refused(capsys, train_arguments(data=tmp_path / "nowhere"))
    (empty / "clip_dataset_train.000000.tar").write_bytes(b"no tar")
    (empty / "clip_dataset_valid.000000.tar").write_bytes(b"no tar")
    assert "clip_dataset_train.000000.tar" in refused(capsys, train_arguments(data=empty))


def test_an_output_that_is_a_file_is_refused(
    train_arguments: TrainArguments, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "run").write_text("a file")
    assert str(tmp_path / "run") in refused(capsys, train_arguments())
    assert str(tmp_path / "run") in refused(capsys, ["synthesize", "--out", str(tmp_path / "run"), "--num-products", "10"])


@pytest.mark.parametrize("error", [BadDataError("3 of 9 samples:\n  a: b"), DivergedError("the loss is nan")])
def test_a_run_that_failed_says_so_with_status_1(capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    with pytest.raises(SystemExit) as ended, user_errors():
        raise error
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"stopped: {error}\n"


def test_an_error_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(KeyError), user_errors():
        raise KeyError("a bug")


def test_assignments() -> None:
    assert assignments(["a.b = 3 ", "c=x=y", "d="]) == {"a.b": "3", "c": "x=y", "d": ""}
    with pytest.raises(UserError, match=r"'a\.b'.*PATH=VALUE"):
        assignments(["a.b"])


def test_in_a_process_of_its_own_a_mistake_is_one_line_and_status_2(garments: Path, tmp_path: Path) -> None:
    """With a tag that cannot be fetched: libraries below like to log, too."""
    command = [sys.executable, "-m", "fashionclip_tune", "train", "--data", str(garments), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([*command, "--set", "device=cpu"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ended.returncode == 2
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("error: ")
    assert "laion2b_s34b_b79k" in lines[0]
    assert not (tmp_path / "run").exists()


def test_help_and_the_sweeps_scripts_do_not_load_torch(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    for command in (
        [sys.executable, str(ROOT / "sweeps" / "run_sweep.py"), "--help"],
        [sys.executable, str(ROOT / "sweeps" / "compare.py"), "--help"],
        [sys.executable, "-m", "fashionclip_tune", "train", "--help"],
    ):
        ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.startswith("usage: ")
        loaded = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
        assert "fashionclip_tune.cli.flags" in loaded
        assert not loaded & {"torch", "open_clip", "ray", "optuna"}
