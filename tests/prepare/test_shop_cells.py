"""Cells of shops' tables that are easily misread: nothing is paired wrongly, and nothing is lost in silence."""

from pathlib import Path

import openpyxl
import pytest

from fashionclip_tune.errors import UserError
from fashionclip_tune.prepare.photo_folder import PhotoFolder
from tests.prepare.test_shop_platforms import NUM, Shop, columns


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


LISTS = {
    "addresses with the folder's name": "https://s.example/up/images/2024/{}.jpg, https://s.example/up/images/2024/{}.jpg",
    "paths with the folder's name": "./images/2024/{},./images/2024/{}",
    "piped": "media/images/2024/{}|media/images/2024/{}",
    "Windows": r"shop\images\2024\{}.jpg;shop\images\2024\{}.jpg",
    "another machine's": r"C:\Shop\images\2024\{}.jpg;C:\Shop\images\2024\{}.jpg",
    "queries": "https://s.example/2024/{}.jpg?v=1,https://s.example/2024/{}.jpg?v=2",
    "queries, piped": "https://s.example/2024/{}.jpg?v=1|https://s.example/2024/{}.jpg?v=2",
    "queries with commas": "https://s.example/2024/{}.jpg?fit=12,16&ssl=1, https://s.example/2024/{}.jpg?fit=12,16",
    "without a scheme": "//s.example/2024/{}.jpg?v=1,//s.example/2024/{}.jpg?v=2",
    "spaces": "https://s.example/x/{}.jpg https://s.example/x/{}.jpg",
    "spaces and queries": "https://s.example/x/{}.jpg?v=1 https://s.example/x/{}.jpg?v=2",
    "an address and a name": "https://s.example/2024/{}.jpg?v=1,2024/{}.jpg",
    "Scene7": "https://s7.example/is/w_3,h_4,c_fill/{}.jpg?$pdp$&fit=crop,1&wid=800;qlt=80, https://s7.example/is/{}.jpg?wid=8",
    "JSON": '["https://s.example/images/2024/{}.jpg?v=1", "https://s.example/images/2024/{}.jpg"]',
}


@pytest.mark.parametrize("kind", LISTS)
def test_of_a_list_every_photo_is_found_and_a_missing_one_is_named(shop: Shop, kind: str) -> None:
    for name in ("a", "b"):
        shop.photo(f"2024/{name}.jpg")
    cell = LISTS[kind]
    both = PhotoFolder(shop.images).find(cell.format("a", "b"))
    assert [found.path for found in both] == [shop.images / "2024/a.jpg", shop.images / "2024/b.jpg"]
    for names, there in ((("no", "b"), "b"), (("a", "no"), "a")):
        found = PhotoFolder(shop.images).find(cell.format(*names))
        assert {each.path for each in found} == {None, shop.images / f"2024/{there}.jpg"}
        assert len(found) == 2


@pytest.mark.parametrize("cell", ["images/a, b;c.jpg", "Shop, Inc/images/a, b;c.jpg", "https://s.example/a, b;c.jpg?v=1"])
def test_separators_in_a_name_and_before_the_folder_are_none(shop: Shop, cell: str) -> None:
    shop.photo("a, b;c.jpg")
    assert [found.path for found in PhotoFolder(shop.images).find(cell)] == [shop.images / "a, b;c.jpg"]


@pytest.mark.parametrize("query", ["$pdp$&fit=crop,1&wid=800;qlt=80", "fit=1200,1600&amp;ssl=1"])
def test_a_part_of_an_address_is_no_further_photo(shop: Shop, query: str) -> None:
    rows = [f'{i},Bag {i},"https://s7.example/w_3,h_4/{shop.photo(f"p{i}.jpg")}?{query}"' for i in range(NUM)]
    report = shop.prepare("sku,name,image_url\n" + "\n".join(rows))
    assert not report.dropped
    assert report.num_photos == len(shop.samples()) == NUM


@pytest.mark.parametrize("cell", ["P{}/", "P{}", "images/P{}", r"images\P{}" + "\\"])
def test_a_cell_that_is_a_folder_means_its_photos(shop: Shop, cell: str) -> None:
    rows = []
    for i in range(NUM):
        for view in range(3):
            shop.photo(f"P{i}/{view}.jpg")
        rows.append(f"P{i},Bag {i},{cell.format(i)},Bags")
    report = shop.prepare("sku,title,where,kind\n" + "\n".join(rows))
    assert not report.dropped
    assert {product: len(keys) for product, keys in shop.products().items()} == {f"P{i}": 3 for i in range(NUM)}


