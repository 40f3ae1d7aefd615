"""``prepare``: what it writes, what it drops, what it refuses, and that no product crosses splits."""

import csv
import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from fashionclip_tune.data.shards import SPLITS, find_dataset, product_id_from_caption
from fashionclip_tune.errors import UserError
from fashionclip_tune.prepare import photo_encoding, prepare
from fashionclip_tune.prepare.options import PrepareOptions
from fashionclip_tune.prepare.report import PrepareReport

FPI60 = Path(__file__).parents[3] / "shared/data/fpi60"
# WebDataset leaves closing a shard to the garbage collector.
ignore_open_shards = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def encoded(image: Image.Image, image_format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


SMALL_JPEG = encoded(Image.new("RGB", (12, 16), (200, 30, 30)))


class Shop:
    """A folder with items.csv and images/, as a shop would hand them over."""

    def __init__(self, folder: Path) -> None:
        self.table, self.images, self.out = folder / "items.csv", folder / "images", folder / "shards"
        self.images.mkdir()

    def add_image(self, name: str, data: bytes = SMALL_JPEG) -> None:
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def write_table(self, rows: Sequence[Mapping[str, str]], *, encoding: str = "utf-8") -> None:
        with open(self.table, "w", encoding=encoding, newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def add_items(self, count: int = 20) -> list[dict[str, str]]:
        """Plain items 0.jpg, 1.jpg, ... of which the first is valid and the rest train; returns their rows."""
        for i in range(count):
            self.add_image(f"{i}.jpg")
        return [{"image": f"{i}.jpg", "caption": f"Red shirt {i}", "split": "train" if i else "valid"} for i in range(count)]

    def prepare(self, **options: Any) -> PrepareReport:
        return prepare(PrepareOptions(**{"tables": (self.table,), "images": self.images, "out": self.out, **options}))

    def samples(self) -> dict[str, dict[str, bytes]]:
        """{key: {extension: bytes}} of all shards, read with tarfile."""
        found: dict[str, dict[str, bytes]] = {}
        for shard in sorted(self.out.glob("*.tar")):
            with tarfile.open(shard) as tar:
                for member in tar.getmembers():
                    key, extension = member.name.split(".", 1)
                    content = tar.extractfile(member)
                    assert content is not None
                    found.setdefault(key, {})[extension] = content.read()
        return found

    def by_split(self, field: str) -> dict[str, list[str]]:
        """For each split the values of a field of KEY.json."""
        values: dict[str, list[str]] = {}
        for split in SPLITS:
            for shard in getattr(find_dataset(self.out), split):
                with tarfile.open(shard) as tar:
                    contents = [tar.extractfile(m) for m in tar.getmembers() if m.name.endswith(".json")]
                    values.setdefault(split, []).extend(json.load(c)[field] for c in contents if c is not None)
        return values


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


@ignore_open_shards
def test_members_and_layout(shop: Shop) -> None:
    rows = [
        {
            **row,
            "product_id": f"P{i}",
            "category": "Shirts",
            "split": ("valid", "test", "train", "Training")[min(i, 3)],
            "colour": "röt" if i % 2 else "",
            "story": "x" * 201,
        }
        for i, row in enumerate(shop.add_items(8))
    ]
    shop.write_table(rows)
    progress: list[tuple[int, int]] = []
    options = PrepareOptions(tables=(shop.table,), images=shop.images, out=shop.out)
    report = prepare(options, on_progress=lambda done, total: progress.append((done, total)))

    assert progress == [(i, 8) for i in range(1, 9)]
    assert sorted(path.name for path in shop.out.glob("[!.]*")) == [
        "clip_dataset_test.000000.index.npz",
        "clip_dataset_test.000000.tar",
        "clip_dataset_train.000000.index.npz",
        "clip_dataset_train.000000.tar",
        "clip_dataset_valid.000000.index.npz",
        "clip_dataset_valid.000000.tar",
        "dataset.json",
        "prepare.json",
        "report.json",
    ]
    samples = shop.samples()
    assert sorted(samples) == [str(i) for i in range(8)]
    assert set(samples["3"]) == {"jpg", "txt0.txt", "json"}
    assert samples["3"]["txt0.txt"] == b"Red shirt 3"
    assert json.loads(samples["3"]["json"]) == {"product_id": "P3", "category": "Shirts", "colour": "röt"}
    assert "colour" not in json.loads(samples["4"]["json"])
    described = json.loads((shop.out / "dataset.json").read_text())
    assert {split: content["samples"] for split, content in described["splits"].items()} == {
        "train": 6,
        "valid": 1,
        "test": 1,
    }
    assert described["source"].startswith("items.csv (image: image, caption: caption, id: product_id")
    assert report.splits_from is not None
    assert report.leaking_products == 0
    assert (report.splits["train"].samples, report.splits["train"].products, report.splits["train"].shards) == (6, 6, 1)

    # webdataset itself reads the same
    dataset = webdataset.WebDataset(str(shop.out / "clip_dataset_train.000000.tar"), shardshuffle=False)
    read = {sample["__key__"]: sample for sample in dataset}
    assert set(read) == {str(i) for i in range(2, 8)}
    assert read["3"]["jpg"] == SMALL_JPEG
    assert read["3"]["txt0.txt"] == b"Red shirt 3"


def test_unusable_rows_are_dropped_by_reason(shop: Shop, tmp_path: Path) -> None:
    rows = shop.add_items()
    (tmp_path / "secret.jpg").write_bytes(SMALL_JPEG)
    shop.add_image("broken.jpg", b"not an image")
    shop.add_image("cut.jpg", encoded(Image.effect_noise((90, 90), 90))[:-2000])
    shop.add_image("good.jpg")
    bad = {
        "nowhere.jpg": "image missing",
        "": "row names no image",
        "x" * 3000: "image missing",
        "broken.jpg": "image cannot be decoded",
        "cut.jpg": "image cannot be decoded",
        "../secret.jpg": "image outside the folder",
        str(tmp_path / "secret.jpg"): "image outside the folder",
        "good.jpg": "caption empty",
    }
    shop.write_table(rows + [{"image": name, "caption": "  " if name == "good.jpg" else "c", "split": "train"} for name in bad])
    report = shop.prepare()
    found = {file: reason for reason, lost in report.dropped.items() for _, file in lost}
    assert found == bad
    assert report.dropped["image missing"] == ((22, "nowhere.jpg"), (24, "x" * 3000))
    assert report.num_rows == 28
    assert sum(counts.samples for counts in report.splits.values()) == 20 == len(shop.samples())
    assert "dropped: 8 of 28 photos" in str(report)
    assert "  caption empty: 1 (row 29: 'good.jpg')" in report.lines()


def test_images_are_found_without_suffix(shop: Shop) -> None:
    rows = shop.add_items()
    shop.add_image("sub/bare.webp", encoded(Image.new("RGB", (9, 9)), "WEBP"))
    shop.write_table([*rows, {"image": "sub/bare", "caption": "c", "split": "train"}])
    assert not shop.prepare().dropped
    assert "bare" in shop.samples()


def test_columns_are_guessed(shop: Shop) -> None:
    rows = [
        {
            "id": str(i // 2),
            "articleType": "Shirts",
            "productDisplayName": row["caption"],
            "Photo": row["image"],
            "family_id": "",
        }
        for i, row in enumerate(shop.add_items(100))
    ]
    shop.write_table(rows, encoding="utf-8-sig")
    report = shop.prepare()
    assert {purpose: choice.name for purpose, choice in report.columns.items()} == {
        "image": "Photo",
        "caption": "productDisplayName",
        "id": "id",
        "category": "articleType",
        "split": None,
        "group": "family_id",
    }
    assert all(choice.guessed for choice in report.columns.values() if choice.name)
    assert report.splits_from is None
    assert "image: Photo (guessed)" in str(report)
    assert sum(counts.products for counts in report.splits.values()) == 50


def test_chosen_columns_win(shop: Shop) -> None:
    rows = [{**row, "product_id": "no", "category": "no", "sku": row["image"]} for row in shop.add_items()]
    shop.write_table(rows)
    report = shop.prepare(id_column="sku", category_column="caption")
    assert str(report.columns["id"]) == "sku"
    # the columns product_id and category, not chosen, must not overwrite what was chosen
    assert json.loads(shop.samples()["3"]["json"]) == {"product_id": "3.jpg", "category": "Red shirt 3"}


def test_without_ids_the_caption_is_the_product(shop: Shop) -> None:
    rows = shop.add_items()
    rows[2]["caption"], rows[3]["caption"] = "Blue  Skirt", "blue skirt"
    shop.write_table(rows)
    report = shop.prepare()
    assert report.splits["train"].products == 18
    assert json.loads(shop.samples()["2"]["json"])["product_id"] == product_id_from_caption(" BLUE skirt ")
    assert "no product ids: photos with the same caption count as one product" in report.lines()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_column": "titel"}, r"--caption-column titel.*no such column.*image, caption, split"),
        ({"split_column": "image"}, r"column image, row \d+: '\d+.jpg' is not a split; allowed are train, training"),
        ({"valid_share": 0.0}, "--valid-share 0.0"),
        ({"valid_share": float("nan")}, "--valid-share nan"),
        ({"valid_share": 0.5, "test_share": 0.5}, "their sum below 1"),
        ({"tables": (Path("nowhere.csv"),)}, "nowhere.csv does not exist"),
        ({"tables": (Path("/"),)}, "/ is a folder"),
        ({"images": Path("nowhere")}, "--images nowhere is not a folder"),
    ],
)
def test_wrong_options_are_refused(shop: Shop, options: dict[str, Any], message: str) -> None:
    shop.write_table(shop.add_items())
    with pytest.raises(UserError, match=message):
        shop.prepare(**options)
    assert not shop.out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no header"),
        (b"\n1.jpg,shirt\n", "has a header but no rows"),
        (b"image,caption\n\n,\n", "no rows"),
        (b"image,caption\n1.jpg,r\x81t\n", "no text in UTF-8 or Windows-1252.*choose its encoding with --encoding"),
        (b"bild;preis\n1.jpg;3\n", "looks like the caption: choose it with --caption-column.*columns bild, preis"),
        (b"price,caption\n1,red\n", "looks like the image, and no column's cells are names of files.*columns price, caption"),
        (b"image,price\n1.jpg,3\n", "looks like the caption: choose it with --caption-column.*columns image, price"),
        (b'image,caption\n1.jpg,"' + b"x" * 200_000, "row 2, which has a quotation mark that is not closed"),
    ],
)
def test_wrong_tables_are_refused(shop: Shop, content: bytes, message: str) -> None:
    shop.add_items(1)
    shop.table.write_bytes(content)
    with pytest.raises(UserError, match=message):
        shop.prepare()


