"""``prepare``: HDF5, Parquet, several files, several photos a product, caption templates, sizes."""

import csv
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from fashionclip_tune.data.index import load_index
from fashionclip_tune.data.shards import find_dataset
from fashionclip_tune.errors import UserError
from fashionclip_tune.prepare import prepare, shard_building
from fashionclip_tune.prepare.languages import RULE
from fashionclip_tune.prepare.options import PrepareOptions
from fashionclip_tune.prepare.photo_encoding import PhotoSource, encode_all
from fashionclip_tune.prepare.report import PrepareReport


def photo_bytes(number: int, size: tuple[int, int] = (24, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (number * 37 % 256, number * 91 % 256, number % 256)).save(buffer, "JPEG")
    return buffer.getvalue()


class Shop:
    """items.csv and images/ in ``folder``, shards in ``folder/shards``."""

    def __init__(self, folder: Path) -> None:
        self.table, self.images, self.out = folder / "items.csv", folder / "images", folder / "shards"
        self.images.mkdir()

    def add_images(self, *names: str) -> None:
        for number, name in enumerate(names):
            (self.images / name).parent.mkdir(parents=True, exist_ok=True)
            (self.images / name).write_bytes(photo_bytes(number))

    def write_table(self, rows: Sequence[Mapping[str, str]]) -> None:
        with open(self.table, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def prepare(self, **options: Any) -> PrepareReport:
        return prepare(PrepareOptions(**{"tables": (self.table,), "images": self.images, "out": self.out, **options}))


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def samples_of(out: Path) -> dict[str, dict[str, bytes]]:
    """{key: {extension: bytes}} of all shards."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar.getmembers():
                key, extension = member.name.split(".", 1)
                content = tar.extractfile(member)
                assert content is not None
                found.setdefault(key, {})[extension] = content.read()
    return found


def fashion_gen(path: Path, num: int, *, first_product: int = 0, chunk: int | None = None, seed: int = 0) -> Path:
    """A file as Fashion-Gen's, with four photos a product in a row and descriptions in latin-1."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 255, (num, 4, 4, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    products = [first_product + row // 4 for row in range(num)]
    columns = {
        "input_description": [f"Long-sleeve t\xefssue no. {product} in black." for product in products],
        "input_name": ["Tissue"] * num,
        "input_category": ["TOPS"] * num,
        "input_productID": [str(product) for product in products],
        "input_gender": ["Women"] * num,
    }
    with h5py.File(path, "w") as file:
        file.create_dataset("input_image", data=images, chunks=None if chunk is None else (chunk, 32, 32, 3))
        for name, values in columns.items():
            file[name] = np.array([[value.encode("latin-1")] for value in values])
    return path


@pytest.mark.parametrize("chunk", [None, 7])
def test_fashion_gen(tmp_path: Path, chunk: int | None) -> None:
    train = fashion_gen(tmp_path / "fashiongen_256_256_train.h5", 300, chunk=chunk)
    valid = fashion_gen(tmp_path / "fashiongen_256_256_validation.h5", 40, first_product=500, seed=1)
    out = tmp_path / "shards"
    report = prepare(PrepareOptions(tables=(train, valid), out=out, workers=2))
    assert [(c.samples, c.products) for c in report.splits.values()] == [(300, 75), (40, 10), (0, 0)]
    assert report.splits_from == "the names of the files"
    assert {purpose: choice.name for purpose, choice in report.columns.items()} == {
        "image": "input_image",
        "caption": "input_description",
        "id": "input_productID",
        "category": "input_category",
        "split": None,
        "group": None,
    }
    assert report.data.photos_per_product.share_with_several == 1
    samples = samples_of(out)
    with h5py.File(train) as file:
        for row in (0, 1, 150, 299):
            sample = samples[f"fashiongen_256_256_train_{row}"]
            assert sample["txt0.txt"].decode() == f"Long-sleeve tïssue no. {row // 4} in black."
            assert json.loads(sample["json"]) == {
                "product_id": str(row // 4),
                "category": "TOPS",
                "input_name": "Tissue",
                "input_gender": "Women",
            }
            with Image.open(io.BytesIO(sample["jpg"])) as image:
                decoded = np.asarray(image).astype(int)
            assert decoded.shape == (32, 32, 3)
            assert np.abs(decoded - file["input_image"][row]).mean() < 12
    assert list(samples)[40:80] != sorted(list(samples)[40:80])


def test_hdf5_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = fashion_gen(tmp_path / "a.h5", 100)
    lengths: list[int] = []
    read = h5py.Dataset.__getitem__

    def watched(dataset: Any, where: Any, *more: Any) -> Any:
        found = read(dataset, where, *more)
        if dataset.name == "/input_image":
            lengths.append(len(found))
        return found

    monkeypatch.setattr(h5py.Dataset, "__getitem__", watched)
    prepare(PrepareOptions(tables=(table,), out=tmp_path / "out", workers=1))
    assert 4 <= len(lengths) <= 12  # blocks of 32, each in up to three splits
    assert max(lengths) <= 32


def test_a_damaged_chunk_costs_its_photos_only(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        pixels = np.random.default_rng(0).integers(0, 255, (160, 16, 16, 3), dtype=np.uint8)
        images = file.create_dataset("input_image", data=pixels, chunks=(32, 16, 16, 3), fletcher32=True)
        file["input_description"] = np.array([[f"shirt {row}".encode()] for row in range(160)])
        offset = images.id.get_chunk_info(3).byte_offset
    with open(tmp_path / "a.h5", "r+b") as file:
        file.seek(offset + 100)
        file.write(bytes(50))
    report = prepare(PrepareOptions(tables=(tmp_path / "a.h5",), out=tmp_path / "out", valid_share=0.3, workers=1))
    (lost,) = report.dropped.values()
    assert sorted(number for number, _ in lost) == list(range(96, 128))
    assert sum(counts.samples for counts in report.splits.values()) == 128


def test_long_chunks_are_said_to_be_slow(tmp_path: Path) -> None:
    notes: list[str] = []
    table = fashion_gen(tmp_path / "a.h5", 300, chunk=300)
    prepare(PrepareOptions(tables=(table,), out=tmp_path / "out", workers=1), on_note=notes.append)
    (note,) = notes
    assert note.startswith("input_image is stored in chunks of 300 photos, so reading is slow")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": Path(".")}, "an HDF5 table holds its photos: leave out --images"),
        ({"image_columns": ("x",)}, "an HDF5 table holds its photos"),
        ({"caption_column": "title"}, r"no such column in a.h5; the table has the columns .*input_description"),
        ({"captions": ("{name}",)}, "no column 'name'; the columns are input_category, input_description"),
    ],
)
def test_wrong_options_with_hdf5(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    table = fashion_gen(tmp_path / "a.h5", 8)
    with pytest.raises(UserError, match=message):
        prepare(PrepareOptions(**{"tables": (table,), "out": tmp_path / "out", **options}))
    assert not (tmp_path / "out").exists()


def test_parquet_with_lists_of_photos(shop: Shop) -> None:
    shop.add_images(*(f"{i}_{side}.jpg" for i in range(20) for side in "ab"))
    table = pyarrow.table(
        {
            "photo": [[f"{i}_a.jpg", f"{i}_b.jpg"] for i in range(20)],
            "title": [f"Shirt {i}" for i in range(20)],
            "sku": [float(i) for i in range(20)],
        }
    )
    shop.table = shop.table.with_suffix(".parquet")
    pyarrow.parquet.write_table(table, shop.table)
    report = shop.prepare(valid_share=0.3)
    assert sum(counts.samples for counts in report.splits.values()) == 40
    assert json.loads(samples_of(shop.out)["7_b"]["json"])["product_id"] == "7"
    assert report.data.photos_per_product.median == 2


def test_several_photos_a_product_by_columns_globs_and_lists(shop: Shop) -> None:
    shop.add_images("1_a.jpg", "1_b.jpg", "1_c.PNG.txt", "10_a.jpg", "sub/2_x.jpg", "sub/2_y.png", "3.jpg", "4;5.jpg", "6.jpg")
    shop.add_images("v.jpg", "dir1/q.jpg", "dir2/q.jpg", "[x].jpg", "7[.jpg")
    rows = [
        {"id": "1", "main": "1_*.jpg", "more": "1_b.jpg"},  # 1_b counts once
        {"id": "2", "main": "sub/2_?.*", "more": ""},
        {"id": "3", "main": "3.jpg | 6.jpg;nowhere.jpg", "more": "none_*.jpg"},
        {"id": "4", "main": "4;5.jpg", "more": "../secret*.jpg"},
        {"id": "5", "main": "dir*/q.jpg", "more": "[x].jpg"},
        {"id": "6", "main": "", "more": "7[.jpg"},
        {"id": "7", "main": "", "more": ""},
        {"id": "8", "main": "v.jpg", "more": ""},
    ]
    shop.write_table(
        [{**row, "title": f"Shirt {row['id']}", "split": "valid" if row["id"] == "8" else "train"} for row in rows]
    )
    report = shop.prepare(image_columns=("main", "more"))
    found: dict[str, set[str]] = {}
    for key, sample in samples_of(shop.out).items():
        found.setdefault(json.loads(sample["json"])["product_id"], set()).add(key)
        assert sample["txt0.txt"].decode() == f"Shirt {json.loads(sample['json'])['product_id']}"
    found["5"] = {key.removesuffix("_2") for key in found["5"]}
    assert found == {
        "1": {"1_a", "1_b"},
        "2": {"2_x", "2_y"},
        "3": {"3", "6"},
        "4": {"4_5"},
        "5": {"q", "_x_"},
        "6": {"7_"},
        "8": {"v"},
    }
    assert dict(report.dropped) == {
        "image missing": ((4, "nowhere.jpg"), (4, "none_*.jpg")),
        "row names no image": ((8, ""),),
        "image outside the folder": ((5, "../secret*.jpg"),),
    }
    assert "dropped: 4 of 16 photos in 8 rows" in report.lines()


def test_templates_make_captions_and_several_make_augmented_shards(shop: Shop) -> None:
    shop.add_images(*(f"{i}.jpg" for i in range(12)))
    rows = [
        {"image": f"{i}.jpg", "title": f"Shirt {i}", "colour": "Blue" if i % 2 else "", "kind": "" if i == 3 else "Tops"}
        for i in range(12)
    ]
    shop.write_table([{**row, "split": "train" if i else "valid"} for i, row in enumerate(rows)])
    report = shop.prepare(captions=("{title}. {colour} {kind}", "{kind}", "{colour} {title}"))
    assert [path.name for path in find_dataset(shop.out).train] == ["clip_dataset_train_aug.000000.tar"]
    samples = samples_of(shop.out)
    assert {name: text for name, text in samples["5"].items() if "txt" in name} == {
        "txt0.txt": b"Shirt 5. Blue Tops",
        "txt1.txt": b"Tops",
        "txt2.txt": b"Blue Shirt 5",
    }
    assert samples["4"]["txt0.txt"] == b"Shirt 4. Tops"
    assert samples["3"]["txt1.txt"] == b"Blue Shirt 3"  # its {kind} is empty: one further caption
    assert "txt2.txt" not in samples["3"]
    assert str(report.columns["caption"]) == "title and colour and kind"
    index = load_index(find_dataset(shop.out).train)
    assert len(index) == 11
    assert not index.bad
    assert report.data.num_captions > 12


def test_one_template_makes_original_shards_and_an_empty_caption_is_dropped(shop: Shop) -> None:
    shop.add_images(*(f"{i}.jpg" for i in range(12)))
    rows = [{"image": f"{i}.jpg", "title": "" if i == 5 else f"Shirt {i}", "split": "train" if i else "val"} for i in range(12)]
    shop.write_table(rows)
    report = shop.prepare(captions=("{title}",))
    assert dict(report.dropped) == {"caption empty": ((7, "5.jpg"),)}
    assert (shop.out / "clip_dataset_train.000000.tar").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": ("{titel}",)}, "no column 'titel'; the columns are image, title"),
        ({"captions": ("{title}",), "caption_column": "title"}, "exclude each other"),
        ({"image_columns": ("image", "second")}, "--image-column second: there is no such column in items.csv"),
        ({"images": None}, "--images is missing"),
        ({"size": 8}, "--size 8: allowed are 16 to 4096"),
        ({"workers": 0}, "--workers 0"),
    ],
)
def test_wrong_options(shop: Shop, options: dict[str, Any], message: str) -> None:
    shop.add_images("1.jpg")
    shop.write_table([{"image": "1.jpg", "title": "Shirt"}])
    with pytest.raises(UserError, match=message):
        shop.prepare(**options)
    assert not shop.out.exists()


def test_several_tables_with_splits_by_name_or_by_column(shop: Shop, tmp_path: Path) -> None:
    shop.add_images(*(f"{i}.jpg" for i in range(20)))
    for name, numbers in (("train", range(15)), ("valid", range(15, 20))):
        shop.table = tmp_path / f"{name}.csv"
        shop.write_table([{"image": f"{i}.jpg", "title": f"Shirt {i}"} for i in numbers])
    with open(tmp_path / "valid.csv", "a") as file:
        file.write("nowhere.jpg,x\n")
    tables = (tmp_path / "train.csv", tmp_path / "valid.csv")
    report = shop.prepare(tables=tables)
    assert [counts.samples for counts in report.splits.values()] == [15, 5, 0]
    assert dict(report.dropped) == {"image missing": ((7, "valid.csv: nowhere.jpg"),)}
    assert "splits: from the names of the files" in report.lines()
    shop.write_table([{"image": f"{i}.jpg", "title": f"Shirt {i}", "split": "test"} for i in range(15, 20)])
    with pytest.raises(UserError, match=r"column split \(guessed\), row \d+: '' is not a split"):
        shop.prepare(tables=tables, out=tmp_path / "other")
    shop.table.write_text("image,title\n1.jpg,x\n")
    (tmp_path / "dev.csv").write_text("image,title\n2.jpg,x\n")
    with pytest.raises(UserError, match=r"no usable row is in the train split.*give a file of that split"):
        shop.prepare(tables=(tmp_path / "dev.csv", shop.table), out=tmp_path / "other")


def test_size_is_the_short_side_and_nothing_is_enlarged(shop: Shop) -> None:
    for number, size in enumerate([(400, 600), (600, 400), (100, 500), (40, 50)]):
        (shop.images / f"{number}.jpg").write_bytes(photo_bytes(number, size))
    rows = [{"image": f"{i}.jpg", "title": f"Shirt {i}", "split": "train" if i else "valid"} for i in range(4)]
    shop.write_table(rows)
    shop.prepare(size=100)
    sizes: dict[str, tuple[int, int]] = {}
    for key, sample in samples_of(shop.out).items():
        with Image.open(io.BytesIO(sample["jpg"])) as image:
            sizes[key] = image.size
    assert sizes == {"0": (100, 150), "1": (150, 100), "2": (100, 500), "3": (40, 50)}
    assert samples_of(shop.out)["3"]["jpg"] == photo_bytes(3, (40, 50))


@pytest.mark.parametrize("workers", [1, 2])
def test_encoding_keeps_order_and_marks_what_is_broken(tmp_path: Path, workers: int) -> None:
    paths = [tmp_path / f"{i}.jpg" for i in range(140)]
    for number, path in enumerate(paths):
        path.write_bytes(photo_bytes(number, (8 + number % 50, 9)) if number % 9 else b"broken")
    batches = [[PhotoSource(path) for path in paths[start : start + 8]] for start in range(0, 140, 8)]
    encoded = [photo for batch in encode_all(batches, size=32, workers=workers) for photo in batch]
    assert [photo and photo.jpeg for photo in encoded] == [
        photo_bytes(i, (8 + i % 50, 9)) if i % 9 else None for i in range(140)
    ]


def test_report_json_says_what_is_printed(shop: Shop) -> None:
    shop.add_images(*(f"{i}.jpg" for i in range(12)))
    rows = [{"image": f"{i}.jpg", "title": f"Shirt {i}", "split": "train" if i else "valid"} for i in range(12)]
    shop.write_table([*rows, {"image": "nowhere.jpg", "title": "x", "split": "train"}])
    report = shop.prepare()
    written = json.loads((shop.out / "report.json").read_text())
    assert written == json.loads(json.dumps(report.as_json()))
    assert written["dropped"] == {"image missing": {"count": 1, "examples": [{"row": 14, "file": "nowhere.jpg"}]}}
    assert (written["rows"], written["splits"]["train"]["samples"]) == (13, 11)
    assert written["data"]["photos_per_product"]["most"] == 1
    assert written["data"]["rules"]["foreign"] == RULE


def test_shards_are_of_equal_size(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fashionclip_tune.prepare.pipeline.SAMPLES_PER_SHARD", 10)
    monkeypatch.setattr(shard_building, "_BATCH", 3)
    shop.add_images(*(f"{i}.jpg" for i in range(32)))
    shop.write_table([{"image": f"{i}.jpg", "title": f"Shirt {i}", "split": "train" if i > 10 else "valid"} for i in range(32)])
    shop.prepare(workers=1)
    assert [len(load_index((path,))) for path in find_dataset(shop.out).train] == [7, 7, 7]
    assert [len(load_index((path,))) for path in find_dataset(shop.out).valid] == [5, 6]