def test_folders_of_kinds_are_no_photos_of_products(shop: Shop) -> None:
    rows = []
    for i in range(NUM):
        shop.photo(f"kind{i % 3}/{i}.jpg")
        rows.append(f"P{i},Bag {i},kind{i % 3}")
    with pytest.raises(UserError, match=r"no column of items\.csv looks like the image"):
        shop.prepare("sku,title,kind\n" + "\n".join(rows))


def test_a_row_without_product_and_caption_that_says_something_else_is_left_out_and_named(shop: Shop) -> None:
    rows = [f"D{i},Bag {i},red,{i}.90,{shop.photo(f'd{i}.jpg')}" for i in range(NUM)]
    rows[7] = f",,blue,7.90,{shop.photo('draft.jpg')}"
    rows[9] = f",,,,{shop.photo('further.jpg')}"
    report = shop.prepare("sku,name,colour,price,image\n" + "\n".join(rows))
    assert dict(report.dropped) == {"caption empty": ((9, "draft.jpg"),)}
    assert shop.samples()["further"][:2] == ("D8", ["Bag 8"])
    assert "taken for the product of the row above: 1 (such as row 11)" in str(report)


@pytest.mark.parametrize("kind", ["sku", "number"])
def test_a_parent_is_in_the_group_of_its_variants(shop: Shop, kind: str) -> None:
    rows = []
    for i in range(NUM):
        parent = f"W{i}" if kind == "sku" else f"id:{100 * i}"
        rows.append(f"{100 * i},{f'W{i}' * (kind == 'sku')},Coat No {i},{shop.photo(f'{i}-main.jpg')},")
        rows += [f"{100 * i + j},W{i}-{j},Coat No {i} - {j},{shop.photo(f'{i}-{j}.jpg')},{parent}" for j in (1, 2)]
    shop.prepare("ID,SKU,Name,Images,Parent\n" + "\n".join(rows))
    homes: dict[str, set[str]] = {}
    for key, (_, _, split) in shop.samples().items():
        homes.setdefault(key.split("-")[0], set()).add(split)
    assert {len(splits) for splits in homes.values()} == {1}
    assert len(homes) == NUM


@pytest.mark.parametrize("nothing", ["n/a", "0000000000000", "sin código"])
def test_a_column_that_merely_repeats_is_no_product(shop: Shop, nothing: str) -> None:
    rows = [f"E{i},Bag {i},{nothing if i % 3 == 0 else 4012345000000 + i},{shop.photo(f'{i}.jpg')}" for i in range(NUM)]
    report = shop.prepare("sku,name,ean,image\n" + "\n".join(rows))
    assert columns(report)["id"] == "sku"
    assert set(shop.products()) == {f"E{i}" for i in range(NUM)}


def test_a_season_is_no_product(shop: Shop) -> None:
    rows = [f"E{i},Bag {i},{('SS24', 'AW24', 'SS25')[i % 3]},{shop.photo(f'{i}.jpg')}" for i in range(NUM)]
    assert columns(shop.prepare("sku,name,reference,image\n" + "\n".join(rows)))["id"] == "sku"


def test_rows_without_an_id_are_products_of_their_captions(shop: Shop) -> None:
    rows = [f"{'N/A' if i < 6 else f'E{i}'},Bag {i},{shop.photo(f'{i}.jpg')}" for i in range(NUM)]
    shop.prepare("ean,name,image\n" + "\n".join(rows))
    assert len(shop.products()) == NUM
    assert "N/A" not in shop.products()


def test_ids_that_a_spreadsheet_cut_are_refused(shop: Shop) -> None:
    rows = [f"1.0877{i // 3}E+08,S{i},Bag {i},{shop.photo(f'{i}.jpg')}" for i in range(NUM)]
    with pytest.raises(UserError, match=r"article_id: ids such as '1\.08770E\+08' were cut by .*--id-column, or none"):
        shop.prepare("article_id,number,name,image\n" + "\n".join(rows))
    assert len(shop.prepare(id_column="none") and shop.products()) == NUM
    report = shop.prepare("article_id,sku,name,image\n" + "\n".join(rows), out=shop.folder / "other")
    assert columns(report)["id"] == "sku"
    assert any("products: by sku, and not by article_id" in note for note in report.notes)


def test_whole_numbers_that_pandas_made_floats_are_whole_again(shop: Shop) -> None:
    rows = [f"{108775000 + i}.0,Bag {i},{i}.5,{i}.0" for i in range(NUM)] + [",No id,1.0,"]
    for i in range(NUM):
        shop.photo(f"0{108775000 + i}.jpg")
    report = shop.prepare("article_id,name,weight,size\n" + "\n".join(rows), captions=("{name} {weight} {size}",))
    assert dict(report.dropped) == {"row names no image": ((NUM + 2, ""),)}
    assert shop.samples()["0108775003"][:2] == ("108775003", ["Bag 3 3.5 3"])


