"""``prepare`` killed, started again, started twice, in a folder that is not its own; what is read back is what was written."""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from PIL import Image

from fashionclip_tune.data.shards import ShardSample, write_split
from fashionclip_tune.errors import UserError
from fashionclip_tune.prepare import prepare, shard_building
from fashionclip_tune.prepare.options import PrepareOptions
from fashionclip_tune.prepare.report import PrepareReport
from fashionclip_tune.prepare.shard_building import verify_shard

ROOT = Path(__file__).parents[2]


class Shop:
    """Noisy photos, so that decoding takes a while, in a table of their names."""

    def __init__(self, folder: Path, count: int, size: tuple[int, int] = (60, 80)) -> None:
        self.table, self.images, self.out = folder / "items.csv", folder / "images", folder / "shards"
        self.images.mkdir()
        with open(self.table, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "title", "product_id"])
            for number in range(count):
                photo = Image.effect_noise(size, 20 + number % 50).convert("RGB")
                photo.save(self.images / f"{number}.png", compress_level=1)
                writer.writerow([f"{number}.png", f"dress number {number}", f"P{number}"])
        (self.images / "3.png").write_bytes(b"broken")

    def prepare(self, **options: Any) -> PrepareReport:
        return prepare(PrepareOptions(**{"tables": (self.table,), "images": self.images, "out": self.out, **options}))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fashionclip_tune.prepare.pipeline.SAMPLES_PER_SHARD", 10)