def test_empty_images_folder_is_refused(shop: Shop) -> None:
    shop.table.write_text("image,caption\n1.jpg,red\n")
    with pytest.raises(UserError, match="is empty"):
        shop.prepare()


def test_wrong_images_folder_is_refused_before_decoding(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photo_encoding, "photo_as_jpeg", lambda path, size: pytest.fail("decoded an image"))
    rows = shop.add_items()
    for row in rows[:11]:
        row["image"] = f"elsewhere/{row['image']}"
    shop.write_table(rows)
    with pytest.raises(UserError, match=r"11 of the 20 photos .* image missing \(11, such as row 2: 'elsewhere/0.jpg'\)"):
        shop.prepare()
    assert not shop.out.exists()


def test_mostly_broken_images_are_refused_and_nothing_is_left(shop: Shop) -> None:
    rows = shop.add_items()
    for i in range(9, 20):
        shop.add_image(f"{i}.jpg", b"broken")
    shop.write_table(rows)
    with pytest.raises(UserError, match="image cannot be decoded"):
        shop.prepare()
    assert list(shop.out.iterdir()) == []


def test_a_split_of_which_no_image_can_be_decoded_is_refused(shop: Shop) -> None:
    shop.write_table(shop.add_items())
    shop.add_image("0.jpg", b"broken")  # the only one of valid
    with pytest.raises(UserError, match=r"no usable row is in the valid split.*check --split-column"):
        shop.prepare()
    assert list(shop.out.iterdir()) == []


