"""Tables as shops export them: separators, encodings, quotes, workbooks, nested Parquet, platforms' columns."""

import io
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from fashionclip_tune.errors import UserError
from fashionclip_tune.prepare.tables.csv_reader import read_csv
from fashionclip_tune.prepare.tables.tables import read_tables


def cells(path: Path, **options: Any) -> list[tuple[str, ...]]:
    return [tuple(row.values.values()) for row in read_csv(path, **options).rows]


ROWS = [("image", "title", "price"), ("1.jpg", "Größe 36, rot", "3"), ("2.jpg", "Écharpe; 90 €", "4")]


def joined(separator: str) -> str:
    return "".join(separator.join(f'"{c}"' if "," in c or ";" in c else c for c in row) + "\r\n" for row in ROWS)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_separators_and_encodings_are_found(tmp_path: Path, separator: str, encoding: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(joined(separator).encode(encoding))
    assert cells(path) == ROWS[1:]
    said = " ".join(read_csv(path).notes)
    assert ("--separator" in said) == (separator != ",")
    assert ("Windows-1252 (guessed: --encoding), with words such as 'Größe'" in said) == (encoding == "cp1252")


def test_what_is_given_wins(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("image~title\n1.jpg~Größe, lang; x\n".encode("latin-1"))
    assert cells(path, separator="~", encoding="latin-1") == [("1.jpg", "Größe, lang; x")]
    with pytest.raises(UserError, match="--encoding klingon: no such encoding"):
        read_csv(path, encoding="klingon")
    with pytest.raises(UserError, match=r"no text in utf-8 .*--encoding"):
        read_csv(path, encoding="utf-8")


def test_excels_first_line_says_the_separator(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\ufeffsep=;\nimage;title\n1.jpg;a, b, c\n")
    table = read_csv(tmp_path / "a.csv")
    assert [(row.number, *row.values.values()) for row in table.rows] == [(3, "1.jpg", "a, b, c")]


def test_a_stray_quotation_mark_costs_its_own_row_only(tmp_path: Path) -> None:
    lines = [f"{i}.jpg,Bag {i},P{i}" for i in range(40)]
    lines[5] = '5.jpg,"Petite bag,P5'
    lines[9] = '9.jpg,Bag 30",P9'  # closes the one above for whoever reads on
    lines[20] = '20.jpg,"Sac" chic,P20'
    lines[30] = '30.jpg,"Sac ""chic"", petit",P30'
    lines[31] = '31.jpg,"Two\nlines, of text",P31'
    (tmp_path / "a.csv").write_text("image,title,id\n" + "\n".join(lines) + "\n")
    table = read_csv(tmp_path / "a.csv")
    assert [row.number for row in table.broken] == [7, 22]
    assert all("quotation mark" in row.reason for row in table.broken)
    titles = {row.values["image"]: row.values["title"] for row in table.rows}
    assert len(titles) == 38
    assert titles["9.jpg"] == 'Bag 30"'
    assert titles["30.jpg"] == 'Sac "chic", petit'
    assert titles["31.jpg"] == "Two\nlines, of text"
    (tmp_path / "b.csv").write_text("image,title,id\n" + "\n".join(lines[10:20]) + '\n1.jpg,"never closed,P1\n2.jpg,Bag,P2\n')
    table = read_csv(tmp_path / "b.csv")
    assert [(row.number, row.text) for row in table.broken] == [(12, '1.jpg,"never closed,P1')]
    assert table.rows[-1].values["image"] == "2.jpg"


def test_quotation_marks_escaped_by_a_backslash(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('image,title,id\n1.jpg,"Bag \\"Rose\\", red",P1\n2.jpg,"C:\\\\x",P2\n')
    table = read_csv(tmp_path / "a.csv")
    assert [tuple(row.values.values()) for row in table.rows] == [("1.jpg", 'Bag "Rose", red', "P1"), ("2.jpg", "C:\\x", "P2")]
    assert any("backslash" in note for note in table.notes)


def test_bytes_of_another_encoding_in_one_row_cost_that_row(tmp_path: Path) -> None:
    good = "".join(f"{i}.jpg,Écharpe {i}\n" for i in range(9)).encode()
    (tmp_path / "a.csv").write_bytes(b"image,title\n" + good + b"9.jpg,\xc9charpe\n" + b"10.jpg,plain\n")
    table = read_csv(tmp_path / "a.csv")
    assert [(row.number, row.reason) for row in table.broken] == [(11, "bytes that are not UTF-8")]
    assert table.rows[-1].values == {"image": "10.jpg", "title": "plain"}


def test_of_columns_of_one_name_the_first_counts_and_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,title,,title,title,\n1.jpg,red,x,intern,more,\n")
    table = read_csv(tmp_path / "a.csv")
    assert table.columns == ("image", "title", "title (2)", "title (3)")
    assert table.rows[0].values == {"image": "1.jpg", "title": "red", "title (2)": "intern", "title (3)": "more"}
    assert "have the same name 'title': the first one counts" in table.notes[0]


def test_workbooks(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.title = "Notes"
    sheet = book.create_sheet("Items")
    sheet.append([None, None])
    sheet.append(["Bild", "Titel", "Artikelnummer", "Datum"])
    sheet.append(["1.jpg", "Kleid", 1163, None])
    sheet.append(["2.jpg", "Rock", "007", None, None, "beyond"])
    book.save(tmp_path / "a.xlsx")
    tables = read_tables([tmp_path / "a.xlsx"])
    assert [(record.number, *record.values.values()) for record in tables.records] == [(3, "1.jpg", "Kleid", "1163", "")]
    assert [(row.number, row.reason) for _, row in tables.broken] == [(4, "more cells than the header's 4")]
    assert tables.notes == ("a.xlsx: read is sheet 'Items', and not Notes; to read another, put it first",)
    (tmp_path / "items").write_bytes((tmp_path / "a.xlsx").read_bytes())
    assert read_tables([tmp_path / "items"]).columns == ("Bild", "Titel", "Artikelnummer", "Datum")
    (tmp_path / "b.xlsx").write_bytes(b"image,title\n1.jpg,red\n")
    with pytest.raises(UserError, match=r"b.xlsx is not an Excel file \(.xlsx\) that can be read"):
        read_tables([tmp_path / "b.xlsx"])


@pytest.mark.parametrize(("name", "advice"), [("a.xls", "save as .xlsx"), ("a.jsonl", "as CSV or"), ("a.csv.gz", "unpack")])
def test_files_of_other_kinds_are_refused_by_name(tmp_path: Path, name: str, advice: str) -> None:
    (tmp_path / name).write_bytes(b"\xd0\xcf\x11\xe0 something")
    with pytest.raises(UserError, match=advice):
        read_tables([tmp_path / name])


def jpeg(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 16), (colour, 30, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


LISTS = {
    "list": pyarrow.list_(pyarrow.string()),
    "large": pyarrow.large_list(pyarrow.large_string()),
    "fixed": pyarrow.list_(pyarrow.string(), 2),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_every_kind(tmp_path: Path, kind: str) -> None:
    photos = pyarrow.array([["a|1.jpg", "b.jpg"], ["c.jpg", "d.jpg"]], LISTS[kind])
    pyarrow.parquet.write_table(pyarrow.table({"photo": photos, "title": ["x", "y"]}), tmp_path / "a.parquet")
    records = read_tables([tmp_path / "a.parquet"]).records
    assert [record.lists["photo"] for record in records] == [("a|1.jpg", "b.jpg"), ("c.jpg", "d.jpg")]
    assert records[1].values["photo"] == "c.jpg|d.jpg"


def test_nested_columns_have_dotted_names(tmp_path: Path) -> None:
    table = pyarrow.table(
        {
            "item": [{"name": {"en": "Dress"}, "tags": ["a", "b"]}, {"name": None, "tags": None}],
            "photos": [[{"url": "1.jpg", "size": 3}, {"url": "2.jpg", "size": 4}], []],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    first, second = read_tables([tmp_path / "a.parquet"]).records
    assert first.values == {"item.name.en": "Dress", "item.tags": "a|b", "photos.url": "1.jpg|2.jpg", "photos.size": "3|4"}
    assert first.lists["photos.url"] == ("1.jpg", "2.jpg")
    assert second.values == dict.fromkeys(first.values, "")


def test_commas_in_the_texts_of_a_table_of_semicolons_make_no_title_of_its_header(tmp_path: Path) -> None:
    rows = "".join(f"{i}.jpg;shirt {i}, soft, 2 pieces;P{i}\n" for i in range(9))
    (tmp_path / "a.csv").write_text("image;title;product_id\n" + rows)
    assert cells(tmp_path / "a.csv")[3] == ("3.jpg", "shirt 3, soft, 2 pieces", "P3")
    (tmp_path / "b.csv").write_text("Price list\n" + "image;title;product_id\n" + rows)
    assert cells(tmp_path / "b.csv")[3] == ("3.jpg", "shirt 3, soft, 2 pieces", "P3")