def test_google_s_feed_with_its_prefix(shop: Shop) -> None:
    rows = [f"V{i}\tBag {i // 2}, red\thttps://s.example/{shop.photo(f'{i}.jpg')}?v=1\tG{i // 2}" for i in range(NUM)]
    report = shop.prepare("g:id\tg:title\tg:image_link\tg:item_group_id\n" + "\n".join(rows))
    assert columns(report) | {"category": None, "split": None} == columns(report)
    assert [columns(report)[name] for name in ("image", "caption", "id", "group")] == [
        *("g:image_link", "g:title", "g:id", "g:item_group_id"),
    ]


def test_workbooks_of_styles_with_merged_cells(shop: Shop) -> None:
    book = openpyxl.Workbook()
    assert book.active is not None
    book.active.append(["Style No.", "Product title", "Colour", "Photo"])
    for i in range(NUM):
        book.active.append([f"ST{i}", f"Bag {i}", "Red", shop.photo(f"{i}-red.jpg")])
        book.active.append([None, None, "Blue", shop.photo(f"{i}-blue.jpg")])
    shop.table = shop.folder / "items.xlsx"
    book.save(shop.table)
    report = shop.prepare()
    assert [columns(report)[name] for name in ("caption", "id")] == ["Product title", "Style No."]
    assert shop.products() == {f"ST{i}": {f"{i}-red", f"{i}-blue"} for i in range(NUM)}


def test_of_several_languages_english_is_taken_and_the_others_are_named(shop: Shop) -> None:
    rows = [f"s{i};dress;{shop.photo(f'{i}.jpg')};Tasche {i};Sac {i};Bag {i}" for i in range(NUM)]
    report = shop.prepare("sku;family;image;name-de_DE;name-fr_FR-web;name-en_GB\n" + "\n".join(rows))
    assert columns(report)["caption"] == "name-en_GB"
    assert columns(report)["group"] is None
    assert "captions are those in en_GB; there are others in de_DE, fr_FR (guessed: --caption-column)" in report.notes


def test_a_refusal_says_what_may_be_the_reason(shop: Shop) -> None:
    book = openpyxl.Workbook()
    assert book.active is not None
    book.active.title = "Read me"
    for line in (["How to fill this in", "Contact"], ["One row a product", "Ann"]):
        book.active.append(line)
    book.create_sheet("Products").append(["SKU"])
    shop.table = shop.folder / "items.xlsx"
    book.save(shop.table)
    shop.photo("a.jpg")
    with pytest.raises(UserError, match="read is sheet 'Read me', and not Products"):
        shop.prepare()
    book.active.delete_rows(1, 9)
    for line in (["Photo", "Name"], *([f"{i}.jpg", f"=A{i}"] for i in range(NUM))):
        book.active.append(line)
    book.save(shop.table)
    with pytest.raises(UserError, match=r"column Name.* is empty in every row.*cell B2 is a formula"):
        shop.prepare()
    shop.table = shop.folder / "items.csv"
    with pytest.raises(UserError, match="seem to be data: a row with the names of the columns is needed"):
        shop.prepare("a.jpg,0.9,a dress\nb.jpg,0.8,a coat\n")
    broken = "".join(f'q{i},"Relaxed" Jeans,a.jpg\n' for i in range(NUM))
    with pytest.raises(UserError, match="A quotation mark within a cell is written twice"):
        shop.prepare(f"sku,title,image\n{broken}")


def test_a_mac_s_text_file(shop: Shop) -> None:
    rows = [f"{i};Weißes Samtkostüm {i};{shop.photo(f'{i}.jpg')}" for i in range(NUM)]
    shop.table.write_bytes("\r".join(["Artikelnummer;Bezeichnung;Bild", *rows]).encode("mac_roman"))
    report = shop.prepare()
    assert shop.samples()["7"][1] == ["Weißes Samtkostüm 7"]
    assert any("in Mac Roman (guessed: --encoding)" in note for note in report.notes)


def test_captions_without_letters_and_a_photo_that_stands_for_missing_ones(shop: Shop) -> None:
    shop.photo("no-image.jpg")
    rows = [f"E{i},{i % 10},{'no-image.jpg' if i < 5 else shop.photo(f'{i}.jpg')}" for i in range(NUM)]
    text = str(shop.prepare("sku,label,image\n" + "\n".join(rows)))
    assert "warning: of 10 distinct captions, without a letter, such as numbers of classes: 10 (" in text
    assert f"the same photo again: 4 of {NUM} photos (most often no-image.jpg, 5 times)" in text
