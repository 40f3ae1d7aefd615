"""Cells of shops' tables that are easily misread: nothing is paired wrongly, and nothing is lost in silence."""

from pathlib import Path

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