@pytest.fixture
def shop(tmp_path: Path, small_shards: None) -> Shop:
    return Shop(tmp_path, 60)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_killed_prepare_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    shop = Shop(tmp_path, 2_600, (24, 32))
    assert shop.prepare(out=tmp_path / "whole", workers=1).splits_from is None
    command = [sys.executable, "-m", "fashionclip_tune", "prepare", "--table", shop.table, "--images", shop.images]
    command += ["--out", shop.out, "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(shop.out.glob(".prepare/clip_dataset_train.*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (shop.out / "dataset.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in shop.out.glob(".prepare/*.json")}
    assert 1 <= len(kept) < 5
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.startswith(f"going on: {len(kept)} of 5 shards are finished\n")
    assert ended.stderr == ""
    assert contents(shop.out) == contents(tmp_path / "whole")
    assert {name: (shop.out / ".prepare" / name).stat().st_mtime_ns for name in kept} == kept


def test_ctrl_c_ends_with_one_line(tmp_path: Path) -> None:
    shop = Shop(tmp_path, 160)
    Image.effect_noise((1500, 2000), 50).save(shop.images / "0.png", compress_level=1)
    for number in range(1, 160):
        (shop.images / f"{number}.png").unlink()
        (shop.images / f"{number}.png").hardlink_to(shop.images / "0.png")
    command = [sys.executable, "-m", "fashionclip_tune", "prepare", "--table", shop.table, "--images", shop.images]
    command += ["--out", shop.out, "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests that a shell runs in the background inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (shop.out / "prepare.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.startswith("\nstopped: the same command goes on\n")
    assert "KeyboardInterrupt" not in errors
    assert errors.count("\n") == 2


@pytest.mark.parametrize("seed", range(6))
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(shop: Shop, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Stopped by an error in one of the calls that change the folder, several times, with any number of workers."""
    whole = shop.prepare(out=shop.out.with_name("whole"), workers=1)
    rng = random.Random(seed)
    originals = {name: getattr(shard_building, name) for name in ("write_split", "verify_shard", "sync_folder", "write_json")}
    for attempt in range(3):
        (shop.out / f".prepare.json.{attempt}.tmp").parent.mkdir(exist_ok=True)
        (shop.out / f".prepare.json.{attempt}.tmp").touch()  # as a kill within write_json leaves it
        remaining = rng.randrange(1, 12)

        def stops(name: str) -> Any:
            def call(*given: Any, **named: Any) -> Any:
                nonlocal remaining
                remaining -= 1
                if remaining < 0:
                    raise KeyboardInterrupt
                return originals[name](*given, **named)

            return call

        for name in originals:
            monkeypatch.setattr(shard_building, name, stops(name))
        with pytest.raises(KeyboardInterrupt):
            shop.prepare(workers=1)
        assert not (shop.out / "dataset.json").exists()
    for name, original in originals.items():
        monkeypatch.setattr(shard_building, name, original)
    report = shop.prepare(workers=rng.choice([1, 2]))
    assert contents(shop.out) == contents(shop.out.with_name("whole"))
    assert report.dropped == whole.dropped == {"image cannot be decoded": ((5, "3.png"),)}
    assert report.data == whole.data


def test_started_again_when_finished_it_writes_no_shard_and_says_the_same(shop: Shop) -> None:
    first = shop.prepare()
    before = {path: path.stat().st_mtime_ns for path in shop.out.glob("*.tar")}
    notes: list[str] = []
    options = PrepareOptions(tables=(shop.table,), images=shop.images, out=shop.out)
    assert prepare(options, on_note=notes.append) == first
    assert {path: path.stat().st_mtime_ns for path in shop.out.glob("*.tar")} == before
    assert notes == [f"going on: {len(before)} of {len(before)} shards are finished"]


def test_a_shard_that_was_removed_or_cut_is_made_again(shop: Shop) -> None:
    shop.prepare()
    before = contents(shop.out)
    (shop.out / "clip_dataset_train.000000.tar").unlink()
    os.truncate(shop.out / "clip_dataset_train.000001.tar", 5_000)
    (shop.out / ".prepare" / "clip_dataset_train.000002.tar.json").write_text("{")
    shop.prepare()
    assert contents(shop.out) == before


def test_a_moved_folder_goes_on(shop: Shop, tmp_path: Path) -> None:
    shop.prepare()
    before = contents(shop.out)
    (shop.out / "clip_dataset_train.000000.tar").unlink()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in (shop.table, shop.images, shop.out):
        shutil.move(path, moved)
    shop.table, shop.images, shop.out = moved / "items.csv", moved / "images", moved / "shards"
    shop.prepare()
    assert contents(shop.out) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, r"--seed: 0, now 1\)"),
        ({"size": 100}, r"--size: 288, now 100\)"),
        ({"captions": ("{title}!",)}, r"--caption: \[\], now \['{title}!'\]"),
        ({"valid_share": 0.2}, r"--valid-share: 0.1, now 0.2"),
        ({"id_column": "title"}, r"--id-column: 'product_id', now 'title'"),
    ],
)
def test_other_arguments_in_the_folder_are_refused_and_nothing_is_touched(
    shop: Shop, options: dict[str, Any], message: str
) -> None:
    shop.prepare()
    before = contents(shop.out)
    with pytest.raises(UserError, match=rf"was begun with other input \({message}.*choose another --out, or remove it"):
        shop.prepare(**options)
    assert contents(shop.out) == before


def test_another_table_or_photo_is_refused(shop: Shop) -> None:
    shop.prepare()
    text = shop.table.read_text()
    shop.table.write_text(text.replace("dress number 7\n", "skirt number 7\n").replace("dress number 7,", "skirt number 7,"))
    with pytest.raises(UserError, match="the table, the photos or Pillow's version have changed since"):
        shop.prepare()
    shop.table.write_text(text)
    shop.prepare()
    Image.new("RGB", (90, 90)).save(shop.images / "9.png")
    with pytest.raises(UserError, match="the table, the photos or Pillow's version have changed since"):
        shop.prepare()


def test_two_at_once_are_refused(shop: Shop) -> None:
    shop.prepare()
    with FileLock(shop.out / ".prepare/lock"), pytest.raises(UserError, match="another prepare is at work there"):
        shop.prepare()


def test_a_folder_of_others_is_refused_and_kept(shop: Shop) -> None:
    shop.out.mkdir()
    (shop.out / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"is not empty \(thesis.txt\): choose another, or a new folder in it"):
        shop.prepare()
    assert contents(shop.out) == {"thesis.txt": b"precious"}
    (shop.out / "prepare.json").write_text("my notes")
    with pytest.raises(UserError, match="is not empty"):
        shop.prepare()
    (shop.out / "prepare.json").write_text("[1]")
    with pytest.raises(UserError, match="is not empty"):
        shop.prepare()
    assert (shop.out / "thesis.txt").exists()


def test_hidden_files_do_not_make_a_folder_foreign(shop: Shop) -> None:
    shop.out.mkdir()
    (shop.out / ".DS_Store").write_text("")
    shop.prepare()
    assert (shop.out / "dataset.json").is_file()


def test_useless_photos_leave_nothing_of_ours(shop: Shop) -> None:
    for path in shop.images.iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="image cannot be decoded"):
        shop.prepare()
    assert list(shop.out.iterdir()) == []


def test_a_full_disk_keeps_what_is_finished(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0

    def full(*given: Any, **named: Any) -> Any:
        nonlocal written
        written += 1
        if written == 3:
            raise OSError(28, "No space left on device")
        return write_split(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(shard_building, "write_split", full)
        with pytest.raises(UserError, match="No space left on device: make space and start the same command again"):
            shop.prepare()
    assert len(list(shop.out.glob("*.tar"))) == 2
    shop.prepare()
    assert (shop.out / "dataset.json").is_file()


def test_what_reads_back_differently_is_no_shard(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad_disk(out: Path, *given: Any, **named: Any) -> Any:
        described = write_split(out, *given, **named)
        path = out / described["shards"][0]
        data = bytearray(path.read_bytes())
        data[600] ^= 1  # in the first photo
        path.write_bytes(data)
        return described

    monkeypatch.setattr(shard_building, "write_split", bad_disk)
    with pytest.raises(UserError, match="reads back differently from what was written: is the disk sound"):
        shop.prepare()
    assert not list(shop.out.glob("*.tar"))


def test_every_kind_of_damage_is_seen(tmp_path: Path) -> None:
    samples = [ShardSample(key=f"k{i}", jpeg=bytes([i]) * 700, captions=("a",) * 12, product_id=f"P{i}") for i in range(3)]
    (name,) = write_split(tmp_path, "train", samples)["shards"]
    path = tmp_path / name
    verify_shard(path, samples)
    whole = path.read_bytes()
    for wrong in (samples[:2], samples[::-1], [*samples, samples[0]], [samples[0], samples[2], samples[1]]):
        with pytest.raises(UserError, match="is the disk sound"):
            verify_shard(path, wrong)
    with tarfile.open(path) as tar:
        used = max(member.offset_data + member.size for member in tar.getmembers())
        starts = [member.offset for member in tar.getmembers()]
    for cut in (0, 300, starts[4], starts[-1], starts[-1] + 600):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="is the disk sound"):
            verify_shard(path, samples)
    for position in [*range(0, used, 97), *starts]:
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        try:
            verify_shard(path, samples)
        except UserError:
            continue
        # What is zero is padding; byte 155 of a header is the blank after its sum.
        assert whole[position] == 0 or position % 512 == 155, f"byte {position} was not looked at"