@pytest.mark.parametrize("name", ["dataset.json", "clip_dataset_valid_aug.000000.tar"])
def test_a_folder_with_a_data_set_is_refused_and_kept(shop: Shop, name: str) -> None:
    shop.write_table(shop.add_items())
    shop.out.mkdir()
    (shop.out / name).write_text("old")
    with pytest.raises(UserError, match=rf"holds a data set already \({name}\): choose another or remove it"):
        shop.prepare()
    assert (shop.out / name).read_text() == "old"


@ignore_open_shards
def test_keys_have_no_dots_and_are_unique(shop: Shop) -> None:
    files = ["a.b.jpg", "a_b.jpg", "a b.png", "a_b_2.jpg", "röck/a.b.jpg", "röck.jpg", "x" * 200 + ".jpg"]
    files += ["y/" + "x" * 200 + ".jpg", "0.jpg"]
    for file in files:
        shop.add_image(file)
    rows = shop.add_items()
    shop.write_table([*rows, *({"image": file, "caption": file, "split": "test"} for file in files)])
    report = shop.prepare()
    samples = shop.samples()
    assert len(samples) == sum(counts.samples for counts in report.splits.values()) == 20 + len(files)
    assert all(len(key) <= 80 and not set(key) - set("abcdefghijklmnopqrstuvwxyz0123456789_-") for key in samples)
    assert {sample["txt0.txt"].decode() for sample in samples.values()} >= set(files)
    assert {"x" * 80, "x" * 78 + "_2", "0", "0_2"} <= set(samples)
    dataset = webdataset.WebDataset(str(shop.out / "clip_dataset_test.000000.tar"), shardshuffle=False)
    assert sum(1 for _ in dataset) == len(files)


