"""Tables as text, from CSV, Parquet and HDF5."""

import datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fashionclip_tune.errors import UserError
from fashionclip_tune.prepare.tables.cells import as_text
from fashionclip_tune.prepare.tables.tables import read_tables, splits_by_file


def write_h5(path: Path, num: int = 5, **more: Any) -> Path:
    """As Fashion-Gen's files: photos, and byte strings of shape [n, 1]."""
    with h5py.File(path, "w") as file:
        file["input_image"] = np.arange(num * 8 * 8 * 3, dtype=np.uint8).reshape(num, 8, 8, 3)
        file["input_description"] = np.array([[f"Röbe {i}, na\xefve".encode("latin-1")] for i in range(num)], dtype="S40")
        file["input_productID"] = np.array([[i // 2] for i in range(num)], dtype=np.int32)
        file["input_msrpUSD"] = np.array([[i + 0.5] for i in range(num)], dtype=np.float32)
        for name, value in more.items():
            file[name] = value
    return path


def test_hdf5_strings_are_latin_1_and_only_columns_of_one_value_a_row_count(tmp_path: Path) -> None:
    more = {"input_pose": np.array([b"id\0\0", b"  ", b"a", b"b", b"c"]), "masks": np.zeros((5, 4)), "short": np.zeros((3, 1))}
    tables = read_tables([write_h5(tmp_path / "a.h5", **more)])
    assert tables.is_hdf5
    assert set(tables.columns) == {"input_description", "input_productID", "input_msrpUSD", "input_pose"}
    assert [record.values["input_pose"] for record in tables.records] == ["id", "", "a", "b", "c"]
    assert tables.records[3].values["input_description"] == "Röbe 3, naïve"
    assert tables.records[3].values["input_productID"] == "1"
    assert tables.records[3].values["input_msrpUSD"] == "3.5"
    assert tables.records[3].number == 3


def test_hdf5_strings_of_variable_length(tmp_path: Path) -> None:
    with h5py.File(write_h5(tmp_path / "a.h5"), "a") as file:
        names = file.create_dataset("input_name", (5, 1), dtype=h5py.string_dtype("utf-8"))
        names[:, 0] = ["Jürgen", "b", "c", "d", ""]
    records = read_tables([tmp_path / "a.h5"]).records
    assert [record.values["input_name"] for record in records] == ["Jürgen", "b", "c", "d", ""]


def test_hdf5_columns_longer_than_a_block_are_whole(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("input_image", (9_000, 1, 1, 3), dtype=np.uint8, chunks=(50, 1, 1, 3))
        file["input_description"] = np.array([[f"{i}".encode()] for i in range(9_000)])
    assert [record.values["input_description"] for record in read_tables([tmp_path / "a.h5"]).records] == [
        str(i) for i in range(9_000)
    ]
    assert read_tables([tmp_path / "a.h5"]).photos_of_block == 50


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 4, 4, 1), None])
def test_hdf5_without_photos_is_refused(tmp_path: Path, shape: tuple[int, ...] | None) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        if shape is not None:
            file["input_image"] = np.zeros(shape, dtype=np.uint8)
        file["other"] = np.zeros(3)
    with pytest.raises(UserError, match=r"no data set input_image of shape \[n, height, width, 3\].*it has .*other"):
        read_tables([tmp_path / "a.h5"])


@pytest.mark.parametrize(("name", "kind"), [("a.h5", "an HDF5"), ("a.parquet", "a Parquet")])
def test_files_that_are_not_what_their_names_say_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    for content in (b"", b"image,caption\n", b"\x89HDF\r\n\x1a\n" + bytes(40), b"PAR1" + bytes(40)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is not {kind} file that can be read"):
            read_tables([tmp_path / name])


def test_parquet_values_become_what_a_csv_file_would_hold(tmp_path: Path) -> None:
    table = pyarrow.table(
        {
            "photos": [["a.jpg", "b.jpg"], None, []],
            "title": ["Shirt ", None, "Rock"],
            "id": [1163.0, float("nan"), 7.25],
            "count": pyarrow.array([1, 2, None]),
            "raw": [b"R\xf6ck", b"", None],
            "when": [datetime.date(2024, 1, 2)] * 3,
            "pixels": [{"bytes": b"x"}] * 3,
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    tables = read_tables([tmp_path / "a.parquet"])
    assert tables.columns == ("photos", "title", "id", "count", "raw", "when", "pixels.bytes")
    values = [record.values for record in tables.records]
    assert values[0] == {
        "photos": "a.jpg|b.jpg",
        "title": "Shirt",
        "id": "1163",
        "count": "1",
        "raw": "Röck",
        "when": "2024-01-02",
        "pixels.bytes": "x",
    }
    assert list(values[1].values()) == ["", "", "", "2", "", "2024-01-02", "x"]
    assert values[2]["id"] == "7.25"
    assert not tables.is_hdf5


def test_csv_rows_keep_their_numbers_and_those_that_do_not_fit_the_header_are_named(tmp_path: Path) -> None:
    rows = "1.jpg, red ,3\n\n,,\n2.jpg,blue\n3.jpg,x,y,too many\n4.jpg,green,5,,\n"
    (tmp_path / "a.csv").write_text("\ufeffimage,caption,price\n" + rows)
    tables = read_tables([tmp_path / "a.csv"])
    assert [(record.number, *record.values.values()) for record in tables.records] == [
        (2, "1.jpg", "red", "3"),
        (7, "4.jpg", "green", "5"),
    ]
    assert [(row.number, row.reason, row.text) for _, row in tables.broken] == [
        (5, "fewer cells than the header's 3", "2.jpg,blue"),
        (6, "more cells than the header's 3", "3.jpg,x,y,too many"),
    ]


def test_several_tables_have_the_columns_of_all(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,caption\n1.jpg,red\n")
    (tmp_path / "b.csv").write_text("caption,image,price\nblue,2.jpg,3\n")
    tables = read_tables([tmp_path / "a.csv", tmp_path / "b.csv"])
    assert tables.columns == ("image", "caption", "price")
    assert [record.values["price"] for record in tables.records] == ["", "3"]
    with pytest.raises(UserError, match="same file twice"):
        read_tables([tmp_path / "a.csv", tmp_path / "a.csv"])
    with pytest.raises(UserError, match="HDF5 files bring their photos"):
        read_tables([tmp_path / "a.csv", write_h5(tmp_path / "c.h5")])


def test_splits_by_the_names_of_files() -> None:
    names = ["fashiongen_256_256_train.h5", "Fashiongen-Validation.h5", "x.test.h5", "dev1.csv"]
    assert list(splits_by_file([Path(name) for name in names]).values()) == ["train", "valid", "test", "valid"]
    assert splits_by_file([Path("train.csv")]) == {}
    assert splits_by_file([Path("constraint.csv"), Path("trainers.csv")]) == {}
    with pytest.raises(UserError, match=r"some files say their split and that of shoes.csv does not"):
        splits_by_file([Path("train.csv"), Path("shoes.csv")])


def test_text_of_odd_values() -> None:
    assert [as_text(value) for value in (None, True, -0.0, 1e300, np.float64("nan"))][:3] == ["", "True", "0"]
    assert as_text(float("inf")) == "inf"
    assert as_text([None, "a", 2.0]) == "a|2"