def test_the_same_bytes_for_any_order_of_the_table(shop: Shop, tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "split"} for row in shop.add_items(60)]
    contents = []
    for name, table, seed in (("a", rows, 0), ("b", rows, 0), ("c", rows[::-1], 0), ("d", rows, 1)):
        shop.write_table(table)
        shop.prepare(out=tmp_path / name, seed=seed)
        contents.append({path.name: path.read_bytes() for path in sorted((tmp_path / name).glob("[cd]*"))})
    assert contents[0] == contents[1] == contents[2] != contents[3]
    shop.out = tmp_path / "a"
    assert list(shop.samples()) != sorted(shop.samples(), key=int)  # shuffled


@pytest.mark.parametrize("seed", range(8))
def test_drawn_splits_never_share_a_product_group_or_caption(shop: Shop, seed: int) -> None:
    rng = random.Random(seed)
    rows = shop.add_items(150)
    for row in rows:
        del row["split"]
        row["product_id"] = str(rng.randrange(130))
        row["group_id"] = str(rng.randrange(300)) if rng.random() < 0.5 else ""
        row["caption"] = rng.choice(["Red {}", "red  {}", "RED {} "]).format(rng.randrange(300))
        row["said"], row["grouped"] = " ".join(row["caption"].casefold().split()), row["group_id"] or row["image"]
        row["file"] = row["image"] = rng.choice(rows)["image"] if rng.random() < 0.2 else row["image"]
    shop.write_table(rows)
    shop.prepare(seed=seed, valid_share=0.2, test_share=0.2, image_columns=("image",))
    for field in ("product_id", "said", "grouped", "file"):
        homes = Counter(value for values in shop.by_split(field).values() for value in set(values))
        assert set(homes.values()) == {1}, field


def test_drawn_shares_are_about_right(shop: Shop) -> None:
    shop.write_table([{"image": row["image"], "caption": row["caption"]} for row in shop.add_items(600)])
    report = shop.prepare(valid_share=0.2, test_share=0.0)
    assert 90 <= report.splits["valid"].samples <= 150
    assert report.splits["test"].samples == 0
    assert "  test   none" in report.lines()
    assert find_dataset(shop.out).test == ()


def test_one_component_cannot_be_split(shop: Shop) -> None:
    shop.write_table([{**row, "group": "all"} for row in shop.add_items()])
    shop.table.write_text(shop.table.read_text().replace("split", "unrelated"))
    with pytest.raises(UserError, match=r"rows of one product, group or caption stay together"):
        shop.prepare(group_column="group")
    report = shop.prepare(valid_share=0.3)
    assert report.columns["group"].name is None
    assert any(note.startswith("column group is not kept in one split: it has 1 values") for note in report.notes)


def test_a_leak_in_the_users_split_is_kept_and_reported(shop: Shop) -> None:
    rows = [{**row, "product_id": f"P{i}", "group": f"G{i}"} for i, row in enumerate(shop.add_items())]
    rows[5]["product_id"] = "P0"  # 0 is valid, 5 train
    rows[6]["group"] = "G0"
    shop.write_table(rows)
    report = shop.prepare()
    assert report.leaking_products == 2  # P0, and P6 by its group
    assert report.splits["valid"].samples == 1
    assert "warning: 2 products are in several splits: scores will flatter" in report.lines()


@pytest.mark.skipif(not FPI60.is_dir(), reason=f"real data not there: {FPI60}")
def test_real_catalogue(tmp_path: Path) -> None:
    report = prepare(PrepareOptions(tables=(FPI60 / "items.csv",), images=FPI60 / "images", out=tmp_path / "shards"))
    counts = {split: (c.samples, c.products, c.shards) for split, c in report.splits.items()}
    assert counts == {"train": (9755, 9755, 10), "valid": (1188, 1188, 2), "test": (1057, 1057, 2)}
    assert report.dropped == {}
    assert report.leaking_products == 0
    assert report.columns["group"].name == "group_id"
